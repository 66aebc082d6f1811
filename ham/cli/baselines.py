"""`ham baselines`: the registered architectures, the rules they keep, and new ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ham.conformance import Examined, Finding

RULE_BROKEN = 1
VERDICTS = {True: "passed", False: "FAILED", None: "not judged"}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham baselines`."""
    parser = subparsers.add_parser("baselines", help="list, check and start architectures")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="one line each: name, title, paper, options")
    listing.set_defaults(handler=run_list)
    rules = actions.add_parser("rules", help="what `check` demands, one line each")
    rules.set_defaults(handler=run_rules)
    check = actions.add_parser("check", help="run the conformance rules on one, several or all")
    check.add_argument("names", metavar="NAME", nargs="*", help="registered names")
    check.add_argument("--all", action="store_true", help="every registered one")
    check.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    check.add_argument(
        "--rules", metavar="RULE,...", help="only these; see `ham baselines rules` (default: all)"
    )
    check.add_argument(
        "--full",
        action="store_true",
        help="on a CPU too, let torch.compile build machine code (a minute a mixer)",
    )
    check.add_argument(
        "--import",
        dest="sources",
        metavar="SOURCE",
        action="append",
        default=[],
        help="a .py file or a module outside the repository that registers baselines; what it "
        "registers is checked where no NAME is given; repeatable",
    )
    check.set_defaults(handler=run_check)
    new = actions.add_parser("new", help="write a working, commented starting file")
    new.add_argument("name", metavar="NAME", help="name to register")
    new.add_argument("--out", type=Path, metavar="FILE", help="default: baselines/NAME.py")
    new.set_defaults(handler=run_new)


def run_list(arguments: argparse.Namespace) -> int:
    """Print one line per registered mixer, and on stderr one per mixer that cannot be used."""
    from ham.model.registry import registered_mixers, unusable_baselines

    mixers = registered_mixers()
    width = max(len(name) for name in mixers)
    for name, mixer in mixers.items():
        options = ", ".join(
            f"{option}={field.default}" for option, field in mixer.Options.model_fields.items()
        )
        print(f"{name:<{width}}  {mixer.title} ({mixer.paper}); options: {options or 'none'}")
    for name, fault in unusable_baselines().items():
        print(f"ham baselines: {name} cannot be used: {fault}", file=sys.stderr)
    return 0


def run_rules(arguments: argparse.Namespace) -> int:
    """Print one line per rule."""
    from ham.conformance import RULES

    width = max(len(name) for name in RULES)
    for name, rule in RULES.items():
        print(f"{name:<{width}}  {rule.summary}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Print what each rule found; 1 if one is broken or a baseline cannot be used."""
    from ham.conformance import choose_rules, survey
    from ham.device import resolve_device
    from ham.progress import ProgressReporter

    rules = None
    if arguments.rules is not None:
        rules = [name.strip() for name in arguments.rules.split(",")]
    count = len(choose_rules(rules))
    device = str(resolve_device(arguments.device))
    names, unusable = _subjects(arguments)
    with ProgressReporter("rules", max(1, count * len(names))) as progress:

        def report(name: str, rule: str) -> None:
            progress.advance(note=f"{name} {rule}")

        examined = survey(names, device, rules, arguments.full, report)
    examined += unusable
    if len(examined) == 1 and not examined[0].error:
        lines = table(examined[0].findings)
    else:
        lines = aligned(overview(examined))
    print("\n".join([*lines, *_messages(examined), "", *_totals(examined, device)]))
    return RULE_BROKEN if any(one.failed for one in examined) else 0


def _subjects(arguments: argparse.Namespace) -> tuple[list[str], list[Examined]]:
    """The names to check, and what is known beforehand not to be usable.

    Raises:
        ConfigError: If nothing is named, a name is not registered, or a source that should hold one
            of the names cannot be imported.
    """
    from ham.conformance import Examined
    from ham.errors import ConfigError
    from ham.model.registry import (
        load_baseline,
        mixer_class,
        registered_mixers,
        unusable_baselines,
    )

    if arguments.all and arguments.names:
        raise ConfigError(f"give names or --all, not both; received {', '.join(arguments.names)}")
    if not (arguments.all or arguments.names or arguments.sources):
        raise ConfigError("name a baseline, or give --all or --import SOURCE")
    names, unusable = list(arguments.names), []
    for source in arguments.sources:
        try:
            registered = load_baseline(source)
        except ConfigError as error:
            if arguments.names:
                raise
            unusable.append(Examined(source, error=str(error)))
            continue
        names += [] if arguments.names else registered
    if arguments.all:
        names = list(registered_mixers())
        faults = unusable_baselines().items()
        unusable += [Examined(name, error=fault) for name, fault in faults]
    for name in arguments.names:
        mixer_class(name)
    return list(dict.fromkeys(names)), unusable


def table(findings: list[Finding]) -> list[str]:
    """One line per finding under a line of headings."""
    rows = [["rule", "verdict", "measured", "limit", "unit", "seconds"]]
    for finding in findings:
        judged = finding.limit == finding.limit
        rows.append(
            [
                finding.rule,
                VERDICTS[finding.passed],
                f"{finding.measured:.3g}" if judged else "-",
                f"{finding.limit:g}" if judged else "-",
                finding.message if finding.passed is None else finding.unit,
                f"{finding.seconds:.2f}",
            ]
        )
    return aligned(rows)


def overview(examined: Sequence[Examined]) -> list[list[str]]:
    """A row for each rule with a figure for each baseline, and their verdicts at the end."""
    from ham.conformance import grid

    verdicts = ["FAILED" if one.failed else "passed" for one in examined]
    return [*grid(examined), ["verdict", "", "", *verdicts]]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines of columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _messages(examined: Sequence[Examined]) -> list[str]:
    """What is wrong with each baseline, and why a rule was not judged."""
    from ham.conformance import RULES

    lines: list[str] = []
    for one in examined:
        if one.error:
            lines += ["", f"{one.name} cannot be used: {one.error}"]
        for finding in one.broken:
            rule = RULES[finding.rule]
            lines += ["", f"{one.name} breaks {rule.name}: {rule.summary}", f"  {finding.message}"]
    if len(examined) > 1:
        reasons: dict[tuple[str, str], list[str]] = {}
        for one in examined:
            for finding in one.findings:
                if finding.passed is None:
                    reasons.setdefault((finding.rule, finding.message), []).append(one.name)
        lines += [""] if reasons else []
        lines += [
            f"{rule} not judged ({', '.join(names)}): {message}"
            for (rule, message), names in reasons.items()
        ]
    return lines


def _totals(examined: Sequence[Examined], device: str) -> list[str]:
    lines = []
    for one in examined:
        spared = len(one.findings) - one.kept - len(one.broken)
        counts = f"{one.kept} kept, {len(one.broken)} broken, {spared} not judged"
        what = "cannot be used" if one.error else f"{counts}, {one.seconds:.1f} s"
        lines.append(f"{one.name} on {device}: {what}")
    return lines


def run_new(arguments: argparse.Namespace) -> int:
    """Write the starting file; a file that is there already is left alone."""
    from ham.conformance.starter import starting_file
    from ham.errors import ConfigError
    from ham.files import write_text
    from ham.fingerprint import repository_root

    inside = repository_root() / "baselines" / f"{arguments.name}.py"
    path = arguments.out or inside
    source = starting_file(arguments.name)
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another file with --out")
    write_text(path, source)
    imported = "" if path.resolve() == inside else f" --import {path}"
    print(f"wrote {path}\nham baselines check {arguments.name}{imported}")
    return 0
