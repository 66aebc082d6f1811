"""`ham baselines`: the registered architectures, the rules they keep, and new ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ham.conformance import Finding

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
    check = actions.add_parser("check", help="run the conformance rules on one of them")
    check.add_argument("name", metavar="NAME", help="registered name")
    check.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    check.add_argument(
        "--rules",
        metavar="RULE,...",
        help="only these, or `all` for the slow ones too; see `ham baselines rules`",
    )
    check.add_argument(
        "--import",
        dest="sources",
        metavar="SOURCE",
        action="append",
        default=[],
        help="a .py file or a module outside the repository that registers NAME; repeatable",
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
        slow = "" if rule.quick else " (slow: only by name or with `all`)"
        print(f"{name:<{width}}  {rule.summary}{slow}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Print what each rule found; 1 if one is broken."""
    from ham.conformance import RULES, check, choose_rules
    from ham.device import resolve_device
    from ham.model.registry import load_baseline

    names = None
    if arguments.rules is not None:
        names = [name.strip() for name in arguments.rules.split(",")]
        names = list(RULES) if names == ["all"] else names
        choose_rules(names)
    device = str(resolve_device(arguments.device))
    for source in arguments.sources:
        load_baseline(source)
    findings = check(arguments.name, device, names)
    print("\n".join(table(findings)))
    broken = [finding for finding in findings if finding.passed is False]
    for finding in broken:
        print(f"\n{finding.rule}: {RULES[finding.rule].summary}\n  {finding.message}")
    kept = sum(finding.passed is True for finding in findings)
    spared = len(findings) - kept - len(broken)
    print(f"\n{arguments.name} on {device}: {kept} kept, {len(broken)} broken, {spared} not judged")
    return RULE_BROKEN if broken else 0


def table(findings: list[Finding]) -> list[str]:
    """One line per finding under a line of headings."""
    rows = [("rule", "verdict", "measured", "limit", "unit", "seconds")]
    for finding in findings:
        judged = finding.limit == finding.limit
        rows.append(
            (
                finding.rule,
                VERDICTS[finding.passed],
                f"{finding.measured:.3g}" if judged else "-",
                f"{finding.limit:g}" if judged else "-",
                finding.message if finding.passed is None else finding.unit,
                f"{finding.seconds:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


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
