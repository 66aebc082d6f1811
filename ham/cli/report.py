"""`ham report`: tables, figures and one HTML page from result rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from ham.cli._options import add_evidence_argument


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham report`."""
    parser = subparsers.add_parser("report", help="tables, figures and one page from result rows")
    parser.add_argument(
        "--rows", type=Path, nargs="+", required=True, metavar="FILE", help="JSON-lines files"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="configuration of the experiment"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="further manifests; those beside the rows files are found by themselves",
    )
    parser.add_argument(
        "--inspection",
        type=Path,
        metavar="PAGE",
        help="page of `ham inspect` to link, with its rows; it must lie in the folder written",
    )
    parser.add_argument(
        "--claims",
        type=Path,
        metavar="FILE",
        help="claims to judge (default: workflow/config/claims.yaml)",
    )
    add_evidence_argument(parser, "folders with rows of studies or of speed measurements")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Read rows and manifests, write the report, name its page."""
    from ham.claims.config import load_claims, shipped_claims
    from ham.claims.evidence import gather_evidence
    from ham.config_files import load_config
    from ham.report.rows import read_rows

    inspection = inspection_link(arguments.inspection, arguments.out)
    files = [*arguments.rows, *inspected_rows(arguments.inspection)]
    rows = read_rows(files)
    config = load_config(arguments.config) if arguments.config else None
    manifests = find_manifests(files, arguments.manifest)
    claims_file = shipped_claims() if arguments.claims is None else arguments.claims
    claims = load_claims(claims_file)
    # After the rows are known to be good: matplotlib and pandas take a second to load.
    from ham.progress import ProgressReporter
    from ham.report.build import build_report, figure_count

    with ProgressReporter("report", figure_count()) as progress:
        listing = build_report(
            rows,
            arguments.out,
            config=config,
            manifests=manifests,
            inspection=inspection,
            claims=claims,
            source=common_folder(arguments.rows),
            evidence=gather_evidence(arguments.evidence),
            claims_file=None if claims_file.resolve() == shipped_claims() else str(claims_file),
            progress=lambda name: progress.advance(note=name),
        )
    print(f"{arguments.out / 'index.html'}")
    for item in listing["skipped"]:
        print(f"not drawn: {item['title']}: {item['reason']}")
    if listing["failed_rows"]:
        print(f"{listing['failed_rows']} failed cells are listed on the page")
    return 0


def inspection_link(page: Path | None, out: Path) -> str | None:
    """The page of kept tokens as the report links it: relative to the report's folder."""
    from ham.errors import ConfigError, MissingDataError

    if page is None:
        return None
    if not page.is_file():
        raise MissingDataError(f"{page} does not exist; `ham inspect` writes it")
    if not page.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--inspection must lie in the folder of --out, {out}; received {page}")
    return page.resolve().relative_to(out.resolve()).as_posix()


def inspected_rows(page: Path | None) -> list[Path]:
    """The rows that `ham inspect` left beside its page, if it did."""
    beside = None if page is None else page.with_suffix(".rows.jsonl")
    return [beside] if beside is not None and beside.is_file() else []


def common_folder(rows_files: list[Path]) -> str:
    """The folder that holds all rows files, relative to the working directory where it is below."""
    import os

    folder = Path(os.path.commonpath([path.resolve().parent for path in rows_files]))
    here = Path.cwd()
    return (folder.relative_to(here) if folder.is_relative_to(here) else folder).as_posix()


def find_manifests(rows_files: list[Path], named: list[Path]) -> list[dict]:
    """The manifests beside rows files where there are any, and those named, which must exist."""
    from ham.report.manifest import manifest_path, read_manifest

    beside = [path for path in map(manifest_path, rows_files) if path.is_file()]
    return [read_manifest(path) for path in [*beside, *named]]
