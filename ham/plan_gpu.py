"""Minutes of an experiment on one H100: job by job, as `ham batch` will run them.

Training time comes from rows of the same arm, shape and batch where an earlier run left some, else
from the arm's arithmetic and a share of the device's peak. The shares and the fixed times were
measured at 5 M parameters (context 2,048, 32 sequences a step, compiled, one CUDA graph): 14.7 ms a
step of the transformer, 20 to 27 ms of HAM. Wider models use the device better; their shares are
assumed, and the plan says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ham.batch.studies import study_parts
from ham.batch.tasks import Task, Tasks
from ham.config import ArmConfig, Config
from ham.files import read_jsonl, stable_hash
from ham.plan_schedule import SHARED_GAIN, Process, study_processes, wall_minutes
from ham.report.manifest import manifest_path, read_manifest
from ham.workflow import CONFIG_COPY, run_folder

if TYPE_CHECKING:
    from ham.plan import ArmCost

PEAK_FLOPS = 989e12
DEVICE = "H100"
SPEED_METRIC = "steady_tokens_per_second"
TRAIN_ROWS = ("published/*/*-train.rows.jsonl", "runs/*/models/*/seed*/train.rows.jsonl")

# Share of the peak in training by least width: of the transformer, of every other mixer.
SHARES = ((1024, 0.40, 0.20), (512, 0.30, 0.15), (0, 0.22, 0.10))
ATTENTION = "transformer"
# Weights, gradients and the two moments of AdamW in float32.
STATE_BYTES_PER_PARAMETER = 16
# Of a training step by token, layer and channel: peaks of the sweep's models of 184 M parameters
# (results/published/2026-11-25-h100-decode) without the states above, logits included.
ACTIVATION_BYTES = {True: 41, False: 65}
# Forward passes outside of training are not compiled.
EAGER_SHARE = 0.05
PROCESS_SECONDS = 20.0
COMPILE_SECONDS = 40.0
CACHED_COMPILE_SECONDS = 9.0
JOB_SECONDS = 1.5
# Scores, intervals and lm-eval on the host, for one model.
EVALUATION_SECONDS = 6.0
MEASURED_CELL_SECONDS = 2.0


@dataclass(frozen=True)
class TaskCost:
    """Seconds of one job on the GPU, and the process it runs in."""

    task: Task
    seconds: float
    batch: int


class GpuTimes:
    """Estimates for every job of a configuration.

    Args:
        config: The experiment.
        arms: Arithmetic of each arm.
        results: Folder with earlier results.
    """

    def __init__(self, config: Config, arms: Sequence[ArmCost], results: Path = Path("results")):
        self.config = config
        self.arms = {arm.name: arm for arm in arms}
        self.tasks = Tasks(config, f"{run_folder(config)}/{CONFIG_COPY}")
        self.measured = measured_speeds(results)

    @cached_property
    def costs(self) -> list[TaskCost]:
        """Every job in order; what a process pays once is added to its first job."""
        costs, compiled = [], set()
        for number, batch in enumerate(self.tasks.batches):
            here: set[str] = set()
            for index, task in enumerate(batch):
                seconds = self._seconds(task) + (0.0 if index else PROCESS_SECONDS)
                if task.stage == "train" and self.config.train.compile and task.arm not in here:
                    arm = self.config.arm(task.arm)
                    # Arms that share a learning rate are of one architecture.
                    known = self.config.tuned_as(arm).name
                    cached = known in compiled
                    seconds += CACHED_COMPILE_SECONDS if cached else COMPILE_SECONDS
                    compiled.add(known)
                    here.add(task.arm)
                costs.append(TaskCost(task, seconds, number))
        return costs

    def minutes(self, stage: str, tuning: bool = False) -> float:
        """Of all jobs of a stage."""
        chosen = [
            cost.seconds
            for cost in self.costs
            if cost.task.stage == stage and (cost.task.rate is not None) == tuning
        ]
        return sum(chosen) / 60

    def arm_minutes(self, name: str) -> float:
        """Of all jobs of an arm, by seed."""
        seeds = len(self.config.seeds_of(self.config.arm(name)))
        return sum(cost.seconds for cost in self.costs if cost.task.arm == name) / 60 / seeds

    @property
    def batch_minutes(self) -> list[float]:
        """Of a GPU, by process."""
        found: dict[int, float] = defaultdict(float)
        for cost in self.costs:
            gain = 1 if self.tasks.is_alone(cost.batch) else SHARED_GAIN
            found[cost.batch] += cost.seconds / 60 / gain
        return [found[number] for number in sorted(found)]

    @property
    def shares(self) -> int:
        """Into which a GPU is divided."""
        return self.config.workflow.processes_per_gpu

    @cached_property
    def processes(self) -> list[Process]:
        """Every process of the pipeline that takes a GPU, in the order of their priorities."""
        batches = []
        for number, batch in enumerate(self.tasks.batches):
            taken = self.shares if self.tasks.is_alone(number) else 1
            batches.append(
                Process(
                    f"{batch[0].name} to {batch[-1].name}",
                    self.batch_minutes[number] * self.shares / taken,
                    tuple(self.tasks.earlier_batches(number)),
                    len(batch),
                    taken,
                )
            )
        parts = study_parts(self.config) if self.config.workflow.studies else []
        return batches + (study_processes(parts, self.shares) if parts else [])

    def tokens_per_second(self, name: str) -> tuple[float, bool]:
        """Training speed of an arm, and whether it was measured."""
        arm, train = self.config.arm(name), self.config.training(self.config.arm(name))
        known = self.measured.get(_shape(self.config.model_dump(mode="json"), arm))
        if known is not None:
            return known, True
        flops = self.arms[name].train_flops / (train.steps * train.batch_size)
        return self.config.data.context * self.share(arm) * PEAK_FLOPS / flops, False

    def share(self, arm: ArmConfig) -> float:
        """Assumed share of the peak in training."""
        return next(
            attention if only_attention(arm) else other
            for width, attention, other in SHARES
            if self.config.model.width >= width
        )

    def _seconds(self, task: Task) -> float:
        cost = self.arms[task.arm]
        eager = EAGER_SHARE * PEAK_FLOPS
        if task.stage == "evaluate":
            return JOB_SECONDS + EVALUATION_SECONDS + cost.evaluate_flops / eager
        if task.stage == "measure":
            assert self.config.measure is not None
            cells = len(self.config.measure.contexts) * 3 + 1
            return JOB_SECONDS + cells * MEASURED_CELL_SECONDS + cost.measure_flops / eager
        if task.stage != "train":
            return 0.0 if task.stage == "tune" else JOB_SECONDS
        train = self.config.training(self.config.arm(task.arm))
        steps = train.steps
        if task.rate is not None and self.config.tuning is not None:
            steps = self.config.tuning.steps or steps
        tokens = steps * train.batch_size * self.config.data.context
        return JOB_SECONDS + tokens / self.tokens_per_second(task.arm)[0]


def only_attention(arm: ArmConfig) -> bool:
    """Whether every layer is plain attention."""
    return arm.mixers == [ATTENTION]


def training_memory(config: Config, arm: ArmConfig, parameters: int) -> int:
    """Bytes on the GPU while `arm` trains: states, and activations of one micro-batch."""
    tokens = config.data.context * config.train.batch_size // config.train.accumulate
    channels = tokens * config.model.layers * config.model.width
    activations = channels * ACTIVATION_BYTES[only_attention(arm)]
    return STATE_BYTES_PER_PARAMETER * parameters + activations


def measured_speeds(results: Path) -> dict[str, float]:
    """Median steady training speed on an H100 of each arm, shape and batch that rows tell of."""
    found = defaultdict(list)
    for pattern in TRAIN_ROWS:
        for path in sorted(results.glob(pattern)):
            speeds = [
                row["value"]
                for row in read_jsonl(path)
                if row["metric"] == SPEED_METRIC
                and DEVICE in row["device"]
                and row["value"]
                and "gpu_processes" not in row["labels"]
            ]
            if speeds and manifest_path(path).is_file():
                config = read_manifest(manifest_path(path)).get("config", {})
                name = read_jsonl(path)[0]["model"]
                arm = next((arm for arm in config.get("arms", []) if arm["name"] == name), None)
                if arm is not None:
                    found[_shape(config, ArmConfig.model_validate(arm))] += speeds
    return {shape: median(speeds) for shape, speeds in found.items()}


def _shape(config: Mapping[str, Any], arm: ArmConfig) -> str:
    """What decides the speed of training: the arm's layers, the model's shape, batch, precision."""
    train = {key: config["train"][key] for key in ("batch_size", "accumulate", "compile")}
    layers = arm.model_dump(mode="json", include={"mixer", "options", "placement"})
    return stable_hash([layers, config["model"], config["data"]["context"], train])


def format_batches(times: GpuTimes, gpus: int) -> list[str]:
    """Lines on processes, on wall time and on where speeds are from.

    Raises:
        ConfigError: For fewer than one GPU.
    """
    lines = []
    if times.config.workflow.jobs_per_process > 1:
        lines = ["", f"{'process':<9}{'jobs':>5}{'minutes':>9}  what"]
        lines += [
            f"{number:<9}{one.jobs:>5}{one.minutes:>9.1f}  {one.name}"
            for number, one in enumerate(times.processes)
        ]
        lines.append(f"{'in all':<14}{sum(one.minutes for one in times.processes):>9.1f}")
    lines.append("")
    for count in sorted({1, gpus}):
        minutes = wall_minutes(times.processes, count, times.shares)
        lines.append(f"wall time with {count} GPU{'s'[: count > 1]}: {minutes:,.1f} minutes")
    lines.append("")
    for arm in times.config.arms:
        if arm.trained:
            speed, measured = times.tokens_per_second(arm.name)
            source = "measured" if measured else f"assumed: {times.share(arm):.0%} of the peak"
            lines.append(f"{arm.name}: {speed / 1e6:.2f} M tokens/s in training ({source})")
    return lines
