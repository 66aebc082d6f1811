"""Decisions of every way to read a text: equal in float32, near the threshold in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_device import CUDA, DEVICE

from ham.cli import main
from ham.decoding.stepper import EagerStepper
from ham.errors import ConfigError, RoutingError
from ham.inspect.agreement import NEAR, Agreement, Pair, Reading, agreement, compare
from ham.inspect.agreement_table import agreement_lines
from ham.model.checkpoint import save_model
from ham.report.rows import read_rows

REFERENCE = "parallel in float32"
UNIT_ROUNDOFF = 2.0**-8
"""Of bfloat16, with its eight bits of precision."""


def ids(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def pair_of(found: Agreement, second: str, first: str = REFERENCE) -> Pair:
    return next(
        pair for pair in found.pairs if (pair.first.name, pair.second.name) == (first, second)
    )


def move_threshold(model: Any, layer: int, value: float) -> None:
    model.blocks[layer].mixer.controller.threshold.fill_(value)


def move_thresholds_into_gaps(model: Any, tokens: list[int]) -> None:
    """Bottom up, to the middle of the widest gap between scores near the 70 % quantile."""
    for layer in range(len(model.blocks)):
        with torch.no_grad():
            aux = model(torch.tensor([tokens])).aux[layer]
        score = aux.score_BT if aux.score_BTH is None else aux.score_BTH
        score_N = score.flatten().sort().values
        score_N = score_N[int(0.6 * len(score_N)) : int(0.8 * len(score_N))]
        widest = int(score_N.diff().argmax())
        move_threshold(model, layer, float(score_N[widest : widest + 2].mean()))


@pytest.mark.parametrize(
    ("pieces", "options"),
    [(1, {}), (7, {"window": 5}), (64, {"reduction": "per_head"}), (200, {"score": "committed"})],
)
def test_every_way_decides_the_same_in_float32(tiny_model: Callable, pieces: int, options: dict):
    model = tiny_model("ham", **options)
    move_thresholds_into_gaps(model, ids(100))
    found = agreement(model, ids(100), pieces=pieces, precision="float32")
    reference = found.readings[0]
    for layer, score_TG in reference.scores.items():
        threshold = found.thresholds[layer]
        assert torch.equal(reference.kept[layer], score_TG >= threshold)
        assert (score_TG - threshold).abs().min() > 1e-4
        assert 0.1 < reference.kept[layer].double().mean() < 0.6
    names = [REFERENCE, f"pieces of {pieces}", "steps"]
    assert [reading.name for reading in found.readings] == names
    assert len(found.pairs) == 3
    for pair in found.pairs:
        assert [flips.flips for flips in pair.layers] == [0, 0]
        assert pair.logit_difference < 1e-4


def test_flips_in_bfloat16_are_near_the_threshold(tiny_model: Callable):
    """Rounding moves a score of the first layer by at most 32 unit roundoffs.

    To first order, in norms, and as long as no sum cancels: the cosine moves by no more than
    the relative changes of v and of the prediction together. v is rounded 6 times: input, weight
    and product of the projection, weight and sum of the convolution, silu. The prediction sums
    beta v (k . k) with decays: v 6 times, each key 7 times (also at its norm), beta and decay 3
    times each. That is 6 + 6 + 14 + 6 = 32.
    """
    model = tiny_model("ham")
    first = agreement(model, ids(200), [0], precision="bfloat16", pieces=48)
    wide_TG, narrow_TG = (reading.scores[0] for reading in first.readings[:2])
    # Where the scores of one token differ, between them: this token must flip.
    token = int((wide_TG - narrow_TG).abs().argmax())
    move_threshold(model, 0, float(wide_TG[token] + narrow_TG[token]) / 2)
    found = agreement(model, ids(200), [0], precision="bfloat16", pieces=48)
    narrow = "parallel in bfloat16"
    assert [reading.name for reading in found.readings[1:]] == [narrow, "pieces of 48", "steps"]
    (flips,) = pair_of(found, narrow).layers
    crossed_TG = (wide_TG >= found.thresholds[0]) != (narrow_TG >= found.thresholds[0])
    assert flips.flips == int(crossed_TG.sum()) > 0
    assert flips.distance > 0
    for pair in found.pairs:
        assert all(flips.distance <= 32 * UNIT_ROUNDOFF for flips in pair.layers)
    assert found.readings[1].logits_TV.dtype == torch.bfloat16


def test_a_step_that_decides_otherwise_is_reported(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
):
    model, shift = tiny_model("ham"), 0.05
    threshold = float(model.controllers[0].threshold)
    right_step = EagerStepper.step

    def wrong_step(stepper: EagerStepper, tokens_B: torch.Tensor) -> torch.Tensor:
        move_threshold(model, 0, threshold + shift)
        logits_BV = right_step(stepper, tokens_B)
        move_threshold(model, 0, threshold)
        return logits_BV

    monkeypatch.setattr(EagerStepper, "step", wrong_step)
    found = agreement(model, ids(200), precision="float32", pieces=64)
    score_TG = found.readings[0].scores[0]
    between_TG = (score_TG >= threshold) & (score_TG < threshold + shift)
    expected = int(between_TG.sum())
    flips = pair_of(found, "steps").layers[0]
    assert flips.flips == expected > 3
    assert flips.distance == float((score_TG - threshold)[between_TG].max())
    assert pair_of(found, "steps").logit_difference > 1e-3
    assert pair_of(found, "steps", "pieces of 64").layers[0] == flips
    assert pair_of(found, "pieces of 64").layers[0].flips == 0
    line = next(line for line in agreement_lines(found) if line.startswith("steps against par"))
    assert line.split("float32")[1].split()[:2] == [str(expected), f"({flips.distance:.2g})"]


def test_compare_by_hand():
    def reading(kept: list, scores: list, logit: float) -> Reading:
        kept_TG, score_TG = torch.tensor(kept, dtype=torch.bool), torch.tensor(scores)
        logits_TV = torch.tensor([[0.0, 0.0], [0.0, logit]])
        return Reading("steps", "float32", "eager", logits_TV, {3: kept_TG}, {3: score_TG})

    first = reading([[1, 0], [1, 1]], [[0.75, 0.25], [0.5, 1.0]], 1.0)
    second = reading([[0, 1], [1, 0]], [[9.0, 9.0], [9.0, 9.0]], -1.5)
    pair = compare(first, second, {3: 0.5})
    (flips,) = pair.layers
    assert (flips.layer, flips.flips, flips.distance, flips.fraction) == (3, 3, 0.5, 0.5)
    assert pair.logit_difference == 2.5


def test_fused_steps(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = agreement(tiny_model("ham").to(DEVICE), ids(8), precision="float32", pieces=5)
    assert found.fused_refusal is None
    assert found.readings[-1].name == "fused steps"
    assert 0 < found.readings[-1].kept[0].sum() < 8
    for pair in found.pairs:
        assert [flips.flips for flips in pair.layers] == [0, 0]
        assert pair.logit_difference < 1e-4


def test_the_command(tiny_model: Callable, tmp_path: Path, capsys: Any):
    model, text, rows_file = tmp_path / "ham", tmp_path / "text.txt", tmp_path / "out.rows.jsonl"
    save_model(model, tiny_model("ham"))
    text.write_text("The whale. " * 5)
    command = ["inspect", str(model), "--text", str(text), "--top", "0", "--precision", "float32"]
    assert main([*command, "--agreement", "--pieces", "9", "--rows", str(rows_file)]) == 0
    out = capsys.readouterr().out
    assert "55 tokens read in 3 ways, in float32: parallel in float32, pieces of 9, steps" in out
    assert "no fused steps: Triton cannot run on cpu" in out
    assert f"within {NEAR:g}" in out
    rows = [row for row in read_rows(rows_file) if row.experiment == "agreement"]
    # Three pairs of two layers with three numbers each, and one for the logits.
    assert len(rows) == 3 * (2 * 3 + 1)
    flips = [row for row in rows if row.metric == "flips"]
    assert {row.value for row in flips} == {0.0} and {row.n for row in flips} == {55}
    assert {row.labels["layer"] for row in flips} == {0, 1}
    assert {row.labels["form"] for row in rows} == {"pieces of 9", "steps"}
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert {row.manifest_id for row in rows} == {manifest["manifest_id"]}
    assert main([*command, "--pieces", "9"]) == 2
    assert "--pieces 9 goes with --agreement, which is not given" in capsys.readouterr().err


def test_mistakes(tiny_model: Callable):
    with pytest.raises(ConfigError, match="pieces must be of at least 1 token, received 0"):
        agreement(tiny_model("ham"), [1], pieces=0)
    with pytest.raises(ConfigError, match=r"layer 0 has budget 'bounded'.*legal: 'threshold'"):
        agreement(tiny_model("ham", budget="bounded", slots=4), [1])
    broken = tiny_model("ham")
    with torch.no_grad():
        broken.blocks[1].mixer.qkv.weight.fill_(torch.nan)
    with pytest.raises(RoutingError, match="layer 1"):
        agreement(broken, [1, 2, 3])
