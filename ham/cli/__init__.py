"""The `ham` command: one module per sub-command.

Each module of this package has `register(subparsers)`, which adds its parser and sets `handler` to
a function from the parsed arguments to an exit status. Modules load torch and other large packages
only inside their handlers, so that `ham --help` stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import ham
from ham.errors import HamError

COMMANDS = (
    "prepare",
    "train",
    "evaluate",
    "measure",
    "report",
    "plan",
    "doctor",
    "config",
    "baselines",
    "kernels",
    "corpus",
    "fetch_evals",
    "lm_eval",
    "generate",
    "gc",
)

USER_ERROR = 2
INTERRUPTED = 130


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
        return parsed.handler(parsed) or 0
    except HamError as error:
        print(f"ham: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("ham: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse; everything after `lm-eval` belongs to lm-eval, options included."""
    if arguments[:1] == ["lm-eval"]:
        parsed = parser.parse_args(arguments[:1])
        parsed.arguments = arguments[1:]
        return parsed
    return parser.parse_args(arguments)
