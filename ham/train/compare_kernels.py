"""Does training with one provider of the operations give the losses that another gives?

One arm is trained several times in one process, from the same weights, on the same batches, at the
same learning rates; the variants differ in how the operations are computed. In bfloat16 two equally
valid computations drift apart, because every rounding error grows over the steps. How far is
measured and not assumed: `torch-other-rounding` computes the same operations as `torch`, but with
other matrix products (reductions of split products in float32 instead of bfloat16, and cuBLASLt
instead of cuBLAS). A provider that is right lies about as far from `torch` as that variant does.

Losses stay on the device until the last step, so that the host waits no more often than in
`ham train`. Tokens per second count the steps after the first `WARM_UP`, in which kernels are
compiled, up to the step at which routing thresholds are frozen; the device is waited for at both
ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ham.errors import CorruptFileError, HamError, MissingDataError, unknown_choice
from ham.job import Job, used_providers
from ham.kernels.triton_target import interpreting
from ham.report.loss_curves import (
    WINDOW,
    final_loss,
    largest_smoothed_difference,
    last_half_difference,
)
from ham.report.rows import RowWriter
from ham.report.statistics import mean
from ham.train.loop import Trainer

EXPERIMENT = "kernel_training"
BASE = "torch"
OTHER_ROUNDING = "torch-other-rounding"
WARM_UP = 20


@dataclass(frozen=True)
class Variant:
    """A way to compute the operations: a provider, and what holds while it trains."""

    kernels: str
    setting: Callable[[torch.device], AbstractContextManager] = nullcontext


@contextlib.contextmanager
def other_rounding(device: torch.device) -> Iterator[None]:
    """Other matrix products than by default, equally valid; nothing changes on a CPU."""
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    library = torch.backends.cuda.preferred_blas_library()
    other = "cublas" if str(library).endswith("Cublaslt") else "cublaslt"
    try:
        matmul.allow_bf16_reduced_precision_reduction = not reduced
        if device.type == "cuda":
            torch.backends.cuda.preferred_blas_library(other)
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduced
        if device.type == "cuda":
            torch.backends.cuda.preferred_blas_library(library)


VARIANTS: Mapping[str, Variant] = {
    BASE: Variant("torch"),
    OTHER_ROUNDING: Variant("torch", other_rounding),
    "triton": Variant("triton"),
    "reference": Variant("reference"),
}


def choose_variants(names: Iterable[str] | None, device: torch.device) -> list[str]:
    """The variants to train, `torch` first.

    Args:
        names: Those asked for; `torch` is added. None: the two of `torch`, and `triton`, or
            `reference` where Triton has nothing to run on.
        device: Where they will train.

    Raises:
        ConfigError: For an unknown name.
    """
    if names is None:
        fused = device.type == "cuda" or interpreting()
        return [BASE, OTHER_ROUNDING, "triton" if fused else "reference"]
    chosen = list(dict.fromkeys([BASE, *names]))
    for name in chosen:
        if name not in VARIANTS:
            raise unknown_choice("variant", name, VARIANTS)
    return chosen


@dataclass
class Curve:
    """What one variant gave.

    Attributes:
        variant: Its name.
        provider: Provider of the operations.
        losses: Nats for each optimiser step.
        fractions: Share of tokens routed in each step, mean over layers; empty without routing.
        tokens_per_second: See the module.
        peak_bytes: Peak of allocated device memory; None on a CPU.
        error: Why the variant gave nothing, or None.
    """

    variant: str
    provider: str
    losses: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    error: str | None = None


class Comparison:
    """Trains the variants one after another.

    Args:
        job: Arm, seed, configuration (`train.steps` optimiser steps) and device.
        data_folder: Folder made by `ham prepare`.
        advance: Called after each optimiser step.
    """

    def __init__(self, job: Job, data_folder: Path, advance: Callable[[], None] = lambda: None):
        self.job = job
        self.data_folder = data_folder
        self.advance = advance

    def run(self, name: str) -> Curve:
        """Train one variant; what it raises becomes the error of its curve, a defect is printed.

        Raises:
            MissingDataError, CorruptFileError: If there is nothing to train on.
        """
        curve = Curve(name, VARIANTS[name].kernels)
        try:
            with VARIANTS[name].setting(self.job.device):
                self._train(curve)
        except (MissingDataError, CorruptFileError):
            raise
        except Exception as error:
            if not isinstance(error, HamError):
                traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            curve = Curve(name, curve.provider, error=f"{type(error).__name__}: {first}"[:300])
        self._free()
        return curve

    def _train(self, curve: Curve) -> None:
        trainer = Trainer(self._job(curve.provider), self.data_folder)
        curve.provider = used_providers(trainer.model)
        settings = trainer.settings
        first = min(WARM_UP, settings.steps // 2)
        last = trainer.freeze_step if trainer.freeze_step > first else settings.steps
        self._wait()
        clock = {0: time.perf_counter()}
        losses: list[Tensor] = []
        fractions: list[list[Tensor]] = []
        for loss, routed in trainer.losses():
            losses.append(loss)
            fractions.append(routed)
            if trainer.step in (first, last):
                self._wait()
                clock[trainer.step] = time.perf_counter()
            self.advance()
        curve.losses = torch.stack(losses).tolist()
        _check_finite(curve.losses)
        if fractions[0]:
            shares = torch.stack([torch.stack(layers) for layers in fractions])
            curve.fractions = shares.mean(dim=1).tolist()
        tokens = settings.batch_size * trainer.config.data.context * (last - first)
        curve.tokens_per_second = tokens / (clock[last] - clock[first])
        if self.job.device.type == "cuda":
            curve.peak_bytes = torch.cuda.max_memory_allocated(self.job.device)

    def _job(self, kernels: str) -> Job:
        config = self.job.config
        model = config.model.model_copy(update={"kernels": kernels})
        return dataclasses.replace(self.job, config=config.model_copy(update={"model": model}))

    def _wait(self) -> None:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize(self.job.device)

    def _free(self) -> None:
        """Give back what a variant held; a GPU that was lost fails the next variant by itself."""
        gc.collect()
        if self.job.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.job.device)


def _check_finite(losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} at step {step}")


def add_rows(writer: RowWriter, curves: Iterable[Curve]) -> None:
    """Rows of every curve and of its distance to that of `torch`."""
    curves = list(curves)
    base = next((curve for curve in curves if curve.variant == BASE), None)
    for curve in curves:
        labels = {"variant": curve.variant}
        shared = {"provider": curve.provider, "task": "train"}
        if curve.error is not None:
            writer.add(EXPERIMENT, "loss_nats", None, labels=labels, error=curve.error, **shared)
            continue
        for step, loss in enumerate(curve.losses, start=1):
            writer.add(
                EXPERIMENT,
                "loss_nats",
                loss,
                x_name="step",
                x_value=step,
                labels=labels,
                kv_fraction=curve.fractions[step - 1] if curve.fractions else None,
                **shared,
            )
        shared["kv_fraction"] = mean(curve.fractions) if curve.fractions else None
        numbers = {
            "final_loss_nats": (final_loss(curve.losses), {"window_steps": WINDOW}),
            "tokens_per_second": (curve.tokens_per_second, {}),
            "peak_memory_bytes": (curve.peak_bytes, {}),
        }
        for metric, (value, further) in numbers.items():
            if value is not None:
                writer.add(EXPERIMENT, metric, value, labels={**labels, **further}, **shared)
        if base is not None and base is not curve:
            _add_differences(writer, curve, base, labels, shared)


def _add_differences(
    writer: RowWriter, curve: Curve, base: Curve, labels: Mapping, shared: Mapping
) -> None:
    """Two summaries of |loss - loss of torch|, or why there are none."""
    labels = {**labels, "against": BASE}
    half = len(curve.losses) - len(curve.losses) // 2
    for metric, summary, further, n in (
        ("loss_difference_nats", last_half_difference, {"steps": "last half"}, half),
        (
            "smoothed_loss_difference_nats",
            largest_smoothed_difference,
            {"window_steps": WINDOW},
            len(curve.losses),
        ),
    ):
        value = summary(curve.losses, base.losses) if base.error is None else None
        error = None if base.error is None else f"no losses of {BASE}: {base.error}"
        writer.add(
            EXPERIMENT, metric, value, labels={**labels, **further}, n=n, error=error, **shared
        )
