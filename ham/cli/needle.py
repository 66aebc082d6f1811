"""`ham needle`: samples of the needle tasks to read, and how fast samples are made."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parsers of `ham needle samples` and `ham needle bench`."""
    parser = subparsers.add_parser("needle", help="RULER's retrieval tasks: samples, and speed")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("samples", help="ten samples of every task, beside its template")
    show.add_argument("--out", type=Path, help="Markdown file to write; printed when left out")
    show.add_argument("--count", type=int, default=10, help="samples of each task")
    show.set_defaults(handler=samples)
    bench = actions.add_parser(
        "bench", help="samples a minute of every task and of recall documents, on one core"
    )
    bench.add_argument("--data", type=Path, help="data folder, for its tokenizer and essays")
    bench.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    bench.set_defaults(handler=speed)


def samples(arguments: argparse.Namespace) -> int:
    """Print or write the samples of `ham/ruler/SAMPLES.md`."""
    from ham.errors import ConfigError
    from ham.files import write_text
    from ham.ruler.showcase import showcase

    if arguments.count < 1:
        raise ConfigError(f"--count must be at least 1, received {arguments.count}")
    text = showcase(arguments.count)
    if arguments.out is None:
        print(text, end="")
    else:
        write_text(arguments.out, text)
    return 0


def speed(arguments: argparse.Namespace) -> int:
    """Print samples a minute."""
    from ham.measure.samples import Haystack, needle_speeds, recall_speeds

    hay = Haystack.open(arguments.data)
    print(f"tokenizer {hay.tokenizer.name}, one core")
    for speeds in (needle_speeds, recall_speeds):
        for line in speeds(hay, arguments.length):
            print(line)
    return 0
