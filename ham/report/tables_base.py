"""What every table is made of: columns, records, and small helpers to fill them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ham.report.aggregate import Cell, Results, summarise_pooled
from ham.report.formats import Formatter

# A cell, a plain value, or None where a column does not apply to a model.
Entry = Cell | str | float | int | None
Record = dict[str, Entry]


@dataclass(frozen=True)
class Column:
    """One column: key in the CSV, title for readers, and how its numbers are written."""

    key: str
    title: str
    write: Formatter | None = None


@dataclass(frozen=True)
class Table:
    """A table of the report; `headline` names the columns shown on the first screen.

    `legend` explains signs and intervals; None stands for the legend of tables over seeds.
    """

    name: str
    title: str
    note: str
    columns: list[Column]
    records: list[Record]
    headline: tuple[str, ...] = ()
    legend: str | None = None

    def only(self, keys: Iterable[str]) -> Table:
        """The same table with some of its columns, in their own order."""
        wanted = set(keys)
        columns = [column for column in self.columns if column.key in wanted]
        return replace(self, columns=columns, headline=())


MODEL = Column("model", "model")


def models_of(results: Results, experiment: str, metric: str | None = None) -> list[str]:
    """Models with rows of an experiment (and metric), failed ones included."""
    have = {
        row.model
        for row in results.rows
        if row.experiment == experiment and metric in (None, row.metric)
    }
    return [model for model in results.models if model in have]


def optional(cell: Cell) -> Cell | None:
    """None instead of "not run", for columns that do not apply to every model."""
    return None if cell.status == "not run" else cell


def chance_level(results: Results, task: str, metric: str = "accuracy") -> float | None:
    """What guessing gets on a task, as its rows give it; None where that means nothing."""
    return summarise_pooled(results.find("lm_eval", f"chance_{metric}", task=task)).value
