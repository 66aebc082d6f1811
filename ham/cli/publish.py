"""`ham publish`: keep a finished run's rows in git, and make reports from kept rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from ham.cli._options import add_samples_argument


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham publish`."""
    parser = subparsers.add_parser("publish", help="keep a run's rows, make reports from kept rows")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    run = actions.add_parser("run", help="copy a finished run to results/published/NAME")
    run.add_argument("config", nargs="+", type=Path, help="the run's configuration")
    run.add_argument("--name", required=True, help="by convention DATE-DEVICE")
    add_samples_argument(run)
    run.set_defaults(handler=publish)
    report = actions.add_parser("report", help="make reports/published/NAME from kept rows")
    report.add_argument("names", nargs="*", help="which (default: all)")
    report.set_defaults(handler=rebuild)
    seal = actions.add_parser("seal", help="write checksums of results that were copied by hand")
    seal.add_argument("name", help="folder of results/published")
    seal.set_defaults(handler=write_seal)
    readme = actions.add_parser("readme", help="write the results section of README.md")
    readme.set_defaults(handler=write_section)


def publish(arguments: argparse.Namespace) -> int:
    """Copy rows and manifests, then make their report."""
    from ham.report.publish import RESULTS, build_published, publish_run

    written = publish_run(arguments.config, arguments.name, with_samples=arguments.samples)
    build_published(arguments.name)
    print(f"{len(written)} rows files in {RESULTS / arguments.name}")
    return 0


def rebuild(arguments: argparse.Namespace) -> int:
    """Make the reports of the named results again, or of all."""
    from ham.report.publish import build_published, published_names

    for name in arguments.names or published_names():
        for page in build_published(name):
            print(page)
    return 0


def write_seal(arguments: argparse.Namespace) -> int:
    """Write the checksums of a folder that has none."""
    from ham.report.publish import RESULTS, write_checksums

    print(write_checksums(RESULTS / arguments.name))
    return 0


def write_section(arguments: argparse.Namespace) -> int:
    """Make the results section of README.md from what is published."""
    from ham.report.readme import write_readme

    print(write_readme())
    return 0
