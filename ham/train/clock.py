"""How long training takes, in all and once everything is compiled."""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP = 20
"""Steps of a process that the steady speed leaves out: compilation, first allocations, capture."""


@dataclass
class StepClock:
    """Adds up the time of optimiser steps.

    A device works behind the host, so only the time between two moments at which the host waited
    for it is known.

    Attributes:
        seconds: Of all steps, of earlier processes too.
        steady_seconds, steady_steps: Of this process, from the first wait after `WARM_UP` steps up
            to the last one.
    """

    seconds: float = 0.0
    steady_seconds: float = 0.0
    steady_steps: int = 0
    _steps: int = 0
    _unknown_seconds: float = 0.0
    _unknown_steps: int = 0

    def add(self, seconds: float, waited: bool) -> None:
        """Count one step; `waited` says that the device has done all of them now."""
        self.seconds += seconds
        self._unknown_seconds += seconds
        self._unknown_steps += 1
        if not waited:
            return
        if self._steps >= WARM_UP:
            self.steady_seconds += self._unknown_seconds
            self.steady_steps += self._unknown_steps
        self._steps += self._unknown_steps
        self._unknown_seconds, self._unknown_steps = 0.0, 0
