"""Published rows are complete, and what stands beside them is made from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ham.cli import main
from ham.config_files import load_config
from ham.errors import ConfigError, MissingDataError
from ham.files import write_json
from ham.report.figure_compare import drawing_versions
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.publish import (
    CHECKSUMS,
    DRAWN_WITH,
    PIECES,
    REPORTS,
    RESULTS,
    build_published,
    publish_run,
    published_names,
    write_checksums,
)
from ham.report.rows import Row, write_rows
from ham.report.verify import checksum_faults, published_folders, verify_all, verify_published
from ham.workflow import inspection_pages, rows_files

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A checkout with one arm's rows and manifests of all stages."""
    values = {"name": "tiny", "arms": [{"name": "transformer", "mixer": "transformer"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "config.yaml")
    manifest = collect_manifest(config.model_dump(mode="json"), ["ham"], seeds=[0])
    for path in rows_files(config):
        row = Row(
            experiment="language_modelling",
            metric="bits_per_byte",
            value=2.0,
            task=Path(path).name,
            x_name="context",
            x_value=512,
            model="transformer",
            mixer="transformer",
            seed=0,
            device="CPU",
            manifest_id=manifest["manifest_id"],
        )
        write_rows(tmp_path / path, [row])
        write_manifest(manifest_path(tmp_path / path), manifest)
    return tmp_path


def test_a_run_is_copied_whole_and_its_report_is_made(finished_run: Path) -> None:
    written = publish_run([finished_run / "config.yaml"], "2026-01-01-cpu", finished_run)
    assert [path.name for path in written] == [
        "transformer-seed0-train.rows.jsonl",
        "transformer-seed0-evaluate.rows.jsonl",
        "transformer-seed0-measure.rows.jsonl",
    ]
    assert all(manifest_path(path).is_file() for path in written)
    assert published_names(finished_run) == ["2026-01-01-cpu"]
    build_published("2026-01-01-cpu", finished_run)
    assert (finished_run / REPORTS / "2026-01-01-cpu" / "index.html").is_file()


def test_published_rows_are_judged_by_the_claims_of_their_day(finished_run: Path) -> None:
    publish_run([finished_run / "config.yaml"], "2026-01-01-cpu", finished_run)
    assert (finished_run / RESULTS / "2026-01-01-cpu" / "claims.yaml").is_file()
    build_published("2026-01-01-cpu", finished_run)
    ledger = (finished_run / REPORTS / "2026-01-01-cpu/tables/claims.csv").read_text()
    folder = f"{RESULTS.as_posix()}/2026-01-01-cpu"
    assert f"ham claims {folder} --claims {folder}/claims.yaml --only P1" in ledger


def test_published_results_are_never_overwritten(finished_run: Path) -> None:
    publish_run([finished_run / "config.yaml"], "x", finished_run)
    with pytest.raises(ConfigError, match="never overwritten"):
        publish_run([finished_run / "config.yaml"], "x", finished_run)


def test_an_unfinished_run_is_refused_and_writes_nothing(finished_run: Path) -> None:
    next(finished_run.glob("results/runs/tiny/**/measure.rows.jsonl")).unlink()
    with pytest.raises(MissingDataError, match=r"measure\.rows\.jsonl.*1 of 3"):
        publish_run([finished_run / "config.yaml"], "x", finished_run)
    assert not (finished_run / RESULTS).exists()


def test_an_unknown_name_lists_the_known_ones(finished_run: Path) -> None:
    publish_run([finished_run / "config.yaml"], "x", finished_run)
    with pytest.raises(MissingDataError, match="known: x"):
        build_published("y", finished_run)


@pytest.mark.parametrize("name", published_folders(REPOSITORY))
def test_published_results_and_reports_are_verified(name: str) -> None:
    found = verify_published(name, REPOSITORY)
    assert found.faults == []
    assert found.rows and bool(found.tables) == (name in published_names(REPOSITORY))


def test_every_report_has_its_results() -> None:
    reports = {path.name for path in (REPOSITORY / REPORTS).glob("*") if path.is_dir()}
    assert reports == set(published_names(REPOSITORY))


@pytest.fixture
def published(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one published run and its report; the working directory is there."""
    publish_run([finished_run / "config.yaml"], "x", finished_run)
    build_published("x", finished_run)
    monkeypatch.chdir(finished_run)
    return finished_run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_one_changed_byte_is_found(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = published / REPORTS / "x"
    files = ["tables/comparison.md", "tables/comparison.csv", "tables/comparison.tex", "index.html"]
    for name in files:
        edit(report / name, "2.0", "2.1")
    (report / "summary.md").unlink()
    (report / "tables" / "old.csv").write_text("left behind")
    figures = sorted(report.glob("figures/*.png"))
    figures[0].write_bytes(figures[0].read_bytes() + b"\0")
    assert main(["verify", str(RESULTS / "x")]) == 1
    printed = capsys.readouterr().out
    for name in files:
        assert f"reports/published/x/{name}: line " in printed
    assert "summary.md is missing" in printed
    assert "tables/old.csv is not made from the rows" in printed
    assert f"{figures[0].name}: the bytes of the figure differ" in printed
    assert len(verify_published("x").faults) == len(files) + 3


def test_changed_results_are_found(published: Path) -> None:
    folder = published / RESULTS / "x"
    rows, manifests = sorted(folder.glob("*.rows.jsonl")), sorted(folder.glob("*.manifest.json"))
    edit(rows[0], '"value": 2.0', '"value": 2.5')
    edit(rows[1], '"schema_version": 1', '"schema_version": 7')
    edit(rows[2], '"manifest_id": "', '"manifest_id": "0')
    edit(manifests[0], '"threads": ', '"threads": 1')
    manifests[1].unlink()
    (folder / "extra.manifest.json").write_text("{}")
    edit(folder / "config.yaml", "name: tiny", "name: teeny")
    faults = "\n".join(verify_published("x").faults)
    for words in (
        f"{rows[0].name} was changed: its SHA-256 is not the recorded one",
        f"{rows[1].name} record 1 is not a result row:",
        f"{rows[2].name} refers to manifest '0",
        f"{manifests[0].name} was changed: its id is not that of its content",
        f"{manifests[1].name} is missing",
        "extra.manifest.json is not among the checksums",
        "extra.manifest.json belongs to no rows",
        f"{manifests[0].name} has another configuration than config.yaml",
        "the report cannot be made: ",
    ):
        assert words in faults


def test_figures_of_another_matplotlib_are_compared_by_what_they_show(published: Path) -> None:
    report = published / REPORTS / "x"
    write_json(report / DRAWN_WITH, {**drawing_versions(), "matplotlib": "3.0"})
    svg = sorted(report.glob("figures/*.svg"))[0]
    page = report / "index.html"
    for path in (svg, page):
        edit(path, "L 0 3.5", "L 0 3.501")
    found = verify_published("x")
    assert found.faults == [] and found.figures
    assert found.notes[0].startswith("figures were drawn with matplotlib 3.0 (here ")
    for path in (svg, page):
        edit(path, "L 0 3.501", "L 0 4.5")
    edit(report / "tables" / "comparison.md", "2.0", "2.1")
    faults = verify_published("x").faults
    assert len(faults) == 3
    assert "/index.html: 'path stroke: var(--grid)" in faults[1]
    for fault, words in zip(
        faults, ("lies 1 points away", "lies 1 points away", "line "), strict=True
    ):
        assert words in fault


def test_reports_without_results_are_found(published: Path) -> None:
    (published / REPORTS / "y").mkdir()
    assert [found.name for found in verify_all() if found.faults] == ["y"]


def test_results_are_sealed_once(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run)
    publish_run([finished_run / "config.yaml"], "x")
    assert checksum_faults(RESULTS / "x") == []
    (RESULTS / "x" / CHECKSUMS).unlink()
    assert "`ham publish seal x` writes it" in checksum_faults(RESULTS / "x")[0]
    assert main(["publish", "seal", "x"]) == 0
    assert checksum_faults(RESULTS / "x") == []
    with pytest.raises(ConfigError, match="exists; published results never change"):
        write_checksums(RESULTS / "x")
    edit(RESULTS / "x" / CHECKSUMS, "  config.yaml", " config.yaml")
    assert "is not a checksum and a name" in checksum_faults(RESULTS / "x")[0]


def test_what_cannot_be_verified(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_run)
    assert main(["verify", "--all"]) == 2
    assert "there is no results/published here" in capsys.readouterr().err
    publish_run([finished_run / "config.yaml"], "x")
    for arguments, words in (
        (["results/published/y"], "nothing is published as 'y'; known: x"),
        (["reports/published/x"], "expected a folder of results/published, received reports"),
        ([], "name folders of results/published, or --all of them"),
        (["results/published/x", "--all"], "or --all of them"),
    ):
        assert main(["verify", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_report_names_the_packed_state_of_its_configuration(finished_run, monkeypatch) -> None:
    given = []
    publish_run([finished_run / "config.yaml"], "2026-01-01-cpu", finished_run)
    monkeypatch.setattr(
        "ham.report.publish.build_report", lambda *_, **named: given.append(named["pieces"])
    )
    pieces = finished_run / PIECES
    pieces.mkdir(parents=True)
    build_published("2026-01-01-cpu", finished_run, finished_run / "out")
    for name in ("tiny-1.tar.xz", "tiny-2.tar.xz", "other-1.tar.xz", "other-2.tar.xz.001"):
        (pieces / name).touch()
    build_published("2026-01-01-cpu", finished_run, finished_run / "out")
    assert given == [[], ["results/pieces/tiny-*.tar.xz"]]


def test_a_run_takes_its_page_of_kept_tokens_along(tmp_path: Path, finished_run: Path) -> None:
    config = load_config([finished_run / "config.yaml"])
    values = config.model_dump(mode="json")
    values["arms"] = [{"name": "transformer", "mixer": "ham"}]
    (finished_run / "config.yaml").write_text(yaml.safe_dump(values))
    page = finished_run / inspection_pages(load_config([finished_run / "config.yaml"]))[0]
    page.parent.mkdir(parents=True)
    page.write_text("<p>kept</p>")
    publish_run([finished_run / "config.yaml"], "x", finished_run)
    build_published("x", finished_run)
    assert (finished_run / REPORTS / "x/inspect" / page.name).read_text() == "<p>kept</p>"
    assert f"inspect/{page.name}" in (finished_run / REPORTS / "x/index.html").read_text()
