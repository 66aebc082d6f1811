"""Where sequences, chunks and segments of the Triton gated delta rule begin and end.

Sequences are the rows of a batch, all of one length, or, with `cu_seqlens_N1`, stretches of one
row. Tables about the latter are made on the device, within bounds known to the host, so that no
launch waits for the lengths. Letters of the kernels as in `triton_inverse.py`; N sequences, G key
heads, S segments of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_tiles import CHUNK
from ham.kernels.triton_target import target_of

# A state that passes a segment by a factor below 2^-64 is gone: float32 resolves 2^-24 of a sum.
NEGLIGIBLE_LOG2 = tl.constexpr(-64.0)
PROGRAMS_PER_MULTIPROCESSOR = 2
SHORTEST_SEGMENT = 8
MOST_SEGMENTS = 64


class Sequences(NamedTuple):
    """Sequences of a call and their chunks of 64 tokens; tables are None for a plain batch.

    Attributes:
        count: Number of sequences N.
        rows: Rows of the batch B.
        time: Tokens of a row T.
        chunks: Chunks M of a row, with `cu_seqlens_N1` a bound on their number.
        bounds_N1: First token of every sequence, and the end of the last one.
        offsets_N1: First chunk of every sequence, and the end of the last one.
        first_M: First token of every chunk.
        left_M: Tokens from there to the end of the sequence; 0 for a chunk that does not exist.
    """

    count: int
    rows: int
    time: int
    chunks: int
    bounds_N1: Tensor | None = None
    offsets_N1: Tensor | None = None
    first_M: Tensor | None = None
    left_M: Tensor | None = None


def chunk_bound(time: int, sequences: int | None) -> int:
    """Chunks of a row of `time` tokens, or of at most that many if it holds `sequences`."""
    return -(-time // CHUNK) if sequences is None else time // CHUNK + sequences


def sequences_of(x_BTHX: Tensor, cu_seqlens_N1: Tensor | None) -> Sequences:
    """Sequences of a batch, without waiting for the device."""
    rows, time = x_BTHX.shape[:2]
    if cu_seqlens_N1 is None:
        return Sequences(rows, rows, time, chunk_bound(time, None))
    count = cu_seqlens_N1.shape[0] - 1
    chunks = chunk_bound(time, count)
    bounds_N1 = cu_seqlens_N1.to(torch.int32).contiguous()
    ends_N = ((bounds_N1.diff() + CHUNK - 1) // CHUNK).cumsum(0)
    offsets_N1 = torch.cat((torch.zeros_like(ends_N[:1]), ends_N))
    chunk_M = torch.arange(chunks, device=bounds_N1.device)
    sequence_M = torch.searchsorted(ends_N, chunk_M, right=True).clamp(max=count - 1)
    first_M = bounds_N1[sequence_M] + (chunk_M - offsets_N1[sequence_M]) * CHUNK
    left_M = (bounds_N1[sequence_M + 1] - first_M).clamp(min=0)
    tables = (offsets_N1, first_M, left_M)
    return Sequences(count, rows, time, chunks, bounds_N1, *(x.to(torch.int32) for x in tables))


def segments_of(count: int, chunks: int, heads: int, value_size: int, device: torch.device) -> int:
    """Into how many segments to cut each sequence so that the walk fills the device.

    A program of the walk owns 64 columns and takes half a multiprocessor. From half as many
    programs as multiprocessors on there is one segment: at B8 T4096 H16 D64 (128 programs) two of
    them saved 0.006 ms of 0.246 on an H100 and cost the host two more launches.

    Args:
        count: Number of sequences.
        chunks: Chunks of a row.
        heads: Value heads.
        value_size: V.
        device: Where to run.
    """
    programs = count * heads * -(-value_size // 64)
    multiprocessors = target_of(device).multiprocessors
    if programs * 2 > multiprocessors:
        return 1
    wanted = min(multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // programs, MOST_SEGMENTS)
    most = chunks // SHORTEST_SEGMENT
    if isinstance(most, int):
        return max(1, min(wanted, most))
    return torch.sym_max(1, torch.sym_min(wanted, most))


@triton.jit
def sequence_of(i_nh, p_bounds, p_offsets, T, M, H, C: tl.constexpr):
    """Head, first token, number of tokens, first row in tables over chunks, number of chunks."""
    i_n = i_nh // H
    i_h = i_nh % H
    if p_bounds is not None:
        first = tl.load(p_bounds + i_n).to(tl.int64)
        length = (tl.load(p_bounds + i_n + 1) - first).to(tl.int32)
        i_x = i_h * M + tl.load(p_offsets + i_n)
    else:
        first = i_n * T
        length = T
        i_x = i_nh * M
    return i_h, first, length, i_x, tl.cdiv(length, C)


@triton.jit
def chunk_of(i_m, i_bh, p_first, p_left, T, H, C: tl.constexpr):
    """Head, first token and number of tokens that exist from there on, of one chunk."""
    i_h = i_bh % H
    if p_first is not None:
        first = tl.load(p_first + i_m).to(tl.int64)
        left = tl.load(p_left + i_m)
    else:
        first = (i_bh // H) * T + i_m * C
        left = T - i_m * C
    return i_h, first, left


@triton.jit
def segment_of(i_s, segments, chunks):
    """First chunk of a segment and the one after its last."""
    each = tl.cdiv(chunks, segments)
    start = tl.minimum(i_s * each, chunks)
    return start, tl.minimum(start + each, chunks)


@triton.jit
def passing(p_passing, start, stop, REVERSE: tl.constexpr):
    """What is left of a state after the chunks `start..stop-1`, and which of them still matter.

    Args:
        p_passing: Bound on the norm of the transition of every chunk, in units of log2.
        start: First chunk.
        stop: The one after the last.
        REVERSE: Whether gradients pass, from the last chunk to the first.

    Returns:
        The bound for all of them, in units of log2, and the first chunk (`REVERSE`: the one after
        the last) whose contribution is not negligible at the other end.
    """
    whole = tl.full([], 0.0, tl.float32)
    edge = start if REVERSE else stop
    for i in range(0, tl.cdiv(stop - start, 64)):
        o_i = i * 64 + tl.arange(0, 64)
        o_m = start + o_i if REVERSE else stop - 1 - o_i
        inside = (o_m >= start) & (o_m < stop)
        b_chunk = tl.load(p_passing + o_m, mask=inside, other=0.0)
        b_through = whole + tl.cumsum(b_chunk, 0) - b_chunk
        matters = inside & (b_through >= NEGLIGIBLE_LOG2)
        if REVERSE:
            edge = tl.maximum(edge, tl.max(tl.where(matters, o_m + 1, start), 0))
        else:
            edge = tl.minimum(edge, tl.min(tl.where(matters, o_m, stop), 0))
        whole += tl.sum(b_chunk, 0)
    return whole, edge
