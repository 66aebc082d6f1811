"""One optimiser step, launched operation by operation, compiled, or replayed as a CUDA graph.

A small model's step is a few thousand launches, which cost the host more than the GPU needs for
the work: on one H100 a compiled step of the 5 M-parameter HAM keeps the GPU busy for 28 of the 50
ms that it takes (kernels/LOG.md, 2026-11-25). A graph replays all of them with one call.

Nothing is run twice for the sake of a capture: the first steps are ordinary ones, and recording
executes nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ham.config import TrainConfig
from ham.errors import DeviceError, UnusableModelError
from ham.kernels.sdpa import fastest_first
from ham.model.decoder import count_targets
from ham.model.language_model import LanguageModel
from ham.model.mixer import MixerAux
from ham.model.precision import precision_context
from ham.train.compiled import LossFunction, compiled_loss
from ham.train.optimiser import make_capturable, set_learning_rate

COMPILED_STEPS = 3
"""Ordinary steps before a capture: the first compiles, the others settle the allocator."""

LaunchMode = Literal["eager", "compiled", "cuda_graph"]


class StepResult(NamedTuple):
    """What a step reports; on the device, reading it waits.

    Attributes:
        loss: Mean loss in nats per token.
        fractions: Share of tokens kept in each layer that routes.
    """

    loss: Tensor
    fractions: list[Tensor]


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Note where torch waits for the device, which a capture cannot."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [text for text in (str(each.message) for each in caught) if "synchron" in text]
    finally:
        torch.cuda.set_sync_debug_mode(before)


class OptimiserStep:
    """Forward and backward over the micro-batches of a batch, clipping, AdamW, thresholds.

    Args:
        model: In training mode.
        optimiser: Its state may be replaced until the first step.
        settings: `compile`, `launch`, `accumulate`, `gradient_clip` and `precision` are read.

    Attributes:
        launch_mode: How the last step was launched.
        note: Why there is no graph although there could be one; None otherwise.

    Raises:
        DeviceError: If a graph was asked for by name and cannot be had; at the latest from a step.
    """

    def __init__(
        self, model: LanguageModel, optimiser: torch.optim.Optimizer, settings: TrainConfig
    ):
        self.model = model
        self.optimiser = optimiser
        self.settings = settings
        self.launch_mode: LaunchMode = "eager"
        self.note: str | None = None
        on_gpu = model.device.type == "cuda"
        if settings.launch == "cuda_graph" and not on_gpu:
            raise DeviceError(f"train.launch 'cuda_graph' needs a CUDA device, not {model.device}")
        self._wants_graph = settings.launch != "eager" and on_gpu
        self._plain_steps = 0
        self._compiled = compiled_loss(model) if settings.compile else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result: StepResult | None = None

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor, rate: float) -> StepResult:
        """Do one step at the learning rate `rate`, on token ids on the host or the device."""
        batch = [self._to_device(tokens_BT) for tokens_BT in (inputs_BT, targets_BT)]
        if self._wants_graph and self._plain_steps == 0:
            make_capturable(self.optimiser)
        set_learning_rate(self.optimiser, rate)
        if self._graph is None and self._wants_graph and self._plain_steps > COMPILED_STEPS:
            self._capture(batch)
        if self._graph is None:
            return self._run_plainly(batch)
        for held, given in zip(self._inputs, batch, strict=True):
            held.copy_(given)
        self._graph.replay()
        # The next replay writes over the result.
        return StepResult(self._result.loss.clone(), [x.clone() for x in self._result.fractions])

    def _to_device(self, tokens_BT: Tensor) -> Tensor:
        if self.model.device.type != "cuda" or tokens_BT.is_cuda:
            return tokens_BT.to(self.model.device)
        return tokens_BT.pin_memory().to(self.model.device, non_blocking=True)

    def _run_plainly(self, batch: list[Tensor]) -> StepResult:
        # The quantile at which thresholds start is taken by code that is not to be compiled.
        started = all([controller.settle() for controller in self.model.controllers])
        compiled = self._compiled if started else None
        self.launch_mode = "eager" if compiled is None else "compiled"
        self._plain_steps += 1
        if not self._wants_graph or self._plain_steps <= COMPILED_STEPS:
            return self._step(batch, compiled)
        with waits() as found:
            result = self._step(batch, compiled)
        if found:
            self._refuse(found[0])
        return result

    def _capture(self, batch: list[Tensor]) -> None:
        """Record a step; where torch cannot, `_refuse`."""
        self._inputs = [tokens_BT.clone() for tokens_BT in batch]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self._step(self._inputs, self._compiled)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, UnusableModelError) as error:
            self._refuse(str(error))
            return
        self._graph, self.launch_mode = graph, "cuda_graph"

    def _refuse(self, reason: str) -> None:
        reason = f"a training step cannot be a CUDA graph: {reason.splitlines()[0]}"
        if self.settings.launch == "cuda_graph":
            raise DeviceError(reason)
        self._wants_graph, self.note = False, reason

    def _step(self, batch: list[Tensor], compiled: LossFunction | None) -> StepResult:
        self.optimiser.zero_grad(set_to_none=True)
        parts = self.settings.accumulate
        device = self.model.device
        targets = count_targets(batch[1]).clamp(min=1)
        total = torch.zeros((), device=device)
        shares: list[list[Tensor]] = []
        for inputs_BT, targets_BT in zip(*(each.chunk(parts) for each in batch), strict=True):
            with fastest_first(device), precision_context(device, self.settings.precision):
                loss, reports = (compiled or self._plain_loss)(inputs_BT, targets_BT)
            # By targets, not by rows: recall rows have few, and would weigh more when cut apart.
            share = count_targets(targets_BT) / targets
            (loss * share).backward()
            total += loss.detach() * share
            kept = [aux.kept_share_BT() for aux in reports]
            shares.append([share_BT.mean() for share_BT in kept if share_BT is not None])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimiser.step()
        self.model.end_step()
        return StepResult(total, [torch.stack(layer).mean() for layer in zip(*shares, strict=True)])

    def _plain_loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, list[MixerAux]]:
        loss, output = self.model.loss(inputs_BT, targets_BT)
        return loss, output.aux
