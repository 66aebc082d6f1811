"""Reading the device's counters without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class CountCopy(Protocol):
    """A copy of the counters, on its way to the host."""

    def ready(self) -> bool:
        """Whether it has arrived."""

    def values(self) -> np.ndarray:
        """The counters `[L, B]`; waits until they have arrived."""


CountCopier = Callable[[Tensor], CountCopy]
"""Starts a copy of `counts_LB` as it stands after everything enqueued so far."""


class _Arrived:
    """A copy of counters that were on the host already."""

    def __init__(self, counts_LB: Tensor):
        self._values = counts_LB.numpy().copy()

    def ready(self) -> bool:
        return True

    def values(self) -> np.ndarray:
        return self._values


class _Travelling:
    """A copy into a pinned buffer, complete when its event is."""

    def __init__(self, buffer_LB: Tensor, event: torch.cuda.Event):
        self._buffer_LB = buffer_LB
        self._event = event

    def ready(self) -> bool:
        return self._event.query()

    def values(self) -> np.ndarray:
        self._event.synchronize()
        return self._buffer_LB.numpy().copy()


class _PinnedRing:
    """Copies through a ring of pinned buffers; an older copy than the ring is long is lost."""

    def __init__(self, like_LB: Tensor, length: int):
        shape, dtype = like_LB.shape, like_LB.dtype
        # The buffers outlive the inference mode they may have been made in.
        with torch.inference_mode(False):
            self._buffers = [
                torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(length)
            ]
        self._events = [torch.cuda.Event() for _ in range(length)]
        self._next = 0

    def __call__(self, counts_LB: Tensor) -> CountCopy:
        buffer_LB, event = self._buffers[self._next], self._events[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        buffer_LB.copy_(counts_LB, non_blocking=True)
        event.record()
        return _Travelling(buffer_LB, event)


def count_copier(counts_LB: Tensor, in_flight: int) -> CountCopier:
    """The copier for the device of `counts_LB`, with at most `in_flight` unread copies."""
    if counts_LB.device.type == "cuda":
        return _PinnedRing(counts_LB, in_flight)
    return _Arrived
