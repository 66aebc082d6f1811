"""Names that no configuration and no row knows are errors; known names without rows are not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from invented_claims import STATED, TEXT, make_claims, make_test, observed, seeds_of

from ham.claims.config import load_claims, shipped_claims
from ham.claims.judge import NOT_RUN, judge
from ham.claims.vocabulary import EXPERIMENTS, check_names, shipped_models
from ham.cli import main
from ham.errors import ConfigError
from ham.files import read_jsonl
from ham.fingerprint import repository_root
from ham.report.rows import write_rows

PUBLISHED = repository_root() / "results/published"
ROWS = seeds_of("ours", [2.0, 2.1, 2.2]) + seeds_of("theirs", [2.3, 2.4, 2.5])


def test_the_shipped_claims_use_known_names_alone():
    check_names(load_claims(shipped_claims()), [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arm": {"model": "ham-cosin"}},
            r"unknown model of claim X0, test 't': 'ham-cosin'; known: .*\bham-cosine\b",
        ),
        (
            {"reference": [{"model": "theirs"}, {"model": "nobody"}]},
            r"unknown model of claim X0, test 't': 'nobody'; known: .*\btheirs\b",
        ),
        (
            {"where": {**TEXT, "experiment": "language"}},
            r"unknown experiment of claim X0, test 't': 'language'; known: .*\bneedle\b",
        ),
        (
            {"same_metric": {"where": {**TEXT, "experiment": "memories"}, "tolerance": 0.1}},
            r"unknown experiment of .*'memories'; known: .*\bmemory\b",
        ),
    ],
)
def test_an_unknown_name_is_an_error(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_names(make_claims(make_test(**changes)), observed(ROWS))


def test_names_of_the_rows_are_known():
    check_names(make_claims(make_test()), observed(ROWS))
    with pytest.raises(ConfigError, match="'ours'"):
        check_names(make_claims(make_test()), [])


def test_a_known_name_without_rows_is_not_run():
    claims = make_claims(make_test(arm={"model": "ham-cosine"}))
    check_names(claims, observed(ROWS))
    assert judge(claims, observed(ROWS))[0].verdict == NOT_RUN


def test_models_of_configurations_and_of_the_sweep(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("arms: [{name: one}, {name: two}]\n")
    (tmp_path / "b.yaml").write_text("name: without arms\n")
    (tmp_path / "claims.yaml").write_text("arms: [{name: no}]\n")
    assert {"one", "two", "ham", "gated-delta-rule"} <= shipped_models(tmp_path)
    assert "no" not in shipped_models(tmp_path)


def test_every_stage_of_published_rows_is_known():
    found = {
        record["experiment"]
        for path in PUBLISHED.rglob("*.rows.jsonl")
        for record in read_jsonl(path)
    }
    assert found <= set(EXPERIMENTS)


@pytest.mark.parametrize(
    ("key", "received", "legal"),
    [
        ("arm", {"model": "nobody"}, "ham-cosine"),
        ("where", {**TEXT, "experiment": "nothing"}, "needle"),
        ("where", {**TEXT, "metric": "elo"}, "accuracy"),
    ],
)
def test_the_command_ends_with_status_2(
    key: str, received: dict, legal: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_rows(tmp_path / "run/a.rows.jsonl", ROWS)
    claim = {"id": "A", "statement": "s", "source": "s", "expectation": "e"}
    claim |= {"stated": STATED, "tests": [{**make_test(), key: received}]}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"families": {}, "claims": [claim]}))
    assert main(["claims", str(tmp_path / "run"), "--claims", str(file)]) == 2
    printed = capsys.readouterr().err
    assert any(f"'{name}'" in printed for name in ("nobody", "nothing", "elo"))
    assert legal in printed
