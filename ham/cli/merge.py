"""`ham merge`: publish the union of pieces of one experiment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ham.cli._options import add_evidence_argument, add_samples_argument

MOST_LINES = 20


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham merge`."""
    parser = subparsers.add_parser("merge", help="publish the union of pieces of one experiment")
    parser.add_argument(
        "pieces", type=Path, nargs="+", metavar="PIECE", help="of `ham pack`, or results/runs/NAME"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new folder of results/published"
    )
    add_evidence_argument(parser, "published folders, e.g. of speeds, which are copied")
    add_samples_argument(parser)
    parser.add_argument("--check", action="store_true", help="say what is missing, write nothing")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the pieces, publish their union, make its report, name what is missing."""
    from ham.pieces.archive import open_piece
    from ham.pieces.merge import unite
    from ham.report.publish import build_published, publish_files, require_unpublished
    from ham.report.thinning import thin_layer_curves
    from ham.report.verify import published_name

    root, name = published_name(arguments.out)
    if not arguments.check:
        require_unpublished(name, root)
    union = unite([open_piece(path) for path in arguments.pieces])
    if not arguments.check:
        files = {
            path: thin_layer_curves(content) if path.endswith(".jsonl") else content
            for path, content in union.files.items()
        }
        written = publish_files(
            union.tasks.config,
            files,
            name,
            root,
            union.studies,
            arguments.evidence,
            union.pages,
            union.answers if arguments.samples else None,
        )
        print(f"{len(written)} rows files in {arguments.out}")
        for page in build_published(name, root):
            print(page)
    if len(union.commits) > 1:
        print(f"ham: warning: jobs of {len(union.commits)} commits: {', '.join(union.commits)}")
    total = len(union.present) + len(union.missing)
    print(f"{len(union.present)} of {total} jobs with rows are there")
    if union.studies:
        # Rows and manifest of each.
        print(f"{len(union.studies) // 2} runs of studies are there")
    absent = [task.name for task in union.missing] + union.missing_runs + union.missing_pages
    for name in absent[:MOST_LINES]:
        print(f"missing: {name}", file=sys.stderr)
    if len(absent) > MOST_LINES:
        print(f"and {len(absent) - MOST_LINES} more", file=sys.stderr)
    return 0
