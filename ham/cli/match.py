"""`ham match`: the rivals of an arm at its parameters, its decoding memory, its training FLOPs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ham.matching import BUDGETS

if TYPE_CHECKING:
    from ham.matching.bench import Bench
    from ham.matching.budgets import Match

UNMATCHED = 1
HEADINGS = ("arm", "budget", "wanted", "as it is", "", "matched", "", "knob", "value", "verdict")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham match`."""
    parser = subparsers.add_parser(
        "match",
        help="size the rivals of an arm to equal parameters, bytes or FLOPs",
        description="Size every rival of an arm to its parameters (MLP width), to its bytes of "
        "cache and state at each length (the knob that the mixer declares), and to its training "
        "FLOPs (number of steps, the model as it is). Status 1 if one cannot be matched.",
    )
    parser.add_argument("config", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--arm", metavar="ARM", help="arm to match to (default: the first that routes)"
    )
    parser.add_argument(
        "--fraction", type=float, help="share of tokens that it keeps (default: its target)"
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="lengths at which bytes are matched (default: those that CONFIG evaluates)",
    )
    parser.add_argument(
        "--by", nargs="+", choices=BUDGETS, default=BUDGETS, help="default: all three"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="arms of CONFIG or registered baselines (default: every other arm)",
    )
    parser.add_argument(
        "--registered",
        action="store_true",
        help="also every registered baseline that no arm of CONFIG uses",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="legal relative difference of bytes and FLOPs (default: %(default)s); of parameters "
        "it is 0.01 always",
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write a configuration with the matched arms"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the configuration; 1 if something is unmatched."""
    from ham.config_files import load_config
    from ham.errors import ConfigError
    from ham.files import write_text
    from ham.matching import selection
    from ham.matching.bench import Bench
    from ham.matching.budgets import match_rival
    from ham.matching.written import matched_config

    if arguments.write and arguments.write.resolve() in {one.resolve() for one in arguments.config}:
        raise ConfigError(f"--write {arguments.write} is the file that is read; choose another")
    if not 0 <= arguments.tolerance < 1:
        raise ConfigError(f"--tolerance {arguments.tolerance} is not legal; legal: 0 to below 1")
    config = load_config(arguments.config, arguments.overrides)
    lengths = arguments.contexts or selection.evaluated_lengths(config)
    lengths = selection.check_lengths(config, lengths)
    name = arguments.arm or selection.reference_arm(config)
    bench = Bench(config, name, arguments.fraction)
    rivals = selection.choose_rivals(config, name, arguments.arms, arguments.registered)
    matches = [
        match
        for rival in rivals
        for match in match_rival(bench, rival, lengths, arguments.by, arguments.tolerance)
    ]
    print("\n".join(report_lines(bench, matches)))
    if arguments.write:
        write_text(arguments.write, matched_config(bench, matches, _command(arguments, name)))
        print(f"wrote {arguments.write}")
    return 0 if all(match.matched for match in matches) else UNMATCHED


def report_lines(bench: Bench, matches: Sequence[Match]) -> list[str]:
    """The table, why what is unmatched is, and what the numbers are."""
    from ham.inspect.shares import aligned_lines

    model = bench.measure(bench.reference).model
    keeps = f", which keeps {model.target_fraction:g} of the tokens" if model.routes else ""
    lines = [
        f"{bench.config.name}: matched to {bench.reference.name}{keeps}; "
        f"{bench.element_size} bytes an element of keys and values",
        "",
        *aligned_lines([HEADINGS, *map(_cells, matches)]),
        "",
    ]
    unmatched = [match for match in matches if not match.matched]
    lines += [f"{match.rival.name} {match.label}: {match.limit}" for match in unmatched]
    lines += [""] * bool(unmatched)
    lines += [
        f"{len(matches) - len(unmatched)} matched, {len(unmatched)} unmatched; parameters within "
        "1 %, bytes and FLOPs within the tolerance",
        "bytes: all that decoding has allocated for one sequence at that length (keys, values, "
        "positions, page tables, states, convolution inputs, unused slots)",
        "flops: three forward passes for every training token, without validation and calibration; "
        "matched through the number of steps",
    ]
    return lines


def _cells(match: Match) -> tuple[str, ...]:
    value = match.value
    return (
        match.rival.name,
        match.label,
        match.number(match.wanted),
        *_with_difference(match, match.before),
        *_with_difference(match, match.got),
        match.knob,
        "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value),
        "matched" if match.matched else "unmatched",
    )


def _with_difference(match: Match, value: float | None) -> tuple[str, str]:
    if value is None:
        return "-", "-"
    return match.number(value), f"{100 * match.difference(value):+.2f} %"


def _command(arguments: argparse.Namespace, arm: str) -> str:
    """The command with what decides its result."""
    words = ["ham", "match", *map(str, arguments.config), "--arm", arm]
    for override in arguments.overrides:
        words += ["--set", override]
    if arguments.fraction is not None:
        words += ["--fraction", str(arguments.fraction)]
    for option in ("contexts", "by", "arms"):
        values = getattr(arguments, option)
        words += [f"--{option}", *map(str, values)] if values else []
    words += ["--registered"] * arguments.registered
    return shlex.join([*words, "--tolerance", str(arguments.tolerance)])
