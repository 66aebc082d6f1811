"""A sweep over a tiny model on a CPU, for tests."""

from __future__ import annotations

from typing import Any

import torch

from ham.kernels.speed.clock import WallClock
from ham.measure.sweep.grid import SMOKE, Cell
from ham.measure.sweep.layers import LayerSettings
from ham.measure.sweep.ops import PLAIN, step_ops
from ham.measure.sweep.run import Sweep
from ham.measure.sweep.store import SweepStore

CPU = torch.device("cpu")
COMMON = {"device": "CPU", "code_fingerprint": "code", "manifest_id": "manifest"}
ROUNDS = {"min_rounds": 2, "max_rounds": 2, "budget_ms": 1.0}
CEILINGS = {"buffer_bytes": 1 << 16, "size": 32}


def make_sweep(store: SweepStore | None = None, **changes: Any) -> Sweep:
    store = store or SweepStore(None, COMMON)
    return Sweep(CPU, torch.float32, SMOKE, store, rounds=ROUNDS, **changes)


def settings_of(cell: Cell) -> LayerSettings:
    return LayerSettings(cell, CPU, torch.float32, WallClock(), {}, step_ops(PLAIN))
