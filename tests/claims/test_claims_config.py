from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from invented_claims import STATED, TEXT, make_claims, make_test

from ham.claims.config import load_claims, parse_claims, shipped_claims
from ham.errors import ConfigError, MissingDataError


def test_the_shipped_claims_are_valid_and_cover_the_protocol():
    claims = load_claims(shipped_claims())
    ids = {claim.id for claim in claims.claims}
    assert {"P1", "P2", "P3", "P4", "C1", "C2", "C3", "C4", "C5"} <= ids
    assert {"C6-training", "C6-decoding", "C6-memory"} <= ids
    used = {test.family for claim in claims.claims for test in claim.tests} - {None}
    assert used == set(claims.families)
    kinds = {test.test for claim in claims.claims for test in claim.tests}
    assert kinds >= {"superiority", "non_inferiority", "monotone", "timing"}


def test_the_main_comparisons_are_c1_to_c3_alone():
    claims = load_claims(shipped_claims())
    main = {c.id for c in claims.claims for test in c.tests if test.family == "main"}
    assert main == {"C1", "C2", "C3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {**TEXT, "metric": "elo"}}, r"unknown metric; known: .*bits_per_byte.*'elo'"),
        ({"test": "bayes"}, "Input should be 'superiority', 'non_inferiority', 'monotone'"),
        ({"reference": None}, "'superiority' needs a reference"),
        ({"test": "threshold"}, "'threshold' takes no reference"),
        ({"family": "side"}, "unknown family 'side'; known: main"),
        ({"effect": 1}, "effect: unknown key; known: arm, delta"),
        ({"largest_step": 0.5}, "belong to test 'monotone'"),
        ({"test": "timing"}, "delta.unit 'bits per byte' does not fit .* legal: times"),
        (
            {"delta": {"value": 0.1, "unit": "share", "reason": "x"}},
            "legal: bits per byte, relative",
        ),
        ({"delta": {"value": -0.1, "unit": "bits per byte", "reason": "x"}}, "greater than or"),
        ({"delta": {"value": 0.1, "unit": "bits per byte", "reason": ""}}, "at least 1 character"),
    ],
)
def test_what_is_wrong_with_a_test(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        make_claims(make_test(**changes))
    assert str(raised.value).startswith("claims.yaml is not valid:")


def test_a_timing_has_no_family():
    delta = {"value": 1.5, "unit": "times", "reason": "x"}
    with pytest.raises(ConfigError, match="cells, not on seeds: no family"):
        make_claims(make_test(test="timing", delta=delta, family="main"))


def test_a_timing_has_one_reference():
    delta = {"value": 1.5, "unit": "times", "reason": "x"}
    two = [{"model": "a"}, {"model": "b"}]
    with pytest.raises(ConfigError, match="a timing has one reference"):
        make_claims(make_test(test="timing", delta=delta, reference=two))


def test_ids_differ_and_a_time_has_a_zone():
    claim = {
        "id": "A",
        "statement": "s",
        "source": "s",
        "expectation": "e",
        "stated": STATED,
        "tests": [make_test()],
    }
    with pytest.raises(ConfigError, match=r"ids of claims must differ; received \['A', 'A'\]"):
        parse_claims({"families": {}, "claims": [claim, claim]}, "c")
    claim["stated"] = STATED.replace(tzinfo=None)
    with pytest.raises(ConfigError, match="stated: needs a time zone"):
        parse_claims({"families": {}, "claims": [claim]}, "c")


def test_files(tmp_path: Path):
    with pytest.raises(MissingDataError, match="does not exist"):
        load_claims(tmp_path / "no.yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"families": {}, "claims": []}))
    with pytest.raises(ConfigError, match="claims: List should have at least 1 item"):
        load_claims(tmp_path / "c.yaml")
