"""`ham batch`: several jobs in one process, so that they share imports and compilation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham batch`."""
    parser = subparsers.add_parser(
        "batch", help="train, evaluate and measure several arms and seeds in one process"
    )
    parser.add_argument("config", nargs="+", help="YAML file; later ones overlay earlier ones")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--number", type=int, metavar="N", help="batch N of workflow.jobs_per_process, from 0"
    )
    which.add_argument("--arms", nargs="+", metavar="NAME", help="jobs of these arms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="jobs of these seeds")
    parser.add_argument("--data", help="folder made by `ham prepare` (default: that of the run)")
    parser.add_argument("--done", type=Path, metavar="FILE", help="write this when all are done")
    parser.add_argument("--list", action="store_true", help="print the jobs and their commands")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the jobs; status 1 if one failed."""
    from ham.batch.run import run_tasks, write_outcome
    from ham.batch.tasks import Tasks
    from ham.config_files import load_config
    from ham.device import gpu_lease
    from ham.errors import ConfigError, unknown_choice
    from ham.workflow import CONFIG_COPY, run_folder, write_config

    config = load_config(arguments.config)
    copy = f"{run_folder(config)}/{CONFIG_COPY}"
    tasks = Tasks(config, copy, arguments.data)
    if arguments.number is None:
        chosen = tasks.select(arguments.arms, arguments.seeds)
    elif arguments.seeds:
        raise ConfigError("--number and --seeds exclude each other")
    elif not 0 <= arguments.number < len(tasks.batches):
        raise unknown_choice("batch", arguments.number, map(str, range(len(tasks.batches))))
    else:
        chosen = tasks.batches[arguments.number]
    if arguments.list:
        for task in chosen:
            print("ham", *tasks.command(task))
        return 0
    write_config(config, copy)
    shared = arguments.number is not None and not tasks.is_alone(arguments.number)
    with gpu_lease(config.device, config.workflow.processes_per_gpu if shared else 1):
        outcome = run_tasks(tasks, chosen)
    print(
        f"{len(outcome.ran)} jobs done, {len(outcome.kept)} were done before, "
        f"{len(outcome.failed)} failed, {len(outcome.left_out)} left out because of those"
    )
    if outcome.failed:
        for name, reason in outcome.failed.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        return 1
    if arguments.done is not None:
        write_outcome(arguments.done, outcome)
    return 0
