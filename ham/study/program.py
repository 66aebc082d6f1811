"""Several runs trained in one program, whose kernels each carry all of them.

Steps of this size are bound by the number of kernels, so that runs of one arm, which differ in
seed, learning rate or task alone, are cheaper together: `torch.vmap` gives every weight, buffer and
batch an axis of runs (`ham.kernels.runs` says what the kernels make of that). Each run has the
weights, the batches and the thresholds that it would have alone, and its own norm for clipping;
sums go in another order, so losses agree to rounding. A run that diverges stays alone with that.

Letters: R runs, U sets of batches, S steps, N weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ham.errors import HamError
from ham.model.mixer import RoutingHints
from ham.study.config import MqarTrain
from ham.study.data import Batch
from ham.study.model import RecallModel
from ham.study.stacked import StackedAdamW, StackedModels
from ham.study.training import Steps, TrainingData

# Relative distance between the gradient of a run in the program and alone, by precision; that of
# two different runs is about 1.4.
AGREEMENT = {"float32": 0.02, "bfloat16": 0.3}
NUDGE = 1e-4


class NotOneProgramError(HamError):
    """Runs that cannot be trained in one program; each can be trained alone."""


class JointData:
    """Batches of several tasks and seeds, for programs of any of their runs.

    Args:
        parts: Each with the same mixture and number of steps.

    Attributes:
        stores: For each size, batches with leading axes `[U, S]`.
        calibration: For each part, the batches that set its thresholds.
    """

    def __init__(self, parts: Sequence[TrainingData]):
        self.schedule, self.cycle = parts[0].schedule, parts[0].cycle
        self.stores = [
            Batch(*(torch.stack(tensors) for tensors in zip(*map(_tensors, same), strict=True)))
            for same in zip(*(part.stores for part in parts), strict=True)
        ]
        self.calibration = [part.calibration for part in parts]


class Program(Steps):
    """Runs of one arm, width and mixture.

    Args:
        models: One for each run, on the device; their tensors become views of those of all runs.
        data: The batches.
        parts: Which part of `data` each run reads.
        settings: Steps, optimiser, precision.
        learning_rates: Peak rate of each run.
        graphs: Whether a GPU replays its steps as CUDA graphs.
    """

    def __init__(
        self,
        models: Sequence[RecallModel],
        data: JointData,
        parts: Sequence[int],
        settings: MqarTrain,
        learning_rates: Sequence[float],
        graphs: bool = True,
    ):
        super().__init__(models, data.schedule, data.cycle, data.stores, settings, graphs)
        self.data, self.parts = data, list(parts)
        self.part_R = torch.tensor(self.parts, device=self.device)
        self.stacked = StackedModels(models, settings.weight_decay)
        self.leaves = self.stacked.leaves
        self.optimiser = StackedAdamW(self.stacked, settings, learning_rates)
        # The modules of the first run with the tensors of all; whatever tells runs apart is a
        # tensor, which `start` makes sure of.
        self._loss, self._move = _Loss(models[0]), _EndStep(models[0])

    def learn(self, size: int) -> Tensor:
        """Update the weights with the next batch of size `size`; `losses_R` before that."""
        losses_R, grads = self._gradients(self._next_batch(size))
        self.optimiser.step(grads, self.step_index_1)
        return losses_R.detach()

    def end_cycle(self) -> None:
        """Let the thresholds follow what they observed."""
        torch.vmap(self._moved)(self.stacked.buffers)

    def _prepare(self) -> None:
        """Set the thresholds' start, and compare with the runs alone.

        Raises:
            NotOneProgramError: If a run's gradient is not what it is alone.
        """
        super()._prepare()
        for controller in self.models[0].controllers:
            # Asked now, because under `torch.vmap` nothing may wait for the device.
            controller.settle()
        before = [value.clone() for value in self._state()]
        for model in self.models:
            for controller in model.controllers:
                # It is a score of the calibration; where that comes again, rounding would decide.
                controller.threshold.mul_(1 - NUDGE)
        batch = self._next_batch(0)
        _, grads = self._gradients(batch)
        limit = AGREEMENT[self.settings.precision]
        for run, model in enumerate(self.models):
            with self._precision():
                loss = model.loss(batch.map(lambda x, run=run: x[run]))
            parameters = dict(model.named_parameters())
            alone = torch.autograd.grad(loss, [parameters[name] for name in self.leaves])
            distance = _distance([grad[run] for grad in grads], alone)
            # Also if it is NaN.
            if not distance <= limit:
                raise NotOneProgramError(
                    f"the gradient of run {run + 1} of {len(self.models)} is {distance:.2g} of its "
                    f"size away from that of the run alone; legal: up to {limit}"
                )
        self._restore(before)

    def _next_batch(self, size: int) -> Batch:
        return self.stores[size].map(lambda x: x[self.part_R, self.batch_index_1[size]])

    def _gradients(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses, and the gradients of all weights with an axis of runs."""
        with self._precision():
            losses_R = torch.vmap(self._one_loss)(self.leaves, self.stacked.buffers, vars(batch))
        # A loss depends on the weights of its run alone, so the sum keeps the gradients apart.
        return losses_R, torch.autograd.grad(losses_R.sum(), list(self.leaves.values()))

    def _one_loss(
        self, weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> Tensor:
        """The loss of one run."""
        return functional_call(self._loss, _inside({**weights, **buffers}), (Batch(**batch),))

    def _moved(self, buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(self._move, _inside(buffers), ())

    def _calibration(self, run: int) -> list[RoutingHints]:
        return self.data.calibration[self.parts[run]]

    def _state(self) -> Iterator[Tensor]:
        yield from self.stacked.tensors()

    def _moments(self) -> Iterator[Tensor]:
        yield from self.stacked.moments()


class _Loss(nn.Module):
    """A model whose forward is its loss."""

    def __init__(self, model: RecallModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.loss(batch)


class _EndStep(nn.Module):
    """A model whose forward moves its thresholds, and gives them because a forward must."""

    def __init__(self, model: RecallModel):
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        self.model.end_step()
        return torch.stack([controller.threshold for controller in self.model.controllers])


def _tensors(batch: Batch) -> list[Tensor]:
    return [*vars(batch).values()]


def _inside(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as a module has them that holds the model."""
    return {f"model.{name}": value for name, value in tensors.items()}


def _distance(grads: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Norm of the difference by the norm of `others`."""
    difference = [grad - other for grad, other in zip(grads, others, strict=True)]
    norms = [
        torch.stack(torch._foreach_norm([*part])).norm() for part in (difference, list(others))
    ]
    return float(norms[0] / norms[1])
