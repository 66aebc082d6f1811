"""`ham export`: a trained model as a folder that Hugging Face tools load."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham export`."""
    parser = subparsers.add_parser("export", help="write a model as a Hugging Face folder")
    parser.add_argument("checkpoint", type=Path, help="folder of the model")
    parser.add_argument("folder", type=Path, help="where to; a new or an empty folder")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and name its files."""
    from ham.hf.requirement import require_transformers

    require_transformers()
    from transformers.utils import logging

    from ham.hf import export

    logging.disable_progress_bar()
    export(arguments.checkpoint, arguments.folder)
    for path in sorted(arguments.folder.iterdir()):
        print(f"{path} {path.stat().st_size:,} bytes")
    return 0
