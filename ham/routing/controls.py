"""Scores that do not look at the recurrent state: controls, and the hash behind them.

Every number here is a function of a key and a position, never of how a sequence was cut, so the
parallel, the chunked and the step-by-step form agree. All of it is tensor arithmetic: nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
# Uses of the hash that must not repeat each other's numbers.
RANDOM_STREAM, TIE_STREAM, EXPLORATION_STREAM, EVICTION_STREAM = 1, 2, 3, 4


def hash_uniform(key: tuple[int, ...] | Tensor, *indices: Tensor) -> Tensor:
    """Float32 numbers in [0, 1) that look independent and uniform.

    Murmur3's 32-bit finaliser after each value. Products wrap around in int64, which leaves the 32
    bits that are kept exact on every device.

    Args:
        key: Integers, e.g. (stream, seed, layer), or `hash_key` of them as an int64 scalar: a
            compiler would make code of its own for every integer.
        indices: Int64 tensors that broadcast against each other.
    """
    state = key if isinstance(key, Tensor) else hash_key(key)
    if torch.compiler.is_compiling():
        if not isinstance(state, Tensor):
            state = indices[0].new_full((), state)
        return _opaque_hash(state, list(indices))
    return _hash(state, indices)


def hash_key(key: tuple[int, ...]) -> int:
    """The state of the hash after the integers of a key."""
    state = 0
    for part in key:
        state = _mixed((state + part * _GOLDEN) & _MASK)
    return state


def _hash(state: Tensor | int, indices: Sequence[Tensor]) -> Tensor:
    for index in indices:
        state = _mixed((state + index * _GOLDEN) & _MASK)
    return (state >> 8).float() * 2.0**-24


@torch.library.custom_op("ham::hash_uniform", mutates_args=())
def _opaque_hash(key: Tensor, indices: list[Tensor]) -> Tensor:
    """`_hash` as one operator: inductor takes indices for 32-bit numbers and fails at `_GOLDEN`."""
    return _hash(key, indices)


@_opaque_hash.register_fake
def _(key, indices):
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    return indices[0].new_empty(shape, dtype=torch.float32)


def periodic_mask(fraction: Tensor, position: Tensor) -> Tensor:
    """Every (1 / f)-th token: whether floor((t + 1) f) > floor(t f).

    Among the first n tokens exactly floor(n f) are chosen.

    Args:
        fraction: Float64 scalar f.
        position: Int64 positions t.
    """
    return ((position + 1) * fraction).floor() > (position * fraction).floor()


def _mixed(x):
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def positions(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Int64 positions of `length` tokens: `[1, T]`, or `[B, T]` where sequences start apart."""
    offset_T = torch.arange(length, device=device)
    if isinstance(start, Tensor):
        return start.to(device=device, dtype=torch.int64)[:, None] + offset_T
    return (offset_T + start)[None]
