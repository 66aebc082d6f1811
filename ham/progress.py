"""Progress on standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")

LOG_SECONDS = 15.0


class ProgressReporter:
    """Counts work done and says how far it is; use as a context manager.

    Args:
        description: What is being done.
        total: Number of units.
        done: Units done before this process began (a resumed run).
    """

    def __init__(self, description: str, total: int, done: int = 0):
        self.description = description
        self.total = total
        self.done = done
        self._begin = self._last_line = time.monotonic()
        self._first = done
        self._bar = None

    def __enter__(self) -> ProgressReporter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.done, note=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` more units done, with a short note on their state."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_SECONDS or self.done == self.total:
            self._last_line = now
            left = (now - self._begin) / max(1, self.done - self._first) * (self.total - self.done)
            print(
                f"{self.description}: {self.done}/{self.total}, {left:.0f} s left  {note}",
                file=sys.stderr,
                flush=True,
            )


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield `items` while reporting progress."""
    with ProgressReporter(description, total) as progress:
        for item in items:
            yield item
            progress.advance()
