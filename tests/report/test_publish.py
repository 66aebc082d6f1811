"""Published rows are complete, and what stands beside them is made from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ham.errors import ConfigError, MissingDataError
from ham.files import read_json
from ham.report import sweep_report
from ham.report.kernel_report import LISTING, SUMMARY
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.publish import (
    REPORTS,
    RESULTS,
    build_published,
    publish_run,
    published_names,
)
from ham.report.rows import Row, read_rows, write_rows
from ham.workflow import rows_files

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT_FILES = ("summary.md", "report.json", "tables/comparison.md", "tables/comparison.csv")
TEXT_SUFFIXES = {".md", ".csv", ".tex", ".json"}


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A checkout with one arm's rows and manifests of all stages."""
    from ham.config_files import load_config

    values = {"name": "tiny", "arms": [{"name": "transformer", "mixer": "transformer"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    manifest = collect_manifest(values, ["ham"], seeds=[0])
    for path in rows_files(load_config(tmp_path / "config.yaml")):
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


@pytest.mark.parametrize("name", published_names(REPOSITORY))
def test_published_reports_are_not_stale(name: str, tmp_path: Path) -> None:
    pages = build_published(name, REPOSITORY, tmp_path)
    files = list(TEXT_FILES) if tmp_path / "index.html" in pages else []
    if tmp_path / SUMMARY in pages:
        listed = [*read_json(tmp_path / LISTING)["files"], LISTING]
        files += [file for file in listed if Path(file).suffix in TEXT_SUFFIXES]
    if tmp_path / sweep_report.SUMMARY in pages:
        listed = [*read_json(tmp_path / sweep_report.LISTING)["files"], sweep_report.LISTING]
        files += [file for file in listed if Path(file).suffix in TEXT_SUFFIXES]
    assert files
    for file in files:
        kept = (REPOSITORY / REPORTS / name / file).read_text(encoding="utf-8")
        assert (tmp_path / file).read_text(encoding="utf-8") == kept, file


@pytest.mark.parametrize("name", published_names(REPOSITORY))
def test_published_rows_have_their_manifests(name: str) -> None:
    from ham.report.manifest import read_manifest

    files = sorted((REPOSITORY / RESULTS / name).glob("*.rows.jsonl"))
    assert files
    for path in files:
        identity = read_manifest(manifest_path(path))["manifest_id"]
        assert {row.manifest_id for row in read_rows(path)} == {identity}
