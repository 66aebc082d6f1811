"""The shipped claims on rows as tier A, the study and the sweeps leave them, all invented.

Whether every query finds the arms, tasks and labels that the configurations give their rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from invented_claims import make_row, observed, timing_rows

from ham.claims.config import load_claims, shipped_claims
from ham.claims.evidence import Observation
from ham.claims.judge import INCONCLUSIVE, NOT_RUN, JudgedClaim, judge
from ham.config_files import load_config
from ham.fingerprint import repository_root
from ham.report.rows import Row
from ham.study.config import load_mqar_config

FOLDER = repository_root() / "workflow/config"


def level(index: int, seed: int) -> float:
    """A score that arms differ in by more than seeds do."""
    return 0.5 + 0.01 * index + 0.001 * seed * (-1) ** index


def tier_a_rows() -> Iterator[Row]:
    config = load_config(FOLDER / "h100.yaml")
    for index, arm in enumerate(config.arms):
        seeds = config.seeds_of(arm)
        for seed in seeds:
            common = {"model": arm.name, "seed": seed, "kv_fraction": arm.options.get("target")}
            value = level(index, seed)
            yield make_row(value=value, **common)
            recall = {"experiment": "recall", "x_name": "pairs", "x_value": 64.0}
            yield make_row(value=value, metric="accuracy", **recall, **common)
            needle = {"experiment": "needle", "x_name": "length", "x_value": 2048.0}
            labels = {"depth": 0.5}
            yield make_row(value=value, metric="accuracy", labels=labels, **needle, **common)
            flops = {"experiment": "train", "metric": "training_flops"}
            yield make_row(value=value * 1e15, **flops, **common)
            for x in config.evaluate.dial.fractions if arm.mixer == "ham" else ():
                loss = 2 - x / 10 + seed / 100
                yield make_row(value=loss, experiment="dial", x_value=x, **common)
        size = {"experiment": "memory", "metric": "cache_bytes_allocated", "task": "decode"}
        share = arm.options.get("target")
        yield make_row(arm.name, 1e6, seeds[0], x_value=2048.0, kv_fraction=share, **size)


def study_rows() -> Iterator[Row]:
    config = load_mqar_config(FOLDER / "mqar.yaml")
    for task in config.reported_tasks:
        labels = {"filler": task.filler, "layout": task.layout, "variant": task.variant}
        for index, arm in enumerate(config.arms):
            for seed in config.seeds:
                for size in config.sizes(task):
                    yield make_row(
                        arm.name,
                        level(index, seed),
                        seed,
                        experiment="mqar",
                        metric="accuracy",
                        task=str(size),
                        x_value=float(size.pairs),
                        kv_fraction=0.25,
                        labels={**labels, "width": 64, "learning_rate": 0.003},
                    )


def speed_rows() -> Iterator[Row]:
    names = {"ours": "ham", "theirs": "transformer"}
    for experiment in ("model_train", "model_decode"):
        for batch in (1, 2, 4):
            for row in timing_rows(4.0, batch, experiment=experiment, x_value=8192.0):
                routed = {"fraction": 0.25, "routing": "forced"} if row.model == "ours" else {}
                labels = {**row.labels, "head_dim": 64, **routed}
                yield row.model_copy(update={"model": names[row.model], "labels": labels})


@pytest.fixture(scope="module")
def evidence() -> list[Observation]:
    tiers = [*tier_a_rows(), *study_rows()]
    return observed(tiers, "published/union") + observed([*speed_rows()], "published/speed")


def ledger(evidence: list[Observation]) -> dict[str, JudgedClaim]:
    return {one.claim.id: one for one in judge(load_claims(shipped_claims()), evidence)}


def test_every_claim_but_that_of_tier_c_is_tested(evidence: list[Observation]):
    judged = ledger(evidence)
    assert [name for name, one in judged.items() if one.verdict == NOT_RUN] == ["C4"]
    for name, claim in judged.items():
        for test in claim.tests:
            assert name in ("C1", "C4") or (test.n >= 3 and not test.blocked), (name, test.reason)


def test_pairs_are_not_compared_at_the_bytes_of_longer_texts(evidence: list[Observation]):
    judged = ledger(evidence)
    assert judged["C1"].verdict == INCONCLUSIVE
    for test in judged["C1"].tests:
        assert "bytes differ on this task: they were matched at 2,048 tokens" in test.reason
    assert all(not test.blocked for test in judged["C1-length"].tests)


def test_routed_arms_are_compared_at_equal_shares():
    """Every comparison among arms that route demands it, or the larger cache might win."""
    routed = {arm.name for arm in load_config(FOLDER / "h100.yaml").arms if arm.mixer == "ham"}
    for claim in load_claims(shipped_claims()).claims:
        for test in claim.tests:
            if {side.name for side in test.reference} <= routed and test.reference:
                assert test.same_fraction.reason, (claim.id, test.name)


def test_the_seven_trained_shares_are_no_main_claim(evidence: list[Observation]):
    judged = ledger(evidence)
    (test,) = judged["C4"].tests
    assert test.test.family is None
    assert "'ham-cosine-0'; there are: " in test.reason
    main = [test for one in judged.values() for test in one.tests if test.test.family == "main"]
    assert len(main) == 5
    assert all(test.effect is not None and test.n >= 3 for test in main)


def test_an_arm_that_is_missing_leaves_its_claim_untested(evidence: list[Observation]):
    judged = ledger([one for one in evidence if one.row.model != "ham-lexical"])
    assert judged["C3"].verdict == NOT_RUN
    assert "with model 'ham-lexical'" in judged["C3"].tests[0].reason
    assert judged["C2"].verdict != NOT_RUN
