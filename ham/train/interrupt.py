"""A batch system's warning signal ends a training run after a checkpoint, not within a step."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that the process was told to end.

    Attributes:
        signal: Number of the last signal, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the place of the handlers of SIGTERM and SIGUSR1."""

        def remember(number: int, frame: object) -> None:
            self.signal = number

        before = {number: signal.signal(number, remember) for number in HANDLED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave(self, step: int) -> None:
        """Say at which step the state was saved, and end.

        Raises:
            SystemExit: With status 128 + n after signal n.
        """
        name = signal.Signals(self.signal).name
        print(f"{name}: state saved at step {step}; rerun to continue", file=sys.stderr)
        raise SystemExit(128 + self.signal)
