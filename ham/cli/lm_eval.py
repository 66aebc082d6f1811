"""`ham lm-eval ...`: lm-eval's own command line with this project's models and tasks."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

COMMANDS = ("run", "ls", "validate")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham lm-eval`."""
    parser = subparsers.add_parser(
        "lm-eval",
        add_help=False,
        help="lm-eval with --model ham: --model_args pretrained=CHECKPOINT --tasks ...",
    )
    parser.set_defaults(handler=run, arguments=[])


def run(arguments: argparse.Namespace) -> int:
    """Register the model, point lm-eval to the tasks, hand over everything else.

    The tasks of this project are known by name; of the published sets, those that
    `ham fetch-evals` has put into the cache replace lm-eval's own, which need a network.
    """
    import sys
    import tempfile

    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    import ham.evaluate.lm_eval_adapter  # noqa: F401
    from ham.errors import MissingDataError
    from ham.evaluate.fetch_evals import check_evals, evals_folder
    from ham.evaluate.tasks import OFFLINE_TASKS, known_tasks, write_task_folder

    data: Path | None = evals_folder()
    try:
        check_evals(data)
        names = known_tasks()
    except MissingDataError:
        data, names = None, OFFLINE_TASKS
    before = sys.argv
    with tempfile.TemporaryDirectory(prefix="ham-tasks-") as folder:
        write_task_folder(folder, names, Path(lm_eval.tasks.__file__).parent, data)
        sys.argv = ["lm-eval", *complete_arguments(arguments.arguments, folder)]
        try:
            cli_evaluate()
        finally:
            sys.argv = before
    return 0


def complete_arguments(given: list[str], folder: str) -> list[str]:
    """The arguments for lm-eval: sub-command, and model, device, include path when missing.

    lm-eval's own default device is `cuda:0`, on machines without one too. Its `--use_cache` knows
    questions but not who answered them, so each checkpoint gets a file of its own.
    """
    if not given or given[0] in ("-h", "--help"):
        return given
    command, rest = (given[0], given[1:]) if given[0] in COMMANDS else ("run", list(given))
    if command == "run" and not _has(rest, "--model", "-M"):
        rest += ["--model", "ham"]
    if command == "run" and {"ham", "--model=ham"} & set(rest) and not _has(rest, "--device"):
        rest += ["--device", "auto"]
    if not _has(rest, "--include_path"):
        rest += ["--include_path", folder]
    cache = _position(rest, "--use_cache", "-c")
    if cache is not None:
        rest[cache] = f"{rest[cache]}-{model_key(_value(rest, '--model_args', '-a'))}"
    return [command, *rest]


def model_key(model_args: str) -> str:
    """16 hexadecimal digits for a model: its weights, and the arguments it is loaded with.

    A model that is not a folder here is known by its arguments alone.
    """
    from ham.files import sha256_file

    digest = hashlib.sha256(model_args.encode())
    values = dict(item.partition("=")[::2] for item in model_args.split(","))
    folder = Path(values.get("pretrained", ""))
    for path in sorted(folder.glob("*.safetensors")) if "pretrained" in values else ():
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()[:16]


def _value(arguments: list[str], *names: str) -> str:
    """The value of an option; empty without it. Spaces between several become commas."""
    position = _position(arguments, *names)
    if position is None:
        return ""
    first = arguments[position]
    if first.partition("=")[0] in names:
        return first.partition("=")[2]
    rest = arguments[position:]
    ends = [index for index, item in enumerate(rest) if item.startswith("-")]
    return ",".join(rest[: ends[0]] if ends else rest)


def _position(arguments: list[str], *names: str) -> int | None:
    """Where the value of an option stands, alone or behind its name and `=`; None without it."""
    for index, item in enumerate(arguments):
        if item in names and index + 1 < len(arguments):
            return index + 1
        if item.partition("=")[0] in names and "=" in item:
            return index
    return None


def _has(arguments: list[str], *names: str) -> bool:
    return any(item.partition("=")[0] in names for item in arguments)
