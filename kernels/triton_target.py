"""What the launchers of Triton kernels ask about the device they launch on.

One place, so that the static gate (`ham kernels gate`) can stand in for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A GPU as far as launchers care.

    Attributes:
        capability: Compute capability, e.g. (9, 0).
        multiprocessors: Their number.
    """

    capability: tuple[int, int]
    multiprocessors: int


H100 = Target((9, 0), 132)
A100 = Target((8, 0), 108)
_stand_in: Target | None = None


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, as asked for by `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_available(device: torch.device) -> bool:
    """An NVIDIA GPU from Ampere on, or a CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda":
        modern = torch.cuda.is_available() and torch.version.cuda is not None
        return modern and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and interpreting()


def target_of(device: torch.device) -> Target:
    """The target that kernels on `device` are cut for; on a CPU (interpreter) an H100."""
    if _stand_in is not None:
        return _stand_in
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    return Target((properties.major, properties.minor), properties.multi_processor_count)


@contextlib.contextmanager
def stand_in(target: Target) -> Iterator[None]:
    """Let launchers believe that every device is `target`."""
    global _stand_in
    before, _stand_in = _stand_in, target
    try:
        yield
    finally:
        _stand_in = before
