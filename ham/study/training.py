"""Training as pure device work, so that a CUDA graph can hold a whole step.

All batches are drawn on the device beforehand; a step reads its batch, its learning rate and its
place in the log through counters on the device, and the host only says which size comes next. On a
GPU there is one graph for each size of the mixture, since a graph has fixed shapes; their memory is
shared, because they run one after another. On a CPU the same functions run eagerly.

Thresholds start at their targets' quantiles over one cycle of the mixture, follow their closed loop
once per cycle (not per step: sizes route different shares, and the loop would chase the order of
the sizes), and are calibrated and frozen for the last part of the run.

`Trainer` trains one run; `ham.study.program` several runs in one program, by the same `Steps`.

Letters: S steps, B batch, T tokens, P pairs, R runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ham.errors import HamError
from ham.model.calibration import calibrate
from ham.model.mixer import RoutingHints
from ham.model.precision import precision_context
from ham.routing import raise_on_bad_scores
from ham.study.config import MqarConfig, MqarTrain, Task
from ham.study.data import Batch, Examples, draw_examples, generator, mixture_schedule
from ham.study.model import RecallModel


class TrainingData:
    """All batches of a run: `stores[i]` has those of size i, with a leading axis of steps.

    Args:
        config: The study.
        task: What the examples look like.
        seed: Seed of the run; every arm and width of a seed reads the same batches.
        steps: Training steps.
        device: Where the batches are drawn and stay.

    Attributes:
        schedule: Which size each step uses.
        cycle: Steps in which every size comes as often as its weight says.
        calibration: A cycle of batches that set the thresholds.
    """

    def __init__(self, config: MqarConfig, task: Task, seed: int, steps: int, device: torch.device):
        batch_size, sizes = config.train.batch_size, config.mixture(task)
        self.schedule = mixture_schedule(sizes, steps)
        self.cycle = sum(size.weight for size in sizes)

        def draw(steps: int, index: int, purpose: str) -> Batch:
            examples: Examples = draw_examples(
                steps * batch_size,
                sizes[index],
                task,
                generator(device, purpose, seed, *task.key, str(sizes[index])),
                vocabulary_size=config.vocabulary_size,
            )
            return examples.batch.map(lambda x: x.unflatten(0, (steps, batch_size)))

        # A size that a short schedule misses still needs a batch to be captured with.
        self.stores = [
            draw(max(1, self.schedule.count(index)), index, "train") for index in range(len(sizes))
        ]
        self.calibration = [
            RoutingHints(*hints)
            for index, size in enumerate(sizes)
            for batch in [draw(size.weight, index, "calibration")]
            for hints in zip(batch.tokens_NT, batch.wanted_NT, strict=True)
        ]


class Steps(ABC):
    """Training steps over a mixture, each launched as a graph where there are graphs.

    Args:
        models: One for each run, on the device.
        schedule: Which size each step uses.
        cycle: Steps between moves of the thresholds.
        stores: For each size its batches; the axis of steps is the last but those of a batch.
        settings: Steps, optimiser, precision.
        graphs: Whether a GPU replays its steps as CUDA graphs.
    """

    def __init__(
        self,
        models: Sequence[RecallModel],
        schedule: list[int],
        cycle: int,
        stores: list[Batch],
        settings: MqarTrain,
        graphs: bool,
    ):
        self.models, self.settings = list(models), settings
        self.schedule, self.cycle, self.stores = schedule, cycle, stores
        self.device = device = models[0].device
        self.position = 0
        self.freeze_position = round(settings.steps * settings.freeze_fraction)
        self.losses_RS = torch.full((len(models), settings.steps), math.nan, device=device)
        self.step_index_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.batch_index_1 = [torch.zeros_like(self.step_index_1) for _ in stores]
        self._errors: dict[int, HamError] = {}
        self._replay: list[Callable[[], None]] | None = None
        self._replay_cycle: Callable[[], None] | None = None
        self.stream = torch.cuda.Stream(device) if graphs and device.type == "cuda" else None

    @abstractmethod
    def learn(self, size: int) -> Tensor:
        """Update the weights with the next batch of size `size`; `losses_R` before that."""

    @abstractmethod
    def end_cycle(self) -> None:
        """Let the thresholds follow what they observed; not called where there are none."""

    @abstractmethod
    def _calibration(self, run: int) -> list[RoutingHints]:
        """The batches that set the thresholds of a run."""

    @abstractmethod
    def _state(self) -> Iterator[Tensor]:
        """Weights and buffers, in a fixed order."""

    @abstractmethod
    def _moments(self) -> Iterator[Tensor]:
        """What the optimiser keeps; zero at the start."""

    def start(self) -> None:
        """Set the thresholds' start and, on a GPU, capture every graph."""
        for model in self.models:
            model.train()
        if self.stream is not None:
            # Weights and batches were made on another stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_stream():
            self._prepare()
            if self.stream is not None:
                self._capture()

    def advance(self) -> None:
        """One training step; on a GPU it is only put into the queue."""
        with self._on_stream():
            size = self.schedule[self.position]
            if self._replay is None:
                self.step(size)
            else:
                self._replay[size]()
            self.position += 1
            if self.models[0].controllers:
                self._control()

    def step(self, size: int) -> None:
        """The device work of one step on the next batch of size `size`."""
        losses_R = self.learn(size)
        self.losses_RS.index_copy_(1, self.step_index_1, losses_R.float().unsqueeze(1))
        self.step_index_1.add_(1)
        self.batch_index_1[size].add_(1).remainder_(self._batches(size))

    def warm_up(self) -> None:
        """Run every kind of work once, then put everything back to the start.

        Before a capture kernels must be compiled, and the optimiser must have made its state.
        """
        before = [value.clone() for value in self._state()]
        for size in range(len(self.stores)):
            # There may be fewer steps than sizes.
            self.step_index_1.zero_()
            self.step(size)
        if self.models[0].controllers:
            self.end_cycle()
        self._restore(before)

    def losses_of(self, run: int) -> list[float]:
        """Training loss of every step of a run so far; waits for the device.

        Raises:
            ArithmeticError: If a loss is not finite.
            RoutingError: If a routing score was not finite.
        """
        with self._on_stream():
            losses = self.losses_RS[run, : self.position].tolist()
        for step, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss} at step {step}")
        if run in self._errors:
            raise self._errors[run]
        raise_on_bad_scores(self.models[run].controllers)
        return losses

    def _prepare(self) -> None:
        """Set the thresholds' start."""
        for run, model in enumerate(self.models):
            if model.controllers:
                with self._precision():
                    start_thresholds(model, self._calibration(run))

    def _control(self) -> None:
        """The thresholds' part of a step: the closed loop per cycle, and the freeze."""
        if self.position % self.cycle == 0:
            (self._replay_cycle or self.end_cycle)()
        if self.position == self.freeze_position:
            for run, model in enumerate(self.models):
                try:
                    with self._precision():
                        calibrate(model, self._calibration(run))
                except HamError as error:
                    # The other runs go on; `losses_of` this one raises it.
                    self._errors[run] = error

    def _batches(self, size: int) -> int:
        """How many batches of a size there are."""
        return self.stores[size].tokens_NT.shape[-3]

    def _precision(self) -> AbstractContextManager:
        return precision_context(self.device, self.settings.precision)

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _capture(self) -> None:
        """Record a graph for each size and one for the closed loop."""
        self.warm_up()
        torch.cuda.synchronize(self.device)
        pool = torch.cuda.graph_pool_handle()
        self._replay = [
            self._record(lambda size=size: self.step(size), pool)
            for size in range(len(self.stores))
        ]
        if self.models[0].controllers:
            self._replay_cycle = self._record(self.end_cycle, pool)

    def _record(self, work: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            work()
        return graph.replay

    @torch.no_grad()
    def _restore(self, before: list[Tensor]) -> None:
        """Undo the warm-up in place, because graphs will hold these addresses."""
        # `load_state_dict` would copy too, but its hooks make controllers ask for their start anew.
        for value, old in zip(self._state(), before, strict=True):
            value.copy_(old)
        for moment in self._moments():
            moment.zero_()
        for index_1 in (self.step_index_1, *self.batch_index_1):
            index_1.zero_()
        self.losses_RS.fill_(math.nan)


class Trainer(Steps):
    """One run.

    Args:
        model: Its model, on the device.
        data: Its batches, on the device.
        settings: Steps, optimiser, precision.
        learning_rate: Peak rate.
        graphs: Whether a GPU replays its steps as CUDA graphs.
    """

    def __init__(
        self,
        model: RecallModel,
        data: TrainingData,
        settings: MqarTrain,
        learning_rate: float,
        graphs: bool = True,
    ):
        super().__init__([model], data.schedule, data.cycle, data.stores, settings, graphs)
        self.model, self.data = model, data
        self.rates_S = torch.tensor(rates(settings, learning_rate), device=self.device)
        self.rate = torch.zeros((), device=self.device)
        self.optimiser = _optimiser(model, settings, self.rate)

    def learn(self, size: int) -> Tensor:
        """Update the weights with the next batch of size `size`; `losses_R` before that."""
        batch = self.stores[size].map(lambda x: x.index_select(0, self.batch_index_1[size])[0])
        self.rate.copy_(self.rates_S.index_select(0, self.step_index_1)[0])
        self.optimiser.zero_grad(set_to_none=True)
        with self._precision():
            loss = self.model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimiser.step()
        return loss.detach()[None]

    def end_cycle(self) -> None:
        """Let the thresholds follow what they observed."""
        self.model.end_step()

    def losses(self) -> list[float]:
        """`losses_of` the only run."""
        return self.losses_of(0)

    def _calibration(self, run: int) -> list[RoutingHints]:
        return self.data.calibration

    def _state(self) -> Iterator[Tensor]:
        yield from self.model.state_dict().values()

    def _moments(self) -> Iterator[Tensor]:
        for state in self.optimiser.state.values():
            yield from state.values()


def start_thresholds(model: RecallModel, batches: list[RoutingHints]) -> None:
    """Put every threshold at its target's quantile on `batches` and leave it to the loop."""
    calibrate(model, batches)
    for controller in model.controllers:
        controller.frozen.fill_(False)


def rate_at(step: int, settings: MqarTrain, peak: float) -> float:
    """Learning rate of a step (from 0): linear warm-up, then cosine to 0 after the last step."""
    warmup = round(settings.steps * settings.warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def rates(settings: MqarTrain, peak: float) -> list[float]:
    """Learning rate of every step."""
    return [rate_at(step, settings, peak) for step in range(settings.steps)]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for a parameter: matrices, but not short convolutions."""
    return parameter.ndim >= 2 and not name.endswith("conv.weight_WC")


def _optimiser(model: nn.Module, settings: MqarTrain, rate: Tensor) -> torch.optim.AdamW:
    """AdamW whose rate is a tensor; matrices decay, vectors and short convolutions do not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if decays(name, parameter) else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=rate.device.type == "cuda")
