from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from invented_claims import STATED, make_claims, make_test, observed, seeds_of, timing_rows

from ham.claims.evidence import observe, read_evidence
from ham.claims.judge import judge
from ham.claims.ledger import as_text, ledger_table
from ham.cli import main
from ham.errors import CorruptFileError, MissingDataError
from ham.files import write_json, write_jsonl
from ham.fingerprint import repository_root
from ham.report.build import build_report
from ham.report.rows import Row, write_rows
from ham.report.table_format import to_csv, to_latex, to_markdown

PUBLISHED = repository_root() / "results/published"
ROWS = seeds_of("ours", [2.0, 2.01, 2.02]) + seeds_of("theirs", [2.3, 2.31, 2.33])


def write_claims(path: Path, *tests: dict) -> str:
    path.write_text(yaml.safe_dump(make_claims(*tests).model_dump(mode="json")))
    text = path.read_text().replace("'2026-01-01T00:00:00Z'", "2026-01-01T00:00:00Z")
    path.write_text(text)
    return str(path)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with rows at two depths of folders and one manifest."""
    folder = tmp_path / "run"
    for name in ("ours", "theirs"):
        rows = [row.model_copy(update={"manifest_id": "m"}) for row in ROWS if row.model == name]
        write_rows(folder / f"models/{name}/evaluate.rows.jsonl", rows)
    manifest = {"manifest_id": "m", "config": {"name": "exp"}, "started": "2027-01-01T00:00:00Z"}
    write_json(folder / "models/ours/evaluate.manifest.json", manifest)
    return folder


def test_the_command_prints_the_ledger(run_folder: Path, capsys: pytest.CaptureFixture):
    file = write_claims(
        run_folder.parent / "c.yaml", make_test(), make_test(arm={"model": "mamba2"})
    )
    assert main(["claims", str(run_folder), "--claims", file]) == 0
    printed = capsys.readouterr().out
    assert "X0  SUPPORTED  ours is better" in printed
    assert "asked: bits_per_byte better than theirs by more than 0.02 bits per byte" in printed
    assert "n=3; against theirs" in printed
    assert f"recompute: ham claims {run_folder} --claims {file} --only X0" in printed
    assert "with model 'mamba2'; there are: ours, theirs" in printed
    assert printed.rstrip().endswith("1 supported, 0 refuted, 0 inconclusive, 1 not run")
    assert main(["claims", str(run_folder), "--claims", file, "--only", "X1"]) == 0
    assert "X0" not in capsys.readouterr().out


def test_the_command_prints_json(run_folder: Path, capsys: pytest.CaptureFixture):
    file = write_claims(run_folder.parent / "c.yaml", make_test(family="main"))
    assert main(["claims", str(run_folder), "--claims", file, "--json"]) == 0
    (claim,) = json.loads(capsys.readouterr().out)["claims"]
    assert (claim["verdict"], claim["stated"]) == ("supported", "2026-01-01T00:00:00Z")
    (test,) = claim["tests"]
    assert (test["n"], test["family"], test["runs"]) == (3, "main", [run_folder.as_posix()])
    assert test["low"] < test["effect"] < test["high"]
    assert test["p"] == test["p_adjusted"] < 0.05


def test_bad_input_has_one_message(run_folder: Path, capsys: pytest.CaptureFixture):
    file = write_claims(run_folder.parent / "c.yaml", make_test())
    for arguments, message in (
        ([str(run_folder / "no")], "no does not exist; give a folder with *.rows.jsonl files"),
        ([str(run_folder / "models/ours"), "--only", "Z"], "unknown claim 'Z'; known: X0"),
        ([str(run_folder), "--claims", "no.yaml"], "no.yaml does not exist"),
    ):
        assert main(["claims", "--claims", file, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_without_rows_and_rows_of_another_schema(tmp_path: Path):
    with pytest.raises(MissingDataError, match=r"holds no \*\.rows\.jsonl file"):
        read_evidence([tmp_path])
    write_jsonl(tmp_path / "a.rows.jsonl", [{**ROWS[0].model_dump(), "schema_version": 2}])
    with pytest.raises(CorruptFileError, match="has schema version 2, this ham-bench reads"):
        read_evidence([tmp_path])


def test_evidence_knows_configuration_scale_and_time(run_folder: Path):
    found = read_evidence([run_folder])
    assert {(one.run, one.config, one.smoke) for one in found} == {
        (run_folder.as_posix(), "exp", False)
    }
    manifest = {"manifest_id": "", "config": {"name": "demo", "scale": "smoke"}}
    assert {one.smoke for one in observe(ROWS, [manifest], "r")} == {True}
    assert {one.smoke for one in observe(ROWS, [], "r", {"scale": "smoke"})} == {True}
    alone = read_evidence([run_folder / "models/ours/evaluate.rows.jsonl"])
    assert len(alone) == 3


def test_runs_below_one_folder_stay_apart(run_folder: Path):
    (run_folder / "config.yaml").write_text("name: exp\n")
    write_rows(run_folder.parent / "sweep/sweep.rows.jsonl", ROWS[:1])
    found = read_evidence([run_folder.parent])
    assert [one.run for one in found] == [run_folder.as_posix()] * 6 + [
        (run_folder.parent / "sweep").as_posix()
    ]


def test_values_that_are_not_finite_are_failures():
    rows = [ROWS[0].model_copy(update={"value": float("nan")}), *ROWS[1:]]
    one = judge(make_claims(make_test()), observe(rows, [], "r"))[0].tests[0]
    assert one.verdict == "inconclusive"
    assert "ours, seed 0 failed: not finite" in one.reason


def test_rows_that_are_older_than_their_claim_are_marked():
    for days, marked in ((-1, True), (1, False)):
        evidence = observed(ROWS, started=STATED + timedelta(days=days))
        one = judge(make_claims(make_test()), evidence)[0].tests[0]
        assert ("from before the claim was stated (2026-01-01)" in one.reason) == marked
    assert observe(ROWS, [{"manifest_id": "", "started": "2026-01-02T00:00:00+00:00"}], "r")[
        0
    ].started == datetime(2026, 1, 2, tzinfo=UTC)


def test_an_open_question_names_the_n_that_would_settle_it():
    rows = seeds_of("ours", [2.25, 2.29, 2.26]) + seeds_of("theirs", [2.30, 2.31, 2.32])
    judged = judge(make_claims(make_test()), observed(rows))
    n = judged[0].tests[0].settles_at
    assert n > 3
    assert f"would be settled at n={n} if mean and spread stayed the same" in as_text(judged, ["r"])


def test_the_table_in_every_format():
    delta = {"value": 1.5, "unit": "times", "reason": "x"}
    where = {"experiment": "model_decode", "metric": "median_ms", "over": ["batch"]}
    timing = make_test(test="timing", delta=delta, where=where)
    rows: list[Row] = [*ROWS, *(row for b in range(3) for row in timing_rows(2.0, b))]
    table = ledger_table(judge(make_claims(make_test(), timing), observed(rows)), ["r"])
    assert [one["verdict"] for one in table.records] == ["supported", "supported"]
    assert "(95 % t; bound 0.02)" in table.records[0]["interval"]
    assert table.records[1]["interval"] == "[1.96×, 2.04×] (p20 to p80; bound 1.5×)"
    assert "median_ms of theirs more than 1.5 times that of ours" in to_markdown(table, False)
    assert to_csv(table).splitlines()[0].endswith("command,low,high,level,bound,p,p_adjusted")
    assert r"smallest effect $\delta$" in to_latex(table, False)


def test_the_report_has_the_ledger_before_its_figures(tmp_path: Path):
    claims = make_claims(make_test(), make_test(arm={"model": "absent"}))
    build_report(ROWS, tmp_path, claims=claims, source="results/runs/x")
    page = (tmp_path / "index.html").read_text()
    assert 0 < page.index('id="claims"') < page.index('id="figures"')
    assert 'title="ham claims results/runs/x --only X0"' in page
    summary = (tmp_path / "summary.md").read_text()
    assert "## Claims" in summary
    assert "1 supported, 0 refuted, 0 inconclusive, 1 not run." in summary
    for suffix in ("md", "csv", "tex"):
        assert "supported" in (tmp_path / f"tables/claims.{suffix}").read_text()
    assert "tables/claims.csv" in json.loads((tmp_path / "report.json").read_text())["files"]


def test_a_report_without_claims_has_no_ledger(tmp_path: Path):
    build_report(ROWS, tmp_path)
    assert 'id="claims"' not in (tmp_path / "index.html").read_text()
    assert not (tmp_path / "tables/claims.md").exists()


def test_the_union_of_all_published_folders(capsys: pytest.CaptureFixture):
    places = [str(path) for path in sorted(PUBLISHED.iterdir())]
    assert main(["claims", *places, "--json"]) == 0
    claims = {one["id"]: one for one in json.loads(capsys.readouterr().out)["claims"]}
    decoding = claims["C6-decoding"]["tests"][0]
    assert decoding["n"] >= 3
    measured = [Path(run).name for run in decoding["runs"]]
    assert measured == ["2026-11-25-h100-decode", "2026-11-26-h100-targets"]
    few = [test for one in claims.values() for test in one["tests"] if test["n"] < 3]
    assert {test["verdict"] for test in few} <= {"inconclusive", "not run"}
