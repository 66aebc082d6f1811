"""What is timed in each mode: a call of a subject on tensors made before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ham.kernels.speed.checks import make_leaves
from ham.kernels.speed.clock import Graph, Task, capture
from ham.kernels.speed.problems import Inputs
from ham.kernels.speed.subjects import Subject
from ham.kernels.verify import relative_norm

REPLAY_TOLERANCE = 1e-2


def make_task(subject: Subject, inputs: Inputs, weight: Tensor | None, mode: str) -> Task:
    """The call of a subject in a mode; its tensors are made here, outside of the timed region."""
    with subject.setting():
        leaves = make_leaves(subject.prepare(inputs))
    return Task(_call(subject, leaves, weight, mode), subject.setting)


def _call(
    subject: Subject, leaves: dict[str, Any], weight: Tensor | None, mode: str
) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return subject.timed(leaves)

    def saving() -> Any:
        with torch.enable_grad():
            return subject.timed(leaves)

    wanted = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]

    def both() -> Any:
        with torch.enable_grad():
            outputs = subject.timed(leaves)
            read_out = next(iter(outputs.values()))
            gradients = torch.autograd.grad(read_out, wanted, weight, materialize_grads=True)
        return {**{name: one.detach() for name, one in outputs.items()}, "gradients": gradients}

    return {"forward": forward, "forward_saving": saving, "forward_backward": both}[mode]


def capture_checked(task: Task) -> Graph:
    """Capture a task and compare what a replay gives with what the call gives.

    Results are overwritten before the replay: one that the graph does not make would be missed.

    Raises:
        ValueError: If they differ by more than rounding in another order could explain.
    """
    with task.setting():
        expected = [one.detach().clone() for one in _tensors(task.run())]
    graph = capture(task)
    found = [one.detach() for one in _tensors(graph.result)]
    for value in found:
        value.fill_(torch.nan if value.is_floating_point() else -1)
    graph.replay()
    torch.cuda.synchronize()
    for value, wanted in zip(found, expected, strict=True):
        error = relative_norm(value, wanted)
        if not error <= REPLAY_TOLERANCE:
            raise ValueError(f"a replay of the graph differs from the call by {error:.1e}")
    return graph


def _tensors(result: Any) -> list[Tensor]:
    """The read-out, and the gradients where there are any: what a replay is judged by."""
    read_out = next(iter(result.values()))
    return [read_out, *result.get("gradients", ())]
