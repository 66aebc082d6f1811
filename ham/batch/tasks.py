"""The jobs of an experiment in the order in which one process does them best.

All jobs of an arm stand together, so that its seeds share what is compiled for it. Loads no torch:
Snakemake asks for batches at every dry run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from ham.config import ArmConfig, Config
from ham.files import stable_hash
from ham.report.manifest import manifest_path
from ham.workflow import (
    INSPECTED_MIXER,
    checkpoint_folder,
    inspection_files,
    inspection_options,
    inspection_pages,
    run_folder,
    stage_fingerprint,
    stage_hash,
    tuned_file,
    tuning_folder,
    tuning_rates,
    tuning_rows_files,
)

TUNING, TIMED = "tuning", "measure"
KEEP_GOING = "--keep-going"


@dataclass(frozen=True)
class Task:
    """One job: a `ham` command with its arm and seed.

    Attributes:
        stage: `train`, `tune`, `evaluate`, `measure` or `inspect`: the command.
        seed: None for `tune`, which has no seed.
        rate: Of a tuning run, as paths name it; None for every other job.
    """

    stage: str
    arm: str
    seed: int | None = None
    rate: str | None = None

    @property
    def name(self) -> str:
        """In words, e.g. `train ham-cosine seed 0`."""
        if self.rate is not None:
            return f"{TUNING} {self.arm} rate {self.rate}"
        return f"{self.stage} {self.arm}" + ("" if self.seed is None else f" seed {self.seed}")


class Tasks:
    """All jobs of a configuration with their files and commands.

    Args:
        config: The experiment.
        config_file: Where the jobs read it.
        data: Folder of `ham prepare`.
    """

    def __init__(self, config: Config, config_file: str, data: str | None = None):
        self.config = config
        self.config_file = config_file
        self.data = data or f"{run_folder(config)}/data"
        self._fingerprints: dict[tuple[str, ...], str] = {}

    @cached_property
    def all(self) -> list[Task]:
        """Every job, each after those whose results it reads."""
        arms = sorted(self.config.arms, key=lambda arm: not arm.trained)
        return [task for arm in arms for task in self._of_arm(arm)]

    @cached_property
    def batches(self) -> list[list[Task]]:
        """Consecutive jobs by process; an arm stays whole where a process can hold it.

        Where processes share a GPU, those that time come last and have it to themselves.
        """
        shared = self.config.workflow.processes_per_gpu > 1
        timed = [task for task in self.all if shared and task.stage == TIMED]
        plain = [task for task in self.all if task not in timed]
        return [batch for tasks in (plain, timed) if tasks for batch in self._in_batches(tasks)]

    def is_alone(self, number: int) -> bool:
        """Whether a batch needs a GPU to itself."""
        alone = self.config.workflow.processes_per_gpu == 1
        return alone or any(task.stage == TIMED for task in self.batches[number])

    def _in_batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        size = self.config.workflow.jobs_per_process
        made: list[list[Task]] = [[]]
        for _, group in groupby(tasks, key=lambda task: task.arm):
            arm = list(group)
            if made[-1] and len(made[-1]) + len(arm) > size:
                made.append([])
            for start in range(0, len(arm), size):
                if start:
                    made.append([])
                made[-1] += arm[start : start + size]
        return made

    def _of_arm(self, arm: ArmConfig) -> list[Task]:
        tasks = []
        if arm.trained and arm.tuned_like is None and self.config.tuning is not None:
            seed = self.config.tuning.seed
            tasks += [Task("train", arm.name, seed, rate) for rate in tuning_rates(self.config)]
            tasks.append(Task("tune", arm.name))
        seeds = self.config.seeds_of(arm)
        for seed in seeds:
            stages = ["train", "evaluate"] if arm.trained else ["evaluate"]
            tasks += [Task(stage, arm.name, seed) for stage in stages]
        if self.config.measure:
            tasks.append(Task("measure", arm.name, seeds[0]))
        if arm.name == next((a.name for a in self.config.arms if a.mixer == INSPECTED_MIXER), None):
            tasks.append(Task("inspect", arm.name, seeds[0]))
        return tasks

    def needs(self, task: Task) -> list[Task]:
        """The jobs whose results a job reads."""
        if task.stage == "tune":
            return [other for other in self.all if other.rate and other.arm == task.arm]
        if task.stage == "train":
            tuned = self.config.tuning is not None and task.rate is None
            source = self.config.tuned_as(self.config.arm(task.arm)).name
            return [Task("tune", source)] if tuned else []
        source = self.config.arm(task.arm).checkpoint_of or task.arm
        return [Task("train", source, task.seed)]

    def readers(self, task: Task) -> list[Task]:
        """The jobs that read the checkpoint of a training run."""
        if task.stage != "train" or task.rate is not None:
            return []
        return [other for other in self.all if task in self.needs(other)]

    def earlier_batches(self, number: int) -> list[int]:
        """Numbers of the batches whose results a batch reads."""
        where = {task: index for index, tasks in enumerate(self.batches) for task in tasks}
        found = {where[need] for task in self.batches[number] for need in self.needs(task)}
        return sorted(found - {number})

    def checkpoint(self, task: Task) -> str:
        """The checkpoint that a job writes or reads."""
        assert task.seed is not None
        return checkpoint_folder(self.config, task.arm, task.seed)

    def result(self, task: Task) -> str:
        """The file that says that a job is done: its rows, the chosen rate or the page."""
        if task.rate is not None:
            return f"{tuning_folder(self.config, task.arm, task.rate)}/{TUNING}.rows.jsonl"
        if task.stage == "tune":
            return tuned_file(self.config, task.arm)[0]
        if task.stage == "inspect":
            return inspection_pages(self.config)[0]
        return (
            f"{run_folder(self.config)}/models/{task.arm}/seed{task.seed}/{task.stage}.rows.jsonl"
        )

    def files(self, task: Task) -> list[str]:
        """The result and the manifest beside it, where there is one."""
        result = self.result(task)
        return [result, str(manifest_path(result))] if result.endswith(".jsonl") else [result]

    def extras(self, task: Task) -> list[str]:
        """Files that a job may leave besides, which say nothing about whether it is done."""
        if task.stage != "inspect":
            return []
        return [path for path in inspection_files(self.config) if path != self.result(task)]

    def log(self, task: Task) -> str:
        """Where a job's output goes."""
        folder = f"{run_folder(self.config)}/logs/{task.arm}"
        if task.rate is not None:
            return f"{folder}/{TUNING}-lr{task.rate}.log"
        return (
            f"{folder}/tune.log"
            if task.seed is None
            else f"{folder}/seed{task.seed}/{task.stage}.log"
        )

    def command(self, task: Task) -> list[str]:
        """The arguments of `ham` that do this job alone; a failing arm leaves error rows."""
        return [*self._command(task), KEEP_GOING]

    def _command(self, task: Task) -> list[str]:
        result = self.result(task)
        if task.stage == "tune":
            rows = tuning_rows_files(self.config, task.arm)
            return ["tune", self.config_file, "--arm", task.arm, "--rows", *rows, "--out", result]
        if task.stage == "inspect":
            where = ["--sample", f"{self.data}/test.tokens", "--config", self.config_file]
            how = ["--arm", task.arm, "--device", self.config.device, "--out", result]
            more = inspection_options(self.config)
            return ["inspect", self.checkpoint(task), *where, *how, *more]
        common = [task.stage, self.config_file, "--arm", task.arm, "--seed", str(task.seed)]
        common += ["--data", self.data]
        if task.stage != "train":
            return [*common, "--checkpoint", self.checkpoint(task), "--rows", result]
        common += ["--out", str(Path(result).parent)]
        if task.rate is not None:
            return [*common, "--learning-rate", task.rate]
        tuned = self.tuned(task)
        return common if tuned is None else [*common, "--tuned", tuned]

    def tuned(self, task: Task) -> str | None:
        """The file with the learning rate of a training run; None where it has one of its own."""
        if self.config.tuning is None or task.rate is not None:
            return None
        return tuned_file(self.config, task.arm)[0]

    def batch_code(self, number: int) -> str:
        """Fingerprint of the code behind a batch."""
        pairs = {(task.stage, task.arm) for task in self.batches[number]}
        return stable_hash([self.fingerprint(*pair) for pair in sorted(pairs)])

    def batch_hash(self, number: int) -> str:
        """Hash of what a batch reads of the configuration, and of which jobs it has."""
        return stable_hash(
            [
                (task.name, stage_hash(self.config, task.stage, task.arm))
                for task in self.batches[number]
            ]
        )

    def fingerprint(self, stage: str, arm: str) -> str:
        """Fingerprint of the code behind a stage of an arm."""
        mixers = [] if stage == "tune" else self.config.arm(arm).mixers
        key = (stage, *mixers)
        if key not in self._fingerprints:
            self._fingerprints[key] = stage_fingerprint(stage, mixers)
        return self._fingerprints[key]

    def select(self, arms: Iterable[str] | None, seeds: Sequence[int] | None) -> list[Task]:
        """The jobs of these arms and seeds, tuning included; None: of all.

        Raises:
            ConfigError: For an arm or a seed that the configuration has not.
        """
        from ham.errors import unknown_choice

        names = [self.config.arm(name).name for name in arms] if arms is not None else None
        for seed in seeds or ():
            if seed not in self.config.all_seeds:
                raise unknown_choice("seed", seed, map(str, self.config.all_seeds))
        return [
            task
            for task in self.all
            if (names is None or task.arm in names)
            and (seeds is None or task.seed is None or task.rate or task.seed in seeds)
        ]
