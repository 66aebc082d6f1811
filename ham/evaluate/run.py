"""Everything that is asked of one trained model, in one process, as result rows."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ham.config import ArmConfig, Config
from ham.errors import HamError, UnusableModelError
from ham.evaluate import dial, gates, language_modelling, lm_eval_run, needle, recall
from ham.evaluate.part import Cell, Fields, Subject
from ham.model.precision import precision_context
from ham.model.sizing import model_config
from ham.progress import ProgressReporter
from ham.report.rows import RowWriter
from ham.train.tokenizer import load_tokenizer

PARTS: tuple[Callable[[Subject], list[Cell]], ...] = (
    language_modelling.cells,
    gates.cells,
    lm_eval_run.cells,
    needle.cells,
    recall.cells,
    dial.cells,
)


def plan_cells(subject: Subject) -> list[Cell]:
    """All cells of the configured parts.

    Raises:
        HamError: If a part cannot be asked of this model or its data are missing; nothing was
            run then.
    """
    return [cell for part in PARTS for cell in part(subject)]


def expected_rows(config: Config, arm: ArmConfig, data: Path) -> list[Fields]:
    """Coordinates of the main rows of an arm that has no model.

    They are those of full attention in the same decoder, whose cells no option of the arm decides.

    Raises:
        HamError: As `plan_cells`.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, data)
    unmatched = config.model.model_copy(update={"match_parameters": False})
    plain = config.model_copy(update={"model": unmatched})
    stand_in = ArmConfig(name=arm.name, mixer="transformer")
    with torch.device("meta"):
        model = model_config(plain, stand_in, tokenizer.vocabulary_size).build()
    cells = plan_cells(Subject(config, model, tokenizer, data))
    return [fields for cell in cells for fields in cell.expected]


def evaluate(subject: Subject, writer: RowWriter, title: str) -> int:
    """Run every configured part and add its rows.

    A cell that raises becomes error rows at its coordinates and the others go on.

    Returns:
        The number of cells that failed.

    Raises:
        HamError: For a fault of the configuration, the checkpoint or the data.
    """
    cells = plan_cells(subject)
    failed = 0
    precision = subject.config.train.precision
    with (
        ProgressReporter(title, len(cells)) as progress,
        precision_context(subject.model.device, precision),
    ):
        for cell in cells:

            def tick(done: int, total: int, name: str = cell.name) -> None:
                progress.advance(0, f"{name}: {done}/{total}")

            subject.on_batch = tick
            failed += not run_cell(cell, writer)
            progress.advance(note=cell.name)
    return failed


def run_cell(cell: Cell, writer: RowWriter) -> bool:
    """Add the rows of one cell, or its error rows; returns whether it succeeded."""
    try:
        rows = cell.run()
    except Exception as error:
        unusable = isinstance(error, UnusableModelError)
        if isinstance(error, HamError) and not unusable:
            raise
        if not unusable:
            traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"ham: warning: {cell.name} failed: {reason}", file=sys.stderr)
        rows = [{**fields, "value": None, "error": reason} for fields in cell.expected]
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        for row in rows:
            writer.add(**row)
        return False
    for row in rows:
        writer.add(**row)
    return True
