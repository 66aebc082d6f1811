"""What the launchers of Triton kernels ask about the device they launch on.

One place, so that the static gate (`ham kernels gate`) can stand in for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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


def asked_once(question: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the answers to a question about the machine, which do not change while it runs.

    The mark tells `torch.compile` to ask, not to trace what it could not trace. It is what
    `torch.compiler.assume_constant_result` sets, which would import all of torch._dynamo. Dynamo
    looks through `functools.cache`, hence the plain function around it.
    """
    cached = functools.cache(question)

    def answer(*arguments: Any) -> Any:
        return cached(*arguments)

    answer._dynamo_marked_constant = True
    return answer


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, as asked for by `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_available(device: torch.device) -> bool:
    """An NVIDIA GPU from Ampere on, or a CPU in Triton's interpreter."""
    if device.type == "cuda":
        return _modern_gpu(device.index)
    return device.type == "cpu" and interpreting() and _triton_installed()


def target_of(device: torch.device) -> Target:
    """The target that kernels on `device` are cut for; on a CPU (interpreter) an H100."""
    if _stand_in is not None:
        return _stand_in
    if device.type != "cuda":
        return H100
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@asked_once
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@asked_once
def _properties(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target((properties.major, properties.minor), properties.multi_processor_count)


@asked_once
def _modern_gpu(index: int | None) -> bool:
    if not (_triton_installed() and torch.cuda.is_available() and torch.version.cuda is not None):
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


@contextlib.contextmanager
def stand_in(target: Target) -> Iterator[None]:
    """Let launchers believe that every device is `target`."""
    global _stand_in
    before, _stand_in = _stand_in, target
    try:
        yield
    finally:
        _stand_in = before
