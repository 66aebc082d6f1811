"""What an experiment will cost, computed before anything runs.

Arithmetic comes from the mixers' own cost methods on models built without memory (the meta
device). Minutes follow from it and from a sustained speed that is assumed and printed. They are
estimates: good for choosing a configuration, not for comparing architectures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from ham.config import ArmConfig, Config
from ham.errors import UnusableModelError
from ham.model.arm import model_outline
from ham.model.language_model import LanguageModel
from ham.plan_flops import evaluate_flops, measure_flops, train_flops
from ham.plan_gpu import (
    CACHED_COMPILE_SECONDS,
    COMPILE_SECONDS,
    PROCESS_SECONDS,
    GpuTimes,
    format_batches,
    training_memory,
)
from ham.workflow import inspection_pages

# Vocabulary of tokenizers that only a download could tell.
HUB_VOCABULARIES = {"hub:fla-hub/transformer-1.3B-100B": 32_000}
ASSUMED_HUB_VOCABULARY = 50_304
LOCAL_VOCABULARIES = {"byte": 257, "bpe-4096": 4096}
# Bytes a token, measured on the shipped corpus with a BPE of this size.
BYTES_PER_TOKEN = {"byte": 1.0, "bpe-4096": 3.6}
FLOAT32_BYTES = 4
# Weights and the two moments of AdamW.
STATE_COPIES = 3


@dataclass(frozen=True)
class Speed:
    """Sustained speed of one CPU thread that the estimate assumes.

    Attributes:
        flops: FLOP/s of a thread.
        job_seconds: Start of a process: imports and data.
    """

    flops: float
    job_seconds: float
    source: str


CPU_THREAD = Speed(2e10, 4.0, "20 GFLOP/s a thread, 4 s to start a job")


@dataclass(frozen=True)
class StageCost:
    """All jobs of one stage together.

    Attributes:
        jobs: Number of jobs.
        flops: FLOPs of all of them.
        seconds: Time when run one after the other.
        at_once: How many run at the same time.
    """

    stage: str
    jobs: int
    flops: float
    seconds: float
    at_once: int = 1

    @property
    def minutes(self) -> float:
        """Wall time."""
        return self.seconds / 60 / min(self.at_once, max(1, self.jobs))


@dataclass(frozen=True)
class ArmCost:
    """One arm: its size and the arithmetic of each stage for one seed.

    Attributes:
        parameters: All parameters, embedding included.
        trained: Whether it is trained; if not, it has no checkpoint of its own.
        cache_bytes: Decoding memory of one sequence after the training context, 16-bit KV.
        memory_bytes: Training memory on a GPU, estimated; 0 for an arm that is not trained.
        note: What is to be known of these figures, or why there are none.
    """

    name: str
    mixer: str
    parameters: int
    trained: bool
    mlp_width: int
    train_flops: float
    evaluate_flops: float
    measure_flops: float
    cache_bytes: int
    memory_bytes: int
    note: str = ""


@dataclass
class Plan:
    """The estimate for one configuration."""

    config: Config
    cores: int
    gpus: int = 1
    speed: Speed | None = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.config.device == "cuda" or (
            self.config.device == "auto" and torch.cuda.is_available()
        )
        self.speed = None if on_gpu else CPU_THREAD

    @cached_property
    def vocabulary_size(self) -> int:
        """Number of token ids; assumed for tokenizers that only a download could tell."""
        name = self.config.data.tokenizer
        return LOCAL_VOCABULARIES.get(name) or HUB_VOCABULARIES.get(name, ASSUMED_HUB_VOCABULARY)

    @cached_property
    def arms(self) -> list[ArmCost]:
        """Every arm.

        Raises:
            ConfigError: For options that a mixer refuses or sizes that cannot be matched.
        """
        return [self._arm(arm) for arm in self.config.arms]

    @cached_property
    def stages(self) -> list[StageCost]:
        """Every stage in order."""
        config = self.config
        runs = {arm.name: len(config.seeds_of(config.arm(arm.name))) for arm in self.arms}
        trainings = sum(runs[arm.name] for arm in self._trained)
        train = sum(arm.train_flops * runs[arm.name] for arm in self.arms)
        evaluate = sum(arm.evaluate_flops * runs[arm.name] for arm in self.arms)
        stages = [
            StageCost("prepare", 1, 0.0, self._prepare_seconds()),
            *self._tuning(),
            StageCost("train", trainings, train, self._job_seconds("train", train)),
            StageCost(
                "evaluate", sum(runs.values()), evaluate, self._job_seconds("evaluate", evaluate)
            ),
        ]
        if config.measure:
            flops = sum(arm.measure_flops for arm in self.arms)
            seconds = self._job_seconds("measure", flops)
            stages.append(StageCost("measure", len(self.arms), flops, seconds))
        pages = len(inspection_pages(config))
        if pages:
            # One forward pass over a few thousand tokens: starting the job is what takes time.
            stages.append(StageCost("inspect", pages, 0.0, self._job_seconds("inspect", 0.0)))
        stages.append(StageCost("report", 1, 0.0, 0.0))
        return [self._on_cpu(stage) for stage in stages]

    @cached_property
    def gpu(self) -> GpuTimes | None:
        """The estimate job by job, where a GPU does the work."""
        return GpuTimes(self.config, self.arms) if self.speed is None else None

    def _job_seconds(self, stage: str, flops: float, tuning: bool = False) -> float:
        """All jobs of a stage, one after the other."""
        if self.gpu is not None:
            return 60 * self.gpu.minutes(stage, tuning)
        assert self.speed is not None
        return flops / (self.speed.flops * self.config.threads_per_job)

    @property
    def minutes(self) -> float:
        """Wall time of the whole workflow."""
        return sum(stage.minutes for stage in self.stages)

    @property
    def gpu_minutes(self) -> float:
        """Minutes of one GPU; 0 without one."""
        return sum(self.gpu.batch_minutes) if self.gpu is not None else 0.0

    @property
    def runs(self) -> int:
        """Arms with their seeds."""
        return sum(len(self.config.seeds_of(arm)) for arm in self.config.arms)

    @property
    def train_tokens(self) -> int:
        """Tokens that one run reads, unless its arm has steps of its own."""
        train = self.config.train
        return train.steps * train.batch_size * self.config.data.context

    @cached_property
    def token_bytes(self) -> int:
        """Disk for the token shards."""
        return self.corpus_tokens * (2 if self.vocabulary_size <= 1 << 16 else 4)

    @cached_property
    def corpus_tokens(self) -> int:
        """Tokens in all four shards."""
        hub = self.config.data.hub
        if hub is not None:
            return hub.train_tokens + 3 * hub.held_out_tokens
        from ham.train.corpus import load_documents

        total = sum(len(document.text.encode()) for document in load_documents())
        return round(total / BYTES_PER_TOKEN.get(self.config.data.tokenizer, 4.0))

    @property
    def checkpoint_bytes(self) -> int:
        """Disk for the trained weights of all runs."""
        parameters = sum(
            arm.parameters * len(self.config.seeds_of(self.config.arm(arm.name)))
            for arm in self._trained
        )
        return FLOAT32_BYTES * parameters

    @property
    def state_bytes(self) -> int:
        """Most disk that resumable training state takes, while runs are under way."""
        train = next(stage for stage in self.stages if stage.stage == "train")
        largest = max((arm.parameters for arm in self._trained), default=0)
        return STATE_COPIES * FLOAT32_BYTES * largest * min(train.at_once, train.jobs)

    @property
    def _trained(self) -> list[ArmCost]:
        return [arm for arm in self.arms if arm.trained]

    def _arm(self, arm: ArmConfig) -> ArmCost:
        try:
            model = model_outline(self.config, arm, self.vocabulary_size)
        except UnusableModelError as error:
            sizes = (0, arm.trained, 0, 0.0, 0.0, 0.0, 0, 0)
            return ArmCost(arm.name, arm.architecture, *sizes, str(error))
        fraction = model.target_fraction
        parameters = model.count_parameters()
        return ArmCost(
            name=arm.name,
            mixer=arm.mixer or model.config.mixer,
            parameters=parameters,
            trained=arm.trained,
            mlp_width=model.config.mlp_width,
            train_flops=(
                train_flops(self.config, model, fraction, self.config.training(arm))
                if arm.trained
                else 0.0
            ),
            evaluate_flops=evaluate_flops(self.config, model, fraction),
            measure_flops=measure_flops(self.config, model, fraction, arm.trained),
            cache_bytes=model.planned_bytes(self.config.data.context),
            memory_bytes=training_memory(self.config, arm, parameters) if arm.trained else 0,
            note=_note(model),
        )

    def _prepare_seconds(self) -> float:
        """Encoding: 5 M tokens a second for bytes, 0.5 M for a BPE."""
        return self.corpus_tokens / (5e6 if self.config.data.tokenizer == "byte" else 5e5)

    def _tuning(self) -> list[StageCost]:
        """Runs that choose learning rates; none where one rate is given for all."""
        tuning = self.config.tuning
        if tuning is None:
            return []
        rates, flops, runs = len(tuning.learning_rates), 0.0, 0
        for arm in self._trained:
            described = self.config.arm(arm.name)
            if described.tuned_like is None:
                usual = self.config.training(described).steps
                flops += rates * arm.train_flops * (tuning.steps or usual) / usual
                runs += rates
        return [StageCost("tune", runs, flops, self._job_seconds("train", flops, tuning=True))]

    def _on_cpu(self, stage: StageCost) -> StageCost:
        """With the start of each process, and as many jobs at once as there are cores for."""
        if self.speed is None:
            return stage
        parallel = max(1, self.cores // self.config.threads_per_job)
        at_once = parallel if stage.stage in ("tune", "train", "evaluate") else 1
        seconds = stage.seconds + stage.jobs * self.speed.job_seconds
        return StageCost(stage.stage, stage.jobs, stage.flops, seconds, at_once)


def _note(model: LanguageModel) -> str:
    """What a reader must know of the figures of a model of another library."""
    if model.flops_source is None:
        return ""
    unmatched = "parameters not matched; " if model.config.matched is False else ""
    return f"{unmatched}FLOPs by {model.flops_source}"


def format_plan(plan: Plan) -> str:
    """The plan as text for a terminal."""
    config = plan.config
    total_jobs = sum(stage.jobs for stage in plan.stages)
    names = zip(*((arm.name, arm.mixer) for arm in plan.arms), strict=True)
    first, second = (max(18, 2 + max(map(len, column))) for column in names)
    lines = [
        f"{config.name}: {config.title or 'no title'} "
        f"(scale {config.scale}, device {config.device}, {config.status})",
        f"{len(config.arms)} arms, {plan.runs} runs, {plan.train_tokens:,} training "
        f"tokens each, context {config.data.context:,}, vocabulary {plan.vocabulary_size:,}",
        "",
        f"{'arm':<{first}}{'mixer':<{second}}{'parameters':>13}{'MLP':>7}{'train FLOPs':>13}"
        f"{'cache':>11}{'memory':>11}",
    ]
    lines += [
        f"{arm.name:<{first}}{arm.mixer:<{second}}{arm.parameters:>13,}{arm.mlp_width:>7,}"
        f"{arm.train_flops:>13.2e}{readable_bytes(arm.cache_bytes):>11}"
        f"{readable_bytes(arm.memory_bytes) if plan.gpu else '–':>11}"
        for arm in plan.arms
    ]
    lines += [f"{arm.name}: {arm.note}" for arm in plan.arms if arm.note]
    lines += ["", f"{'stage':<12}{'jobs':>6}{'at once':>9}{'FLOPs':>11}{'minutes':>12}"]
    lines += [
        f"{stage.stage:<12}{stage.jobs:>6}{min(stage.at_once, stage.jobs):>9}"
        f"{stage.flops:>11.1e}{stage.minutes:>12,.1f}"
        for stage in plan.stages
    ]
    lines += [
        f"{'total':<12}{total_jobs:>6}{'':>9}{'':>11}{plan.minutes:>12,.1f}"
        + (f" ({plan.minutes / 1440:,.1f} days)" if plan.minutes > 1440 else ""),
        "",
        f"disk: {readable_bytes(plan.token_bytes)} token shards "
        f"({plan.corpus_tokens:,} tokens), {readable_bytes(plan.checkpoint_bytes)} checkpoints, "
        f"{readable_bytes(plan.state_bytes)} training state while running",
        _assumption(plan),
        "`cache` is one sequence's decoding memory after the training context, 16-bit KV; "
        "`memory` what training takes on a GPU (states, activations), an estimate.",
    ]
    if plan.gpu is not None:
        lines += format_batches(plan.gpu, plan.gpus)
    return "\n".join(lines)


def _assumption(plan: Plan) -> str:
    if plan.speed is not None:
        studies = "; studies of recall come on top" if plan.config.workflow.studies else ""
        return f"assumed: {plan.speed.source}; {plan.cores} cores{studies}"
    minutes = plan.gpu_minutes
    days = f" ({minutes / 1440:,.0f} days)" if minutes > 1440 else ""
    starts = f"{PROCESS_SECONDS:.0f} s to start a process"
    compiling = f"{COMPILE_SECONDS:.0f} s to compile an architecture"
    return (
        f"GPU: {minutes:,.1f} minutes{days} of one H100; assumed: {starts}, {compiling}, "
        f"{CACHED_COMPILE_SECONDS:.0f} s from a cache"
    )


def readable_bytes(count: float) -> str:
    """Bytes with a decimal unit, three significant digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
