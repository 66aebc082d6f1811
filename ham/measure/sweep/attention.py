"""Attention by whichever of torch's kernels is fastest: one query over a cache, whole sequences.

Which kernel and which layout of the cache wins depends on the device and on the sizes, so both are
measured: the layout once for each head size, the kernel again for every cell, on its own cache.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from ham.kernels.sdpa import BACKENDS
from ham.kernels.speed.clock import Clock, Task, take_turns

CANDIDATES = ("sdpa_cudnn", "sdpa_flash")
AUTOMATIC = "sdpa"
"""torch's own choice: on a CPU, and with a mask."""

HEADS_FIRST = "BHTK"
TOKENS_FIRST = "BTHK"
PROBE = (16, 4097)
"""Batch and keys at which layouts are compared."""

TOLERANCE = 1e-2
"""Largest relative error of a backend in half precision, as for the kernels of this project."""

ROUNDS = {"min_rounds": 3, "max_rounds": 7, "budget_ms": 20.0}


def empty_cache(
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    layout: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """A cache indexed `[B, H, T, K]` whose memory has the axes in the order of `layout`."""
    if layout == HEADS_FIRST:
        return torch.empty(batch, heads, tokens, head_dim, device=device, dtype=dtype)
    return torch.empty(batch, tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)


def attend_one(q_BHK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, backend: str) -> Tensor:
    """Softmax attention of one query per sequence and head over all T keys: `o_BHV`."""
    chosen = BACKENDS.get(backend)
    with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
        return F.scaled_dot_product_attention(q_BHK[:, :, None], k_BHTK, v_BHTV)[:, :, 0]


def fastest_backend(q_BHK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, clock: Clock) -> str:
    """The fastest backend for these tensors; the efficient one where no candidate can do them."""
    if q_BHK.device.type != "cuda":
        return AUTOMATIC
    times = _times(q_BHK, k_BHTK, v_BHTV, clock)
    return min(times, key=lambda name: times[name]) if times else "sdpa_efficient"


def fastest_layout(
    heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, clock: Clock
) -> str:
    """The layout in which the fastest backend is fastest, measured at `PROBE`."""
    if device.type != "cuda":
        return HEADS_FIRST
    batch, tokens = PROBE
    best = {}
    for layout in (HEADS_FIRST, TOKENS_FIRST):
        k_BHTK, v_BHTV = (
            empty_cache(batch, heads, tokens, head_dim, layout, device, dtype).normal_()
            for _ in range(2)
        )
        q_BHK = torch.randn(batch, heads, head_dim, device=device, dtype=dtype)
        times = _times(q_BHK, k_BHTK, v_BHTV, clock)
        if times:
            best[layout] = min(times.values())
    return min(best, key=lambda name: best[name]) if best else HEADS_FIRST


def _times(q_BHK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, clock: Clock) -> dict[str, float]:
    """Median milliseconds of each candidate that can do it and does it right."""
    tasks = {}
    for name in CANDIDATES:
        call = functools.partial(attend_one, q_BHK, k_BHTK, v_BHTV, name)
        if _is_right(call, q_BHK, k_BHTK, v_BHTV):
            tasks[name] = Task(call, torch.inference_mode)
    timings = take_turns(clock, tasks, **ROUNDS)
    return {name: one.estimate.value for name, one in timings.items() if one.estimate is not None}


def _is_right(call: Callable[[], Tensor], q_BHK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor) -> bool:
    """Whether a backend can do these tensors and gives the last head of the last sequence right."""
    try:
        found_V = call()[-1, -1].float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    q_K, k_TK, v_TV = (one[-1, -1].float() for one in (q_BHK, k_BHTK, v_BHTV))
    expected_V = torch.softmax(k_TK @ q_K * q_K.shape[0] ** -0.5, dim=0) @ v_TV
    return bool((found_V - expected_V).norm() <= TOLERANCE * expected_V.norm())
