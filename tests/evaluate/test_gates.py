"""Gates over held-out text: hand-worked statistics, and models whose gates are set by hand."""

from __future__ import annotations

import math

import pytest
import torch
from stand_ins import UniformModel

from ham.evaluate.gates import GateStatistics, cells, gate_rows, two_memory_layers
from ham.model.two_memories import GatedBranches, watched

SETTINGS = {"language_modelling": {"tokens": 1000, "contexts": [64]}}
RECURRENT, ATTENTION = 0.8, 0.1


def logit(gate: float) -> float:
    return math.log(gate / (1 - gate))


@pytest.fixture
def set_gates(tiny_model):
    """A model whose gates are the same for every token."""

    def make(mixer: str = "ham", **options):
        model = tiny_model(mixer, **options)
        for layer in two_memory_layers(model):
            heads = layer.shape.heads
            layer.branch_gates.weight.data.zero_()
            layer.branch_gates.bias.data[:heads] = logit(RECURRENT)
            layer.branch_gates.bias.data[heads:] = logit(ATTENTION)
        return model

    return make


def by_place(rows: list[dict], metric: str) -> dict:
    return {
        (row["x_value"], row["labels"].get("branch")): row["value"]
        for row in rows
        if row["metric"] == metric
    }


@pytest.mark.parametrize("mixer", ["ham", "gated_delta_rule_window"])
def test_gates_set_by_hand_are_found(make_subject, set_gates, mixer: str) -> None:
    subject = make_subject(set_gates(mixer), SETTINGS)
    (cell,) = cells(subject)
    rows = cell.run()
    wanted = {(layer, "recurrent"): RECURRENT for layer in (0, 1)}
    wanted |= {(layer, "attention"): ATTENTION for layer in (0, 1)}
    assert by_place(rows, "gate_mean") == pytest.approx(wanted, abs=1e-6)
    for metric in ("gate_p5", "gate_p95"):
        assert by_place(rows, metric) == pytest.approx(wanted, abs=1e-3)
    assert {row["n"] for row in rows} == {7 * 128}
    expected = {(row["x_value"], row["labels"]["branch"]) for row in cell.expected}
    assert expected == set(wanted)


def test_the_ratio_of_branches_follows_norms_and_gates(make_subject, set_gates) -> None:
    """What the first layer reads does not depend on its gates or the gains of its norms."""

    def first_ratio(gain: float, gate: float) -> float:
        model = set_gates()
        layer = two_memory_layers(model)[0]
        layer.attention_norm.weight.data.fill_(gain)
        layer.branch_gates.bias.data[layer.shape.heads :] = logit(gate)
        rows = cells(make_subject(model, SETTINGS))[0].run()
        return by_place(rows, "branch_norm_ratio")[0, None]

    plain = first_ratio(1.0, ATTENTION)
    assert plain > 0
    assert first_ratio(3.0, ATTENTION) == pytest.approx(3 * plain)
    assert first_ratio(1.0, 2 * ATTENTION) == pytest.approx(2 * plain)


def test_an_empty_cache_gives_nothing(make_subject, set_gates) -> None:
    model = set_gates(target=0.0)
    for layer in two_memory_layers(model):
        layer.controller.threshold.fill_(math.inf)
    rows = cells(make_subject(model, SETTINGS))[0].run()
    assert by_place(rows, "branch_norm_ratio") == {(0, None): 0.0, (1, None): 0.0}
    assert by_place(rows, "gate_mean")[0, "attention"] == pytest.approx(ATTENTION, abs=1e-6)


def test_statistics_by_hand() -> None:
    """Two batches, one head: gates 0.1 0.2 0.3 and 0.8; read-outs of squares 4 and 1, 3 and 0."""
    statistics = GateStatistics()
    for gates, recurrent, attention in (
        ([0.1, 0.2, 0.3], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]),
        ([0.8], [math.sqrt(3)], [0.0]),
    ):
        gate = torch.tensor(gates)[None, :, None]
        gated = tuple(torch.tensor(part)[None, :, None, None] for part in (recurrent, attention))
        statistics.add(GatedBranches((gate, 1 - gate), gated))
    assert statistics.count == 4
    assert statistics.mean("recurrent") == pytest.approx(0.35)
    assert statistics.mean("attention") == pytest.approx(0.65)
    assert statistics.quantile("recurrent", 0.5) == pytest.approx(0.2, abs=1e-3)
    assert statistics.quantile("recurrent", 0.95) == pytest.approx(0.8, abs=1e-3)
    assert statistics.norm_ratio == pytest.approx(math.sqrt(1 / 7))


def test_watching_changes_no_output_and_ends(tiny_model) -> None:
    model = tiny_model("ham").eval()
    tokens_BT = torch.arange(60).reshape(2, 30)
    before = model(tokens_BT).logits_BTV
    seen = []
    layer = two_memory_layers(model)[0]
    with watched({layer: seen.append}):
        assert torch.equal(model(tokens_BT).logits_BTV, before)
    (branches,) = seen
    mixed = layer.out((branches.gated[0] + branches.gated[1]).flatten(-2))
    x_BTD = model.blocks[0].mixer_norm(model.embedding(tokens_BT))
    y_BTD, _ = model.blocks[0].mixer(x_BTD)
    assert torch.allclose(mixed, y_BTD, atol=1e-6)
    model(tokens_BT)
    assert len(seen) == 1


def test_models_without_gates_have_no_cell(make_subject, tiny_model) -> None:
    for model in (UniformModel(), tiny_model("transformer"), tiny_model("gated_delta_rule")):
        assert cells(make_subject(model, SETTINGS)) == []
    assert cells(make_subject(tiny_model("ham"), {"language_modelling": None})) == []


def test_both_halves_of_the_text_count_alike(make_subject, tiny_model) -> None:
    subject = make_subject(tiny_model("ham"), SETTINGS)
    windows = [list(range(start, start + 33)) for start in (0, 90)]
    whole, *parts = (
        by_place(gate_rows(subject, some), "gate_mean")
        for some in (windows, windows[:1], windows[1:])
    )
    for place, value in whole.items():
        assert value == pytest.approx((parts[0][place] + parts[1][place]) / 2)
