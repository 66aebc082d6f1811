"""Wall time of the pipeline's processes on several GPUs, as Snakemake runs them.

Each process takes one GPU or a share of one. When it is free, the first process of the list that
does not wait for another gets it; that is also what Snakemake does, because priorities fall along
the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ham.batch.studies import StudyPart
from ham.errors import ConfigError

STUDY_START_SECONDS = 20.0
SHARED_GAIN = 1.7
"""Speed of processes on a shared GPU, together, over one alone. One H100, HAM of 5 M parameters,
batches of 8 x 2,048 tokens, under the multi-process service: 1.81 M tokens/s alone, 2.89 M by four
processes, about 3.1 M by ten; without the service 1.94 M by four (2026-11-26, no rows)."""


@dataclass(frozen=True)
class Process:
    """One process of the pipeline.

    Attributes:
        name: For the plan.
        minutes: As long as it takes.
        shares: Of a GPU that it takes, in units of the smallest.
        needs: Numbers of the processes whose results it reads.
        jobs: Jobs or runs that it does.
    """

    name: str
    minutes: float
    needs: tuple[int, ...] = ()
    jobs: int = 1
    shares: int = 1


def wall_minutes(processes: Sequence[Process], gpus: int, shares: int = 1) -> float:
    """When the last of the processes ends.

    Args:
        shares: Into which each GPU is divided.

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
        for number in ready:
            free = gpus * shares - sum(processes[n].shares for n in running)
            if processes[number].shares <= free:
                running[number] = now + processes[number].minutes
                waiting.remove(number)
        number = min(running, key=running.__getitem__)
        now = running.pop(number)
        done.add(number)
    return now


def study_processes(parts: Sequence[StudyPart], shares: int = 1) -> list[Process]:
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
        processes.append(Process(f"{part.study.name} {part.name}", minutes, (), len(runs), shares))
    return processes
