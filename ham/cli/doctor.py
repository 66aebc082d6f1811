"""`ham doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser("doctor", help="say what this machine can run and why not more")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print all checks; status 1 when not even the demo can run."""
    from ham.doctor import abilities, examine, format_report

    checks = examine()
    print(format_report(checks))
    demo = next(ability for ability in abilities(checks) if ability.name == "demo")
    return 0 if demo.possible else 1
