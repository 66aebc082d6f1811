"""Times of the parts of a decode step, each launched as the whole step is where that can be had.

What the fused form of a part cannot do costs that part its fused form, not the cell its times: it
is tried again in plain operations, then without a CUDA graph, and its row says which and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ham.kernels.speed.clock import GpuLostError, Task, capture, recover
from ham.measure.sweep.causes import whole_cause
from ham.measure.sweep.ops import PLAIN
from ham.report.statistics import Estimate

if TYPE_CHECKING:
    from ham.measure.sweep.run import Sweep
    from ham.measure.sweep.sessions import DecodeSession

GRAPH, EAGER = "cuda_graph", "eager"


@dataclass(frozen=True)
class PartTime:
    """One part of a step.

    Attributes:
        time: Milliseconds for all layers; None where it cannot be measured.
        launch_mode: How it was launched.
        operations: What the operations between matrix products were made of.
        fused: What else the same launch does, where it does more than its name says.
        error: Why there is no time.
        note: Why it was not launched, or not fused, as the whole step is.
    """

    time: Estimate | None
    launch_mode: str
    operations: str
    fused: str | None = None
    error: str | None = None
    note: str | None = None

    def labels(self) -> dict[str, str]:
        """The fields of the row besides its time; what is not known is left out."""
        found = {"operations": self.operations, "fused": self.fused, "note": self.note}
        return {name: value for name, value in found.items() if value is not None}


def part_times(session: DecodeSession, sweep: Sweep) -> dict[str, PartTime]:
    """Every part of a captured session, or why it has no time."""
    fused = session.fused_parts()
    forms, reasons = _forms(session)
    names = dict.fromkeys(name for _, _, parts in forms for name in parts)
    return {
        name: replace(_part_time(name, forms, list(reasons), sweep), fused=fused.get(name))
        for name in names
    }


Form = tuple[str, str, Mapping[str, Callable[[], object]]]
"""Operations, launch mode, and the parts made of these operations."""


def _forms(session: DecodeSession) -> tuple[list[Form], list[str]]:
    """The forms that can be made, that of the whole step first, and why others cannot."""
    made, reasons = {}, []
    for operations in dict.fromkeys((session.operations, PLAIN)):
        try:
            made[operations] = session.parts(operations)
        except (torch.OutOfMemoryError, GpuLostError):
            raise
        except Exception as error:
            reasons.append(f"{operations}: {whole_cause(error)}")
    if not made:
        raise RuntimeError("; ".join(reasons))
    modes = dict.fromkeys((session.launch_mode, EAGER))
    return [(name, mode, parts) for mode in modes for name, parts in made.items()], reasons


def _part_time(name: str, forms: list[Form], reasons: list[str], sweep: Sweep) -> PartTime:
    """The first form of a part that can be measured."""
    for operations, launch_mode, parts in forms:
        try:
            time = _time(parts[name], launch_mode, sweep)
        except (torch.OutOfMemoryError, GpuLostError):
            raise
        except Exception as error:
            # Whatever a compiler or a capture raises; the next form may do without it.
            reasons.append(f"{operations} in {launch_mode}: {whole_cause(error)}")
        else:
            return PartTime(time, launch_mode, operations, note="; ".join(reasons) or None)
        # Outside of the handler, whose exception holds the frames and with them the tensors.
        recover(name)
    return PartTime(None, forms[0][1], forms[0][0], error="; ".join(reasons))


def _time(run: Callable[[], object], launch_mode: str, sweep: Sweep) -> Estimate:
    with torch.inference_mode():
        # Compiles kernels and builds plans, which may wait for the device; a capture must not.
        run()
    if launch_mode == GRAPH:
        return sweep.time(capture(Task(run, torch.inference_mode)).replay)
    with torch.inference_mode():
        return sweep.time(run)
