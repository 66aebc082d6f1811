"""Training of one run as pure device work, so that a CUDA graph can hold a whole step.

All batches are drawn on the device beforehand; a step reads its batch, its learning rate and its
place in the log through counters on the device, and the host only says which size comes next. On a
GPU there is one graph for each size of the mixture, since a graph has fixed shapes; their memory is
shared, because they run one after another. On a CPU the same functions run eagerly.

Thresholds start at their targets' quantiles over one cycle of the mixture, follow their closed loop
once per cycle (not per step: sizes route different shares, and the loop would chase the order of
the sizes), and are calibrated and frozen for the last part of the run.

Letters: S steps, B batch, T tokens, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ham.model.calibration import calibrate
from ham.model.mixer import RoutingHints
from ham.model.precision import precision_context
from ham.routing import raise_on_bad_scores
from ham.study.config import MqarConfig, MqarTrain, Task
from ham.study.data import Examples, draw_examples, generator, mixture_schedule
from ham.study.model import RecallModel


class TrainingData:
    """All batches of a run: `stores[i]` has those of size i, with a leading axis of steps.

    Args:
        config: The study.
        task: What the examples look like.
        seed: Seed of the run; every arm and width of a seed reads the same batches.
        steps: Training steps.
        device: Where the batches are drawn and stay.
    """

    def __init__(self, config: MqarConfig, task: Task, seed: int, steps: int, device: torch.device):
        batch_size, sizes = config.train.batch_size, config.mixture(task)
        self.schedule = mixture_schedule(sizes, steps, seed)
        self.cycle = sum(size.weight for size in sizes)

        def draw(steps: int, index: int, purpose: str) -> Examples:
            examples = draw_examples(
                steps * batch_size,
                sizes[index],
                task,
                generator(device, purpose, seed, *task.key, str(sizes[index])),
                vocabulary_size=config.vocabulary_size,
            )
            return examples.map(lambda x: x.unflatten(0, (steps, batch_size)))

        # A size that a short schedule misses still needs a batch to be captured with.
        self.stores = [
            draw(max(1, self.schedule.count(index)), index, "train") for index in range(len(sizes))
        ]
        self.calibration = [
            RoutingHints(batch.tokens_NT, batch.wanted_NT)
            for index, size in enumerate(sizes)
            for batch in draw(size.weight, index, "calibration").each()
        ]


class Trainer:
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
        self.model, self.data, self.settings = model, data, settings
        device = model.device
        self.position = 0
        self.freeze_position = round(settings.steps * settings.freeze_fraction)
        self.rates_S = torch.tensor(
            [rate_at(step, settings, learning_rate) for step in range(settings.steps)],
            device=device,
        )
        self.rate = torch.zeros((), device=device)
        self.optimiser = _optimiser(model, settings, self.rate)
        self.losses_S = torch.full((settings.steps,), math.nan, device=device)
        self.step_index_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.batch_index_1 = [torch.zeros_like(self.step_index_1) for _ in data.stores]
        self._replay: list[Callable[[], None]] | None = None
        self._replay_cycle: Callable[[], None] | None = None
        self.stream = torch.cuda.Stream(device) if graphs and device.type == "cuda" else None

    def start(self) -> None:
        """Set the thresholds' start and, on a GPU, capture every graph."""
        self.model.train()
        if self.stream is not None:
            # Weights and batches were made on another stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with self._on_stream():
            if self.model.controllers:
                with self._precision():
                    start_thresholds(self.model, self.data.calibration)
            if self.stream is not None:
                self._capture()

    def advance(self) -> None:
        """One training step; on a GPU it is only put into the queue."""
        with self._on_stream():
            size = self.data.schedule[self.position]
            if self._replay is None:
                self.step(size)
            else:
                self._replay[size]()
            self.position += 1
            if self.model.controllers:
                self._control()

    def step(self, size: int) -> None:
        """The device work of one step on the next batch of size `size`."""
        store, index_1 = self.data.stores[size], self.batch_index_1[size]
        batch = store.map(lambda x: x.index_select(0, index_1)[0])
        self.rate.copy_(self.rates_S.index_select(0, self.step_index_1)[0])
        self.optimiser.zero_grad(set_to_none=True)
        with self._precision():
            loss = self.model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimiser.step()
        self.losses_S.index_copy_(0, self.step_index_1, loss.detach().float().unsqueeze(0))
        self.step_index_1.add_(1)
        index_1.add_(1).remainder_(store.tokens_NT.shape[0])

    def warm_up(self) -> None:
        """Run every kind of work once, then put everything back to the start.

        Before a capture kernels must be compiled, and the optimiser must have made its state.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        for size in range(len(self.data.stores)):
            self.step(size)
        self.model.end_step()
        self._restore(before)

    def losses(self) -> list[float]:
        """Training loss of every step so far; waits for the device.

        Raises:
            ArithmeticError: If a loss is not finite.
            RoutingError: If a routing score was not finite.
        """
        with self._on_stream():
            losses = self.losses_S[: self.position].tolist()
        for step, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss} at step {step}")
        raise_on_bad_scores(self.model.controllers)
        return losses

    def _control(self) -> None:
        """The thresholds' part of a step: the closed loop per cycle, and the freeze."""
        if self.position % self.data.cycle == 0:
            (self._replay_cycle or self.model.end_step)()
        if self.position == self.freeze_position:
            with self._precision():
                calibrate(self.model, self.data.calibration)

    def _precision(self) -> AbstractContextManager:
        return precision_context(self.model.device, self.settings.precision)

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _capture(self) -> None:
        """Record a graph for each size and one for the closed loop."""
        self.warm_up()
        torch.cuda.synchronize(self.model.device)
        pool = torch.cuda.graph_pool_handle()
        self._replay = [
            self._record(lambda size=size: self.step(size), pool)
            for size in range(len(self.data.stores))
        ]
        self._replay_cycle = self._record(self.model.end_step, pool)

    def _record(self, work: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            work()
        return graph.replay

    @torch.no_grad()
    def _restore(self, before: dict[str, Tensor]) -> None:
        """Undo the warm-up in place, because graphs will hold these addresses."""
        # `load_state_dict` would copy too, but its hooks make controllers ask for their start anew.
        for name, value in self.model.state_dict().items():
            value.copy_(before[name])
        for state in self.optimiser.state.values():
            for value in state.values():
                value.zero_()
        for index_1 in (self.step_index_1, *self.batch_index_1):
            index_1.zero_()
        self.losses_S.fill_(math.nan)


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


def _optimiser(model: nn.Module, settings: MqarTrain, rate: Tensor) -> torch.optim.AdamW:
    """AdamW whose rate is a tensor; matrices decay, vectors and short convolutions do not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith("conv.weight_WC")
        (decayed if matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=rate.device.type == "cuda")
