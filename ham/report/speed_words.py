"""Speed in words: how `ham measure` launched the models, and what they cost against a reference.

`ham measure` times the models of a run, one sequence at a time, as they are launched; sweeps time
larger models of the same architecture with CUDA graphs. The two say different things, so every
sentence names its launch mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ham.claims.evidence import Evidence, Observation
from ham.report import formats
from ham.report.aggregate import Results
from ham.report.formats import join_words
from ham.report.plots_cost import speed_points
from ham.report.rows import Row

LAUNCHED = {
    "eager": "launched eagerly",
    "compiled": "compiled",
    "cuda_graph": "replayed as CUDA graphs",
}
GRAPH = "cuda_graph"
TRAIN, DECODE = "model_train", "model_decode"
# What sweeps call the two models that are compared.
SWEPT, SWEPT_REFERENCE = "ham", "transformer"
ROUTING = "forced"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the reference, and where."""

    value: float
    context: float
    batch: int

    @property
    def words(self) -> str:
        """`0.85 times (1,024 tokens, batch 32)`."""
        return f"{self.value:.2f} times ({self.context:,.0f} tokens, batch {self.batch})"


def launch_words(results: Results) -> str:
    """How `ham measure` launched, with the batch; empty without its rows."""
    rows = [row for row in results.rows if row.experiment == "throughput" and row.value is not None]
    if not rows:
        return ""
    modes = sorted({row.launch_mode for row in rows})
    batches = sorted({int(row.labels["batch_size"]) for row in rows if "batch_size" in row.labels})
    parts = [join_words([LAUNCHED[mode] for mode in modes])]
    if batches == [1]:
        parts.append("one sequence")
    elif batches:
        parts.append(f"batch {join_words([str(batch) for batch in batches])}")
    if GRAPH not in modes:
        parts.append("without CUDA graphs")
    return ", ".join(parts)


def speed_note(results: Results, evidence: Evidence) -> str:
    """How the speeds of a table were launched, and where those of decoding in earnest are."""
    launched = launch_words(results)
    if not launched:
        return ""
    note = f"{launched[0].upper()}{launched[1:]}."
    sweeps = sorted({Path(one.run).name for one in _swept(evidence.observations, DECODE)})
    if sweeps and GRAPH not in launched:
        places = join_words([f"`evidence/{name}`" for name in sweeps])
        note += (
            " Such times hold the launch of every kernel; the place for decoding speed is the "
            f"sweep with CUDA graphs ({places}, page `sweep.md` of the same name)."
        )
    return note


def measured_ratio(
    results: Results, model: str, reference: str, task: str
) -> tuple[float, float] | None:
    """Speed against the reference at the longest context that both have, and that context."""
    ours, theirs = (
        {point.x: point.cell.value for point in speed_points(results, name, task)}
        for name in (model, reference)
    )
    shared = [x for x in ours if ours[x] and theirs.get(x)]
    if not shared:
        return None
    return ours[max(shared)] / theirs[max(shared)], max(shared)


def measured_words(results: Results, model: str, reference: str) -> str:
    """Training and decoding against the reference, as `ham measure` has them."""
    words = {"train": "a training step runs at", "decode": "decoding at"}
    found = {task: measured_ratio(results, model, reference, task) for task in words}
    parts = [f"{words[task]} {ratio[0]:.2f}" for task, ratio in found.items() if ratio is not None]
    if not parts:
        return ""
    context = next(ratio[1] for ratio in found.values() if ratio is not None)
    launched = launch_words(results)
    return (
        f"{launched[0].upper()}{launched[1:]}, at {context:,.0f} tokens: {join_words(parts)} times "
        f"the speed of {reference}."
    )


def swept_words(evidence: Evidence, share: float) -> str:
    """The same two with CUDA graphs: the slowest and the fastest place of the latest sweep."""
    titles = {TRAIN: "training", DECODE: "decoding"}
    parts, sizes = [], []
    for experiment, title in titles.items():
        latest = _latest(_swept(evidence.observations, experiment))
        ratios = sorted(sweep_ratios(latest, share), key=lambda ratio: ratio.value)
        if not ratios:
            continue
        sizes += [row.parameters for row in latest if row.parameters]
        ends = f"{ratios[0].words} to {ratios[-1].words}" if len(ratios) > 1 else ratios[0].words
        parts.append(f"{title} at {ends}")
    if not parts:
        return ""
    size = f" of {formats.parameters(max(sizes))} parameters" if sizes else ""
    return (
        f"With CUDA graphs, in a sweep over models{size} that are forced to route "
        f"{formats.share(share)}: {join_words(parts)} the transformer's speed."
    )


def sweep_ratios(rows: Sequence[Row], share: float) -> list[Ratio]:
    """Speed at a routed share against the transformer, wherever both were measured alike."""
    fastest: dict[tuple, float] = {}
    for row in rows:
        if row.model == SWEPT_REFERENCE:
            key = _place(row)
            fastest[key] = min(row.value, fastest.get(key, row.value))
    return [
        Ratio(fastest[_place(row)] / row.value, row.x_value, row.labels["batch"])
        for row in rows
        if row.model == SWEPT
        and row.labels.get("fraction") == share
        and row.labels.get("routing") == ROUTING
        and _place(row) in fastest
    ]


def _place(row: Row) -> tuple:
    return row.x_value, row.labels["batch"], row.labels.get("head_dim"), row.labels.get("heads")


def _swept(observations: Iterable[Observation], experiment: str) -> list[Observation]:
    """What sweeps timed with CUDA graphs."""
    return [
        one
        for one in observations
        if one.row.experiment == experiment
        and one.row.metric == "median_ms"
        and one.row.launch_mode == GRAPH
        and one.row.value is not None
    ]


def _latest(observations: Sequence[Observation]) -> list[Row]:
    """The rows of the latest run: faster kernels replace slower ones, runs are never mixed."""
    if not observations:
        return []
    last = max(
        observations,
        key=lambda one: (one.started.timestamp() if one.started else 0.0, Path(one.run).name),
    )
    return [one.row for one in observations if one.run == last.run]
