"""`ham mqar`: which routing score should be the default? Seeds of associative recall decide."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ham.device import DEVICES

if TYPE_CHECKING:
    from ham.study.config import MqarConfig


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parsers of `ham mqar run`, `plan`, `report` and `bench`."""
    parser = subparsers.add_parser("mqar", help="study of routing scores on associative recall")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    grid = actions.add_parser("run", help="train and evaluate a grid of small models")
    _add_choices(grid)
    grid.add_argument("--rows", type=Path, required=True, help="folder of the row files")
    grid.add_argument("--device", choices=DEVICES, help="instead of the configured one")
    grid.add_argument(
        "--launch", choices=("graph", "eager"), help="instead of train.launch, for every arm alike"
    )
    grid.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="programs side by side in a process; each trains several runs of one arm and width "
        "(train.runs_per_program)",
    )
    grid.add_argument("--processes", type=int, default=1, help="processes on the device")
    grid.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no further run after that time; the same command goes on later",
    )
    grid.add_argument(
        "--keep-going",
        action="store_true",
        help="status 0 although runs failed: their rows say why",
    )
    grid.set_defaults(handler=run)
    plan = actions.add_parser("plan", help="runs and device minutes before anything runs")
    _add_choices(plan)
    plan.add_argument(
        "--measured",
        type=Path,
        metavar="FOLDER",
        help="row files that say what a step takes; default: those published last",
    )
    plan.set_defaults(handler=print_plan)
    page = actions.add_parser("report", help="table, figure and paired comparison of the rows")
    page.add_argument("rows", type=Path, metavar="FOLDER", help="folder of the row files")
    page.add_argument("--out", type=Path, required=True, help="folder to write")
    page.set_defaults(handler=report)
    bench = actions.add_parser(
        "bench", help="examples a minute of every task at its longest size, on one core"
    )
    bench.add_argument("config", type=Path, help="YAML file, e.g. workflow/config/mqar.yaml")
    bench.set_defaults(handler=speed)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """The configuration and what of it is chosen."""
    parser.add_argument("config", type=Path, help="YAML file, e.g. workflow/config/mqar.yaml")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these, e.g. blank")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds instead")
    parser.add_argument("--widths", nargs="+", type=int, metavar="D", help="these widths instead")
    parser.add_argument("--steps", type=int, help="training steps instead of the configured ones")
    parser.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="this rate for all; no tuning"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the grid; status 1 if a run failed or is left."""
    from ham.device import gpu_lease, resolve_device
    from ham.errors import ConfigError
    from ham.locks import sole_writer
    from ham.study.config import load_mqar_config

    for name in ("jobs", "processes"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, received {getattr(arguments, name)}")
    config = chosen(load_mqar_config(arguments.config), arguments)
    with sole_writer(arguments.rows / "mqar"), gpu_lease(config.device):
        import torch

        from ham.fingerprint import fingerprint
        from ham.report.manifest import collect_manifest, device_name
        from ham.study.grid import Grid
        from ham.study.runs import Surroundings
        from ham.workflow import mixer_files

        device = resolve_device(config.device)
        if device.type == "cpu":
            torch.set_num_threads(1)
        modules = mixer_files()
        codes = {
            mixer: fingerprint("ham.study.grid", *([modules[mixer]] if mixer in modules else []))
            for mixer in {arm.mixer for arm in config.arms}
        }
        manifest = collect_manifest(config.model_dump(mode="json"), sys.argv, config.seeds)
        around = Surroundings(
            config,
            arguments.rows,
            device,
            device_name(device.type, manifest["gpus"]),
            manifest,
            codes,
        )
        grid = Grid(
            around,
            arguments.jobs,
            lambda line: print(line, flush=True),
            seconds=60 * arguments.minutes,
            processes=arguments.processes,
        )
        grid.run()
    if grid.failed:
        print(f"ham: warning: {grid.failed} runs failed; their rows say why", file=sys.stderr)
    if grid.left:
        words = f"{grid.left} runs are left; the same command goes on with them"
        print(f"ham: warning: {words}", file=sys.stderr)
    failed = grid.failed and not arguments.keep_going
    return 1 if failed or grid.left else 0


def print_plan(arguments: argparse.Namespace) -> int:
    """Print what the grid takes."""
    from ham.study.config import load_mqar_config
    from ham.study.plan import format_plan, measured_cost

    config = chosen(load_mqar_config(arguments.config), arguments)
    print(format_plan(config, measured_cost(arguments.measured)))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write the report and print where it is."""
    from ham.errors import MissingDataError

    files = sorted(arguments.rows.glob("*.rows.jsonl"))
    if not files:
        raise MissingDataError(f"{arguments.rows} holds no *.rows.jsonl; run `ham mqar run` first")
    from ham.study.report import build_report, read_study

    for path in build_report(read_study(files), arguments.out):
        print(path)
    return 0


def speed(arguments: argparse.Namespace) -> int:
    """Print examples a minute."""
    from ham.measure.samples import mqar_speeds
    from ham.study.config import load_mqar_config

    for line in mqar_speeds(load_mqar_config(arguments.config)):
        print(line)
    return 0


def chosen(config: MqarConfig, arguments: argparse.Namespace) -> MqarConfig:
    """The configuration with what the command line chooses.

    Raises:
        ConfigError: For an arm or task that the configuration does not have, or a bad value.
    """
    from ham.study.config import parse_mqar_config

    values = config.model_dump(mode="json")
    if arguments.arms:
        _check("arm", arguments.arms, [arm.name for arm in config.arms])
        values["arms"] = [arm for arm in values["arms"] if arm["name"] in arguments.arms]
    if arguments.tasks:
        _check("task", arguments.tasks, [str(task) for task in config.tasks])
        values["only"] = arguments.tasks
    for key in ("seeds", "widths", "device"):
        value = getattr(arguments, key, None)
        if value is not None:
            values[key] = value
    if getattr(arguments, "launch", None) is not None:
        values["train"]["launch"] = arguments.launch
    if arguments.learning_rate is not None:
        values["learning_rates"] = [arguments.learning_rate]
    if arguments.steps is not None:
        values["train"]["steps"] = arguments.steps
        tuning = config.train.tuning_steps
        values["train"]["tuning_steps"] = tuning and min(tuning, arguments.steps)
    return parse_mqar_config(values, source="the configuration with the command line's choices")


def _check(kind: str, received: Sequence[str], legal: Sequence[str]) -> None:
    from ham.errors import unknown_choice

    for name in received:
        if name not in legal:
            raise unknown_choice(kind, name, legal)
