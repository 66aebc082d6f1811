"""Are both memories of a layer used? The gates of its branches over held-out text.

A layer with two memories adds its read-outs through two independent gates per head (HAM, Eq.
12-13). Here both gates are read on windows of the training context: their means and quantiles over
tokens and heads, and how large attention's gated read-out is beside the recurrent one. A branch
whose gate stays shut is not used, whatever its memory holds. Training never pays for this: a layer
reports its branches only while `ham.model.two_memories.watched` lasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ham.evaluate.part import CORPUS_TASK, Cell, Fields, Subject
from ham.evaluate.segments import draw_segments
from ham.model.two_memories import BRANCHES, GatedBranches, TwoMemories, watched

EXPERIMENT = "gates"
MOST_TOKENS = 1 << 16
"""Tokens read: of means over tokens and heads the third digit no longer moves."""

QUANTILES = {"gate_p5": 0.05, "gate_p95": 0.95}
_BINS = 2000


def cells(subject: Subject) -> list[Cell]:
    """One cell, of a model with layers of two memories; part of `language_modelling`."""
    settings = subject.config.evaluate.language_modelling
    mixers = two_memory_layers(subject.model)
    if settings is None or not mixers:
        return []
    context = subject.config.data.context
    tokens = min(settings.tokens, MOST_TOKENS)
    segments = draw_segments(subject.test.documents(), context, tokens)
    expected = [
        {"metric": "gate_mean", **coordinates(mixer.shape.layer, branch)}
        for mixer in mixers
        for branch in BRANCHES
    ]
    return [Cell("gates", expected, lambda: gate_rows(subject, [part.tokens for part in segments]))]


def two_memory_layers(model: torch.nn.Module) -> list[TwoMemories]:
    """The layers that have gates, from the bottom up."""
    return [module for module in model.modules() if isinstance(module, TwoMemories)]


def coordinates(layer: int, branch: str | None = None) -> Fields:
    """Where the gates of a layer stand in plots and tables."""
    return {
        "experiment": EXPERIMENT,
        "task": CORPUS_TASK,
        "x_name": "layer",
        "x_value": layer,
        "labels": {} if branch is None else {"branch": branch},
    }


@dataclass
class GateStatistics:
    """What one layer's gates did, over all tokens and heads seen.

    Attributes:
        count: Gate values of one branch.
        sums: By branch, the sum of its gate.
        bins: By branch, how many gates fell into each of equal bins of [0, 1].
        squares: By branch, the sum of squares of its gated read-out.
    """

    count: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 0.0))
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, 0.0))
    bins: dict[str, torch.Tensor] = field(
        default_factory=lambda: {name: torch.zeros(_BINS, dtype=torch.float64) for name in BRANCHES}
    )

    def add(self, seen: GatedBranches) -> None:
        """Count one forward pass; its rows must hold no padding."""
        for name, gate_BTH, gated_BTHV in zip(BRANCHES, seen.gates, seen.gated, strict=True):
            gate_N = gate_BTH.float().flatten()
            self.sums[name] += float(gate_N.double().sum())
            self.bins[name] += torch.histc(gate_N, _BINS, 0.0, 1.0).double().cpu()
            self.squares[name] += float(gated_BTHV.float().square().double().sum())
        self.count += seen.gates[0].numel()

    def mean(self, branch: str) -> float:
        """Mean gate of a branch."""
        return self.sums[branch] / self.count

    def quantile(self, branch: str, share: float) -> float:
        """The middle of the bin in which this share of the gates is reached."""
        reached = self.bins[branch].cumsum(0) >= share * self.count
        return (int(reached.int().argmax()) + 0.5) / _BINS

    @property
    def norm_ratio(self) -> float | None:
        """Root mean square of attention's gated read-out over that of the recurrent one.

        None where the recurrent branch gave nothing.
        """
        recurrent, attention = (self.squares[name] for name in BRANCHES)
        return math.sqrt(attention / recurrent) if recurrent else None


def gate_rows(subject: Subject, windows: Sequence[Sequence[int]]) -> list[Fields]:
    """Rows of all layers: `gate_mean`, its 5 % and 95 % quantiles, `branch_norm_ratio`.

    Args:
        subject: The model.
        windows: Token ids; all of one length, so that no batch has padding.
    """
    layers = {mixer.shape.layer: mixer for mixer in two_memory_layers(subject.model)}
    found = {layer: GateStatistics() for layer in layers}
    with watched({mixer: found[layer].add for layer, mixer in layers.items()}):
        subject.score(windows)
    count = sum(len(window) - 1 for window in windows)
    rows = []
    for layer, statistics in found.items():
        for branch in BRANCHES:
            place = {**coordinates(layer, branch), "n": count}
            rows.append({**place, "metric": "gate_mean", "value": statistics.mean(branch)})
            for metric, share in QUANTILES.items():
                value = statistics.quantile(branch, share)
                rows.append({**place, "metric": metric, "value": value})
        ratio = statistics.norm_ratio
        if ratio is not None:
            place = {**coordinates(layer), "n": count}
            rows.append({**place, "metric": "branch_norm_ratio", "value": ratio})
    return rows
