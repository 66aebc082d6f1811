"""The `ham` command: one module per sub-command.

Each module of this package has `register(subparsers)`, which adds its parser and sets `handler` to
a function from the parsed arguments to an exit status. Modules load torch and other large packages
only inside their handlers, so that `ham --help` stays quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

import ham
from ham.errors import HamError

COMMANDS = (
    "prepare",
    "train",
    "evaluate",
    "measure",
    "batch",
    "sweep",
    "inspect",
    "report",
    "publish",
    "pack",
    "unpack",
    "merge",
    "verify",
    "diff",
    "plan",
    "match",
    "doctor",
    "config",
    "baselines",
    "kernels",
    "corpus",
    "fetch_evals",
    "lm_eval",
    "generate",
    "export",
    "mqar",
    "claims",
    "tune",
    "needle",
    "gc",
)

USER_ERROR = 2
INTERRUPTED = 130
READER_GONE = 141


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="ham", description=ham.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"ham-bench {ham.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"ham.cli.{name}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: Arguments without the program name; those of the process when None.

    Returns:
        The exit status: 2 for a mistake that the user can fix, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = _parse(build_parser(), arguments)
    try:
        with disk_full_is_a_user_error():
            status = parsed.handler(parsed) or 0
            sys.stdout.flush()
        return status
    except HamError as error:
        print(f"ham: error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:
        # The reader went away (`ham plan ... | head`); what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except KeyboardInterrupt:
        print("ham: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def disk_full_is_a_user_error() -> Iterator[None]:
    """Writers that do not go through `ham.files`, such as libraries, fill disks too."""
    from ham.files import raise_if_disk_full

    try:
        yield
    except OSError as error:
        raise_if_disk_full(error, error.filename or "a file")
        raise


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse; everything after `lm-eval` belongs to lm-eval, options included."""
    if arguments[:1] == ["lm-eval"]:
        parsed = parser.parse_args(arguments[:1])
        parsed.arguments = arguments[1:]
        return parsed
    return parser.parse_args(arguments)
