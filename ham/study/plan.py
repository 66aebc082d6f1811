"""What a grid takes before anything runs: runs by task and width, and device minutes.

A run costs its steps at the measured milliseconds a step and run (`train_step_ms`, several runs
side by side), and a fixed overhead for set-up and evaluation (`overhead_seconds`). Both are means
over measured rows; widths that were not measured are taken to cost the same, because steps of this
size are bound by the number of kernels, and the plan says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ham.errors import MissingDataError
from ham.files import read_json
from ham.fingerprint import repository_root
from ham.report.aggregate import most_common
from ham.report.manifest import manifest_path
from ham.report.rows import Row, read_rows
from ham.report.statistics import mean
from ham.study.config import MqarConfig
from ham.study.grid import chosen_rates, reported_runs, tuning_runs
from ham.study.runs import Run

PUBLISHED = "results/published"


@dataclass(frozen=True)
class MeasuredCost:
    """What a run took where it was measured.

    Attributes:
        step_ms: Milliseconds a training step and run, by width.
        overhead_seconds: Set-up and evaluation of a run; None where rows do not say.
        source: Where that was measured.
    """

    step_ms: dict[int, float]
    overhead_seconds: float | None
    source: str

    def seconds(self, width: int, steps: int) -> float:
        """Device seconds of one run, others side by side."""
        ms = self.step_ms.get(width) or mean(list(self.step_ms.values()))
        return 1e-3 * ms * steps + (self.overhead_seconds or 0.0)


def measured_cost(folder: Path | None) -> MeasuredCost:
    """The cost that the row files of a folder tell; of the study published last by default.

    Raises:
        MissingDataError: If there are no such rows.
    """
    if folder is None:
        folders = sorted((repository_root() / PUBLISHED).glob("*mqar*"))
        if not folders:
            raise MissingDataError(
                f"no published study in {PUBLISHED}; name a folder of row files with --measured"
            )
        folder = folders[-1]
    files = sorted(folder.glob("*.rows.jsonl"))
    rows = read_rows([path for path in files if not _several_processes(path)] or files)
    steps = _values(rows, "train_step_ms")
    if not steps:
        raise MissingDataError(f"{folder} holds no rows of metric 'train_step_ms'")
    overheads = [value for values in _values(rows, "overhead_seconds").values() for value in values]
    labels = [row.labels for row in rows if row.metric == "train_step_ms"]
    together = most_common(one["side_by_side"] for one in labels)
    in_one = most_common(one.get("in_one_program", 1) for one in labels)
    devices = ", ".join(sorted({row.device for row in rows}))
    return MeasuredCost(
        {width: mean(values) for width, values in steps.items()},
        mean(overheads) if overheads else None,
        f"{folder.name} ({devices}, {together} runs side by side, {in_one} in one program)",
    )


def _several_processes(rows_file: Path) -> bool:
    """Whether a command had several processes: the time of each then holds that of the others."""
    manifest = manifest_path(rows_file)
    command = read_json(manifest).get("command", []) if manifest.is_file() else []
    return "--processes" in command and command[command.index("--processes") + 1] != "1"


def format_plan(config: MqarConfig, cost: MeasuredCost) -> str:
    """The plan as text for a terminal."""
    runs = planned_runs(config)
    lines = [
        f"{config.name}: {len(config.arms)} arms, seeds {_list(config.seeds)}; "
        f"{len(config.learning_rates)} rates on seed {config.tuning_seed}",
        f"{config.train.steps} steps a run, {config.train.for_tuning.steps} to choose a rate",
        "",
        f"{'task':<32}{'width':>6}{'tuning runs':>13}{'runs':>6}{'minutes':>9}",
    ]
    for task, width in dict.fromkeys((str(run.task), run.width) for run in runs):
        here = [run for run in runs if (str(run.task), run.width) == (task, width)]
        lines.append(f"{task:<32}{width:>6}{_counts(here, config, cost)}")
    lines += [f"{'total':<38}{_counts(runs, config, cost)}", "", _assumptions(config, cost)]
    return "\n".join(lines)


def planned_runs(config: MqarConfig) -> list[Run]:
    """Every run of the grid; learning rates that are still to be chosen are not told."""
    return [*tuning_runs(config), *reported_runs(config, chosen_rates(config, []))]


def device_minutes(runs: Sequence[Run], config: MqarConfig, cost: MeasuredCost) -> float:
    """Minutes that runs take on one device."""
    train = config.train
    return (
        sum(
            cost.seconds(run.width, (train.for_tuning if run.tuning else train).steps)
            for run in runs
        )
        / 60
    )


def _counts(runs: list[Run], config: MqarConfig, cost: MeasuredCost) -> str:
    tuning = sum(run.tuning for run in runs)
    minutes = device_minutes(runs, config, cost)
    return f"{tuning:>13}{len(runs) - tuning:>6}{minutes:>9.1f}"


def _assumptions(config: MqarConfig, cost: MeasuredCost) -> str:
    step = ", ".join(f"{ms:.2f} ms at width {width}" for width, ms in sorted(cost.step_ms.items()))
    words = [f"measured: {cost.source}, a step and run takes {step}"]
    missing = [width for width in config.widths if width not in cost.step_ms]
    if missing:
        words.append(f"width {_list(missing)} was not measured and is taken to cost the same")
    words.append(
        "set-up and evaluation of a run were not measured and are left out"
        if cost.overhead_seconds is None
        else f"set-up and evaluation take {cost.overhead_seconds:.1f} s a run"
    )
    return ";\n".join(words)


def _values(rows: list[Row], metric: str) -> dict[int, list[float]]:
    """The values of a metric by width."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.metric == metric and row.value is not None:
            found[row.labels["width"]].append(row.value)
    return found


def _list(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
