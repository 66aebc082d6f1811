"""Speed of training step, prefill and decoding against context length, and the memory each takes.

What is timed: a training step is forward, backward and optimiser update of one batch; prefill reads
a whole context into an empty memory; decoding then adds single tokens, each timed alone, by the
strongest path of the model on the device (`ham.measure.decoding`). The text
is held-out test text, so that a router keeps what it would keep in use. Memory is the size of the
real tensors of the decoding state; the declared size of every mixer is compared with it. A model of
another library declares nothing: what its cache keeps alive is allocated, what it reads is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ham.config import MeasureConfig, TrainConfig
from ham.errors import MissingDataError
from ham.measure.decoding import Reading, TimedDecoder, timed_decoder
from ham.measure.device import PEAKS, model_flops_utilisation
from ham.measure.timing import Timing, peak_extra_bytes, time_calls
from ham.model.language_model import LanguageModel, Memory, flops_labels
from ham.model.precision import precision_context
from ham.report.rows import RowWriter
from ham.train.optimiser import make_optimiser, set_learning_rate

GROWTH_STEP_TOKENS = 64


@dataclass
class Measurement:
    """Everything that the measurements of one model share.

    Attributes:
        tokens_T: One long stretch of test text.
        device_name: Name of the device, for percentages of peak.
        trains: Whether a training step is measured.
    """

    model: LanguageModel
    tokens_T: Tensor
    settings: MeasureConfig
    training: TrainConfig
    writer: RowWriter
    device_name: str
    trains: bool = True

    @property
    def parts(self) -> list[Callable[[int], None]]:
        """What is measured at every context."""
        training = [self._training_step] if self.trains else []
        return [self._prefill, self._decode, *training]

    def run(self, report: Callable[[str], None]) -> None:
        """Measure every context in the arithmetic of the training run.

        A cell that fails becomes a row with its error.
        """
        with precision_context(self.model.device, self.training.precision):
            self._run_cells(report)

    def _run_cells(self, report: Callable[[str], None]) -> None:
        for context in self.settings.contexts:
            for part in self.parts:
                report(f"{part.__name__.strip('_')} {context}")
                self._guarded(part, context)
        report("growth")
        self._guarded(self._growth, max(self.settings.contexts))

    def _guarded(self, part: Callable[[int], None], context: int) -> None:
        """All rows of a part, or its one error row: never both at the same coordinates."""
        finished = len(self.writer.rows)
        try:
            part(context)
        except Exception as error:  # whatever a mixer raises is the failure of this part alone
            del self.writer.rows[finished:]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            failed = _main_row(part.__name__, context, self.settings)
            where = f"{failed['task']} at {context} tokens"
            print(f"ham: warning: {where} failed: {reason}", file=sys.stderr)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            self.writer.add(**failed, value=None, error=reason)

    @torch.inference_mode()
    def _prefill(self, context: int) -> None:
        tokens_BT = self._text(context)
        # What a model checks of itself once must not be timed.
        self.model.init_state(1)
        last: list[tuple[Memory, list[float], list]] = []

        def prefill() -> None:
            state = self.model.init_state(self.settings.batch_size)
            output = self.model.prefill(tokens_BT, state)
            # Numbers, not the output: its logits would count in the next peak of memory.
            last[:] = [(state, output.kv_fraction_per_layer(), output.cache_fractions())]

        timing = time_calls(prefill, self.model.device, self.settings.warmup, self.settings.repeats)
        state, fractions, cache_fractions = last[0]
        where = {"x_name": "context", "x_value": context, "kv_fraction": mean_or_none(fractions)}
        self._add_speed("prefill", timing, context * self.settings.batch_size, where)
        self._add_utilisation("prefill", context, fractions, timing.median_ms, 1.0, where)
        self._add_state_bytes(state, cache_fractions, where)
        peak = peak_extra_bytes(prefill, self.model.device)
        self.writer.add("memory", "peak_memory_bytes", peak, task="prefill", **where)

    @torch.inference_mode()
    def _decode(self, context: int) -> None:
        count, batch = self.settings.decode_tokens, self.settings.batch_size
        tokens_BT = self._text(context + count + self.settings.warmup)
        fractions: list[float] = []

        def read() -> Reading:
            state = self.model.init_state(batch)
            output = self.model.prefill(tokens_BT[:, :context], state)
            fractions[:] = output.kv_fraction_per_layer()
            return Reading(state, context, batch, tuple(fractions))

        decoder = timed_decoder(self.model, read)
        upcoming = iter(tokens_BT[:, context:].unbind(dim=1))
        timing = time_calls(
            lambda: decoder.step(next(upcoming)),
            self.model.device,
            self.settings.warmup,
            count,
        )
        decoder.finish()
        where = {"x_name": "context", "x_value": context, "kv_fraction": mean_or_none(fractions)}
        self._add_speed("decode", timing, batch, where, decoder)

    def _training_step(self, context: int) -> None:
        tokens_BT = self._text(context + 1)
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        self.model.check_trains()
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        optimiser = make_optimiser(self.model, self.training)
        # The same work without moving the weights: a router keeps routing what it was trained to.
        set_learning_rate(optimiser, 0.0)
        fractions: list[float] = []
        self.model.train()

        def step() -> None:
            loss, output = self.model.loss(inputs_BT, targets_BT)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            fractions[:] = output.kv_fraction_per_layer()

        try:
            timing = time_calls(
                step, self.model.device, self.settings.warmup, self.settings.repeats
            )
            peak = peak_extra_bytes(step, self.model.device)
        finally:
            self.model.load_state_dict(before)
            self.model.eval()
        where = {"x_name": "context", "x_value": context, "kv_fraction": mean_or_none(fractions)}
        self._add_speed("train", timing, context * self.settings.batch_size, where)
        self._add_utilisation("train", context, fractions, timing.median_ms, 3.0, where)
        self.writer.add("memory", "peak_memory_bytes", peak, task="train", **where)

    @torch.inference_mode()
    def _growth(self, length: int) -> None:
        """Bytes of the decoding memory while one document is read."""
        tokens_BT = self._text(length)[:1]
        state = self.model.init_state(1)
        for part_BT in tokens_BT.split(GROWTH_STEP_TOKENS, dim=1):
            self.model.prefill(part_BT, state)
            held = state.bytes_allocated()
            where = {"task": "kv_growth", "x_name": "position", "x_value": state.position}
            self.writer.add("memory", "kv_bytes", held.get("kv", 0), **where)
            self.writer.add("memory", "cache_bytes_allocated", sum(held.values()), **where)

    def _add_speed(
        self,
        task: str,
        timing: Timing,
        tokens: int,
        where: dict,
        decoder: TimedDecoder | None = None,
    ) -> None:
        metric = {"train": "training_step_ms", "prefill": "prefill_ms", "decode": "decode_ms"}[task]
        labels = {"batch_size": self.settings.batch_size}
        common = {"task": task, "labels": labels, **where}
        if decoder is not None:
            common |= {"labels": {**labels, **decoder.labels()}, **decoder.fields()}
        spread = timing.interval()
        self.writer.add("throughput", metric, timing.median_ms, **common, **spread)
        rate = tokens / timing.median_ms * 1e3
        n = spread["n"]
        self.writer.add("throughput", "tokens_per_second", rate, n=n, **common)

    def _add_utilisation(
        self, task: str, context: int, fractions: list[float], ms: float, passes: float, where: dict
    ) -> None:
        if self.device_name not in PEAKS:
            return
        fraction = mean_or_none(fractions)
        flops = self.model.forward_flops(context, 1.0 if fraction is None else fraction)
        flops *= passes * self.settings.batch_size
        share = model_flops_utilisation(flops, ms / 1e3, self.device_name)
        labels = flops_labels(self.model)
        self.writer.add("throughput", "mfu_fraction", share, task=task, labels=labels, **where)

    def _add_state_bytes(self, state: Memory, cache_fractions: list, where: dict) -> None:
        held = state.bytes_allocated()
        batch = self.settings.batch_size
        for kind, count in sorted(held.items()):
            self.writer.add("memory", f"{kind}_bytes", count / batch, task="decode", **where)
        total = sum(held.values())
        declared = self.model.declared_bytes(state.position, cache_fractions)
        used = total - held.get("unused", 0) if declared is None else declared.used
        add = self.writer.add
        add("memory", "cache_bytes_allocated", total / batch, task="decode", **where)
        add("memory", "cache_bytes_used", used, task="decode", **where)
        if declared is not None:
            add("memory", "declared_bytes", declared.allocated, task="decode", **where)

    def _text(self, length: int) -> Tensor:
        """`tokens_BT`: the same stretch of text for each sequence of the batch.

        The same text, so that the mean routed fraction is the fraction of each sequence and the
        declared bytes of one sequence can be compared exactly.
        """
        if length > self.tokens_T.numel():
            raise MissingDataError(
                f"the test text has {self.tokens_T.numel()} tokens, {length} are needed"
            )
        return self.tokens_T[:length].repeat(self.settings.batch_size, 1)


_FAILED_CELLS = {
    "_prefill": ("throughput", "prefill_ms", "prefill"),
    "_decode": ("throughput", "decode_ms", "decode"),
    "_training_step": ("throughput", "training_step_ms", "train"),
    "_growth": ("memory", "cache_bytes_allocated", "kv_growth"),
}


def expected_rows(settings: MeasureConfig, trains: bool) -> list[dict[str, Any]]:
    """Coordinates of the main row of every part of an arm that is or is not trained here."""
    timed = ("_prefill", "_decode", *(["_training_step"] if trains else []))
    rows = [_main_row(part, n, settings) for n in settings.contexts for part in timed]
    cache = {"experiment": "memory", "metric": "cache_bytes_allocated", "task": "decode"}
    rows += [{**cache, "x_name": "context", "x_value": n} for n in settings.contexts]
    return [*rows, _main_row("_growth", max(settings.contexts), settings)]


def _main_row(part: str, context: int, settings: MeasureConfig) -> dict[str, Any]:
    """Experiment, metric and coordinates of the row by which a part is judged."""
    experiment, metric, task = _FAILED_CELLS[part]
    return {
        "experiment": experiment,
        "metric": metric,
        "task": task,
        "x_name": "context",
        "x_value": context,
        "labels": {"batch_size": settings.batch_size} if experiment == "throughput" else {},
    }


def mean_or_none(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None
