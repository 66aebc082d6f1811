"""How one cell is measured, by experiment, and what its row says besides the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ham.job import used_providers
from ham.kernels.registry import TORCH
from ham.measure.sweep.budget import full_cache_bytes
from ham.measure.sweep.grid import (
    DECODE_PART,
    MIXER_DECODE,
    MODEL_PREFILL,
    MODEL_TRAIN,
    Cell,
)
from ham.measure.sweep.layers import LayerSettings, Occupancy, Traffic
from ham.measure.sweep.models import parameter_bytes, release
from ham.measure.sweep.ops import FUSED, PLAIN, step_ops
from ham.measure.sweep.parts import PartTime, part_times
from ham.measure.sweep.passes import Prefill, TrainingStep
from ham.measure.sweep.sessions import make_session
from ham.model.decoder import DecoderLM
from ham.report.statistics import Estimate

if TYPE_CHECKING:
    from ham.measure.sweep.run import Sweep

Label = str | int | float


@dataclass(frozen=True)
class CellResult:
    """What measuring a cell gave.

    Attributes:
        time: Milliseconds of one step, prefill or training step.
        provider, launch_mode: As in rows.
        tokens: Tokens that a call makes or reads.
        kv_fraction: Realised share of routed tokens, 1 for full attention, else None.
        peak_bytes: Most memory in use at once, weights included; None where that is not known.
        kv_bytes, state_bytes: Allocated by the decoding memory; None in training.
        traffic: Bytes that a step must move; None outside of decoding.
        full_cache_bytes: Keys and values of every token of a cell of this size.
        occupancy: Use of the routed cache by layer.
        parts: Parts of the step by name.
        note: Why the launch mode is not the usual one.
    """

    time: Estimate
    provider: str
    launch_mode: str
    tokens: int
    kv_fraction: float | None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    state_bytes: int | None = None
    traffic: Traffic | None = None
    full_cache_bytes: int | None = None
    occupancy: tuple[Occupancy, ...] = ()
    parts: Mapping[str, PartTime] = field(default_factory=dict)
    note: str | None = None

    def labels(self, cell: Cell, copy_gb_per_second: float | None) -> dict[str, Label]:
        """The fields of the row besides its time; what is not known is left out."""
        seconds = self.time.value / 1e3
        found: dict[str, Label | None] = {
            "tokens_per_s": self.tokens / seconds,
            "peak_bytes": self.peak_bytes,
            "kv_bytes": self.kv_bytes,
            "state_bytes": self.state_bytes,
            "full_cache_bytes": self.full_cache_bytes,
            "note": self.note,
            **_waste(self.occupancy),
        }
        if self.traffic is not None:
            moved = self.traffic.read + self.traffic.written
            found["bytes_read_per_token"] = self.traffic.read / cell.batch
            found["bytes_moved"] = moved
            if copy_gb_per_second:
                rate = moved / seconds / 1e9
                found["percent_of_copy_bandwidth"] = 100 * rate / copy_gb_per_second
        return {name: value for name, value in found.items() if value is not None}


def _waste(layers: tuple[Occupancy, ...]) -> dict[str, float]:
    """Share of allocated slots that hold nothing, and of a padded batch that is padding."""
    used = sum(sum(layer.routed_B) for layer in layers)
    slots = sum(layer.slots for layer in layers)
    padded = sum(max(layer.routed_B) * len(layer.routed_B) for layer in layers)
    if not slots or not padded:
        return {}
    return {"slot_waste": 1 - used / slots, "ragged_waste": 1 - used / padded}


def measure_cell(cell: Cell, sweep: Sweep) -> CellResult:
    """Measure a cell; its memory is given back, whatever happens.

    Raises:
        torch.OutOfMemoryError: If it does not fit.
    """
    if cell.experiment == MODEL_TRAIN:
        return _train(cell, sweep)
    if cell.experiment == MODEL_PREFILL:
        return _prefill(cell, sweep)
    return _decode(cell, sweep)


def _decode(cell: Cell, sweep: Sweep) -> CellResult:
    ops = step_ops(FUSED if sweep.fuse else PLAIN)
    settings = LayerSettings(cell, sweep.device, sweep.dtype, sweep.clock, sweep.layouts, ops)
    if cell.experiment == MIXER_DECODE:
        subject = sweep.shelf.mixer(cell.model, cell.head_dim)
    else:
        subject = sweep.shelf.decoder(cell.model)
    session = make_session(subject, settings)
    peak = _Peak(sweep.device)
    try:
        session.prepare()
        session.capture()
        session.replay()
        peak_bytes = peak.read(session.weight_bytes())
        time = sweep.time(session.replay)
        parts = part_times(session, sweep) if cell.experiment == DECODE_PART else {}
        occupancy = tuple(session.occupancy())
        return CellResult(
            time,
            session.provider,
            session.launch_mode,
            tokens=cell.batch,
            kv_fraction=_realised(cell, occupancy),
            peak_bytes=peak_bytes,
            kv_bytes=session.kv_bytes(),
            state_bytes=session.state_bytes(),
            traffic=session.traffic(),
            full_cache_bytes=full_cache_bytes(cell, sweep.scale, sweep.dtype.itemsize),
            occupancy=occupancy,
            parts=parts,
        )
    finally:
        session.free()


def _prefill(cell: Cell, sweep: Sweep) -> CellResult:
    model = sweep.shelf.decoder(cell.model)
    peak = _Peak(sweep.device)
    prefill = Prefill(model, cell, fuse=sweep.fuse)
    try:
        prefill.prepare()
        prefill()
        peak_bytes = peak.read(parameter_bytes(model))
        time = sweep.time(prefill)
        held = prefill.state.bytes_allocated()
        fixed = sum(held.get(kind, 0) for kind in ("recurrent", "conv"))
        return CellResult(
            time,
            pass_provider(model),
            prefill.launch_mode,
            tokens=cell.batch * cell.context,
            kv_fraction=_nominal(cell),
            peak_bytes=peak_bytes,
            kv_bytes=sum(held.values()) - fixed,
            state_bytes=fixed,
            note=prefill.note,
        )
    finally:
        del prefill
        release()


def _train(cell: Cell, sweep: Sweep) -> CellResult:
    model = sweep.shelf.trained(cell.model)
    peak = _Peak(sweep.device)
    step = TrainingStep(model, cell)
    try:
        step.prepare()
        peak_bytes = peak.read(parameter_bytes(model))
        return CellResult(
            sweep.time(step.step),
            pass_provider(model),
            step.optimise.launch_mode,
            tokens=cell.batch * cell.context,
            kv_fraction=_nominal(cell),
            peak_bytes=peak_bytes,
            note=step.optimise.note,
        )
    finally:
        model.zero_grad(set_to_none=True)
        del step
        release()


class _Peak:
    """Most memory in use between making it and reading it, beyond what was in use before."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def read(self, weights: int) -> int | None:
        """The peak with the weights, which were there before; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before + weights


def _realised(cell: Cell, occupancy: tuple[Occupancy, ...]) -> float | None:
    if not occupancy:
        return _nominal(cell)
    shares = [sum(one.routed_B) / len(one.routed_B) / cell.context for one in occupancy]
    return sum(shares) / len(shares)


def _nominal(cell: Cell) -> float | None:
    return 1.0 if cell.model == "transformer" else cell.fraction


def pass_provider(model: DecoderLM) -> str:
    """What a model names (`used_providers`); one that names nothing has torch's attention."""
    named = used_providers(model)
    if named != TORCH or any(block.mixer.operations for block in model.blocks):
        return named
    return "sdpa" if model.device.type == "cpu" else "sdpa_cudnn_first"
