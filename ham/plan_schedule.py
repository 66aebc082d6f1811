"""Wall time of the pipeline's processes on several GPUs, as Snakemake runs them.

Each process takes one GPU. When one is free, the first process of the list that does not wait for
another gets it; that is also what Snakemake does, because priorities fall along the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ham.batch.studies import StudyPart
from ham.errors import ConfigError

STUDY_START_SECONDS = 20.0


@dataclass(frozen=True)
class Process:
    """One process of the pipeline.

    Attributes:
        name: For the plan.
        minutes: On a GPU of its own.
        needs: Numbers of the processes whose results it reads.
        jobs: Jobs or runs that it does.
    """

    name: str
    minutes: float
    needs: tuple[int, ...] = ()
    jobs: int = 1


def wall_minutes(processes: Sequence[Process], gpus: int) -> float:
    """When the last of the processes ends.

    Raises:
        ConfigError: For fewer than one GPU.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, received {gpus}")
    now, done = 0.0, set[int]()
    running: dict[int, float] = {}
    waiting = list(range(len(processes)))
    while waiting or running:
        ready = [n for n in waiting if done.issuperset(processes[n].needs)]
        for number in ready[: gpus - len(running)]:
            running[number] = now + processes[number].minutes
            waiting.remove(number)
        number = min(running, key=running.__getitem__)
        now = running.pop(number)
        done.add(number)
    return now


def study_processes(parts: Sequence[StudyPart]) -> list[Process]:
    """The processes of studies, at the speed of the study that was published last.

    Raises:
        MissingDataError: If no study is published.
    """
    # The study trains models, so importing its plan loads torch.
    from ham.study.plan import device_minutes, measured_cost, planned_runs

    cost = measured_cost(None)
    processes = []
    for part in parts:
        runs = planned_runs(part.chosen)
        minutes = STUDY_START_SECONDS / 60 + device_minutes(runs, part.chosen, cost)
        processes.append(Process(f"{part.study.name} {part.name}", minutes, jobs=len(runs)))
    return processes
