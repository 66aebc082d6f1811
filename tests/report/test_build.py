from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from ham.cli import main
from ham.report.build import build_report
from ham.report.figures import FIGURES
from ham.report.html import inline_svg
from ham.report.manifest import write_manifest
from ham.report.palette import FIRST, INK, KNOWN_STYLES
from ham.report.rows import write_rows


class Outline(HTMLParser):
    """Tags with attributes, and whether every element was closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(report) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def test_everything_is_written(report):
    listing = json.loads((report / "report.json").read_text())
    assert listing["skipped"] == []
    for name in listing["files"]:
        assert (report / name).stat().st_size > 0
    figures = {f"figures/{spec.name}.{suffix}" for spec in FIGURES for suffix in ("png", "svg")}
    assert figures <= set(listing["files"])
    assert len([name for name in listing["files"] if name.startswith("tables/")]) == 42


def test_pictures_are_at_most_1200_pixels_wide(report):
    for path in (report / "figures").glob("*.png"):
        width, _ = struct.unpack(">II", path.read_bytes()[16:24])
        assert 900 < width < 1200


def test_page_loads_nothing_from_elsewhere(page):
    assert not re.search(r"https?://|//cdn|@import", page)
    for tag, attributes in Outline(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "data", "srcset"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_page_is_well_formed_and_links_lead_somewhere(page):
    outline = Outline(page)
    assert outline.open == []
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"] for tag, a in outline.tags if tag in ("a", "use") and "href" in a}
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_smoke_runs_have_a_banner(page):
    assert "Smoke run" in page and "prove nothing about the architectures" in page


def test_page_has_summary_captions_and_alternative_texts(page):
    assert page.index('id="summary"') < page.index('id="figures"') < page.index('id="provenance"')
    assert "With one seed there is no interval on this order." in page
    outline = Outline(page)
    pictures = [a for tag, a in outline.tags if tag == "svg"]
    assert len(pictures) == len(FIGURES)
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in pictures)
    captions = re.findall(r'<figcaption><span>(.+?)</span><span class="note">(.+?)</span>', page)
    assert len(captions) == len(FIGURES)


def test_failed_rows_show_as_failed(page, report):
    assert "failed: OutOfMemoryError: invented: tried to allocate 9 GiB" in page
    section = page[page.index('id="failed"') : page.index('id="not-run"')]
    assert "sliding-window" in section and "context 1,024" in section
    assert "length 1,024; depth 0.0, 0.25, 0.5, 0.75, 1.0; seed 0" in section
    assert "failed: RuntimeError" in (report / "tables/needle.md").read_text()
    assert "failed: OutOfMemoryError" in (report / "summary.md").read_text()


def test_provenance_is_complete(page):
    section = page[page.index('id="provenance"') :]
    for fact in (
        "0123456789abcdef0123456789abcdef01234567 with changes (hash beef)",
        "Imaginary CPU",
        "Imaginary GPU, driver 1.2, 40 °C at start",
        "2.13.0",
        "feedc0ffee00",
        "scale: smoke",
        "ham train &#39;a config.yaml&#39; --arm transformer",
    ):
        assert fact in section


def test_page_follows_dark_mode_and_prints(page):
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    pictures = page[page.index('id="figures"') : page.index('id="tables"')]
    assert INK not in pictures and "var(--ink)" in pictures
    for model in FIRST:
        assert f"var(--model-{KNOWN_STYLES[model].color[1:]})" in pictures


def test_without_a_configuration_the_scale_is_unknown(tmp_path, make_rows):
    build_report(make_rows(models=["mamba2"], omit=["train", "needle"]), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "Scale not declared" in page
    assert "ham measure CONFIG.yaml --arm mamba2 --seed 0" in page


def test_full_scale_has_no_banner(tmp_path, make_rows, config):
    rows = make_rows(models=["mamba2"], omit=["train", "needle", "memory", "throughput"])
    build_report(rows, tmp_path, config={**config, "scale": "full"})
    assert 'class="banner"' not in (tmp_path / "index.html").read_text()
    assert "moke run" not in (tmp_path / "tables/comparison.md").read_text()


def test_missing_experiments_are_listed_and_old_figures_removed(tmp_path, make_rows, config):
    stale = tmp_path / "figures" / "dial.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    rows = make_rows(models=["transformer"], omit=["train", "needle", "lm_eval"])
    listing = build_report(rows, tmp_path, config=config)
    reasons = {(item["kind"], item["name"]): item["reason"] for item in listing["skipped"]}
    assert reasons["figure", "dial"] == "not run"
    assert reasons["table", "needle"] == "not run"
    assert not stale.exists()
    assert "Needle in a haystack (figure): not run" in (tmp_path / "index.html").read_text()


def test_no_rows_at_all_still_give_a_page(tmp_path):
    listing = build_report([], tmp_path)
    assert "There are no result rows." in (tmp_path / "index.html").read_text()
    skipped = [item["name"] for item in listing["skipped"] if item["kind"] == "figure"]
    assert skipped == [spec.name for spec in FIGURES if spec.part_of is None]


def test_hostile_names_are_escaped(tmp_path, make_rows):
    rows = make_rows(models=["mamba2"], omit=["train", "needle", "memory", "throughput", "dial"])
    bad = {"error": "Error: <script>alert(1)</script>", "value": None}
    bad |= {"low": None, "high": None, "interval": None}
    rows.append(rows[0].model_copy(update={**bad, "seed": 5}))
    build_report(rows, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


def test_same_rows_same_bytes(tmp_path, make_rows, config, manifest):
    rows = make_rows(models=["transformer", "ham-cosine"], omit=["train", "needle", "lm_eval"])
    for name in ("a", "b"):
        build_report(rows, tmp_path / name, config=config, manifests=[manifest])
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 20
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_demo_sized_build_is_quick(tmp_path, make_rows, config):
    started = time.process_time()
    build_report(make_rows(), tmp_path, config=config)
    assert time.process_time() - started < 12


def test_inline_svg_prefixes_ids_and_keeps_references():
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" '
        'width="5pt" height="6pt" viewBox="0 0 5 6" version="1.1"><metadata>x</metadata>'
        f'<path id="p" clip-path="url(#c)" style="fill: {INK}"/><use xlink:href="#p"/></svg>'
    )
    assert inline_svg(svg, "f", 'a "quoted" text', {}) == (
        '<svg viewBox="0 0 5 6" role="img" aria-label="a &#34;quoted&#34; text">'
        '<path id="f-p" clip-path="url(#f-c)" style="fill: var(--ink)"/><use href="#f-p"/></svg>'
    )


def test_command_finds_manifests_beside_rows(tmp_path, make_rows, manifest, capsys):
    rows = make_rows(models=["mamba2"], omit=["train", "needle", "memory", "throughput"])
    write_rows(tmp_path / "evaluate.rows.jsonl", rows)
    write_manifest(tmp_path / "evaluate.manifest.json", manifest)
    out = tmp_path / "out"
    status = main(["report", "--rows", str(tmp_path / "evaluate.rows.jsonl"), "--out", str(out)])
    assert status == 0
    assert "Imaginary CPU" in (out / "index.html").read_text()
    printed = capsys.readouterr().out
    assert str(out / "index.html") in printed
    assert "not drawn: The dial (figure): not run" in printed


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{broken\n", "not valid JSON")]
)
def test_command_refuses_bad_rows_and_writes_nothing(tmp_path, capsys, content, message):
    path = tmp_path / "x.rows.jsonl"
    if content is not None:
        path.write_text(content)
    status = main(["report", "--rows", str(path), "--out", str(tmp_path / "out")])
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_registering_the_command_loads_nothing_heavy():
    code = (
        "import sys; from ham.cli import report;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'pandas', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
