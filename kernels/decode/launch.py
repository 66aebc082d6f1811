"""Launches of the decode kernels: they allocate nothing and never wait for the device.

Letters and groups of tensors as in `arguments.py`. One step of a HAM layer is `step`, then
`paged_attention`, then, unless its tile is fused, `combine`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.decode.arguments import (
    ACTIVATIONS,
    Attention,
    AttentionTile,
    DecodeScratch,
    Pages,
    Recurrence,
    Routing,
    check,
    check_pages,
    check_recurrence,
)
from ham.kernels.decode.layout import key_offset, position_offset, value_offset
from ham.kernels.decode.triton_attention import attention_kernel, combine_kernel
from ham.kernels.decode.triton_step import recurrent_kernel, step_kernel
from ham.kernels.triton_launch import launch
from ham.model.blocks import NORM_EPSILON
from ham.routing import PREDICTION_FLOOR, VALUE_FLOOR

ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def recurrent_step(
    qkv_BC: Tensor,
    raw_B2H: Tensor,
    parts: Recurrence,
    o_BHV: Tensor,
    *,
    active_B: Tensor | None = None,
    warps: int | None = None,
) -> None:
    """Short convolution and gated delta rule of one token: the recurrent layer without a cache.

    Args:
        qkv_BC: Projections before the convolution: queries of all heads, keys, values.
        raw_B2H: Projections of the decay, then of the write strength.
        parts: Parameters; history and state are updated in place.
        o_BHV: Written: read-outs, not normed.
        active_B: Int8; sequences where it is 0 are left alone. Default: all are active.
        warps: Warps per program. Default: see `step_warps`.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    check_recurrence(qkv_BC, raw_B2H, parts)
    batch, heads, key_size, value_size = parts.state_BHKV.shape
    check("o_BHV", o_BHV, (batch, heads, value_size), *ACTIVATIONS)
    _check_active(active_B, batch)
    launch(
        recurrent_kernel,
        (batch * heads,),
        qkv_BC,
        raw_B2H,
        parts.conv_weight_WC,
        parts.history_BWC,
        parts.state_BHKV,
        parts.log_rate_H,
        parts.step_bias_H,
        o_BHV,
        active_B,
        **_recurrence_sizes(parts),
        EPSILON=NORM_EPSILON,
        num_warps=warps or step_warps(key_size),
    )


def step(
    qkv_BC: Tensor,
    raw_B2H: Tensor,
    parts: Recurrence,
    attention: Attention,
    routing: Routing,
    pages: Pages,
    positions_B: Tensor,
    scratch: DecodeScratch,
    *,
    active_B: Tensor | None = None,
    warps: int | None = None,
) -> None:
    """One token up to the attention: convolution, gated delta rule, score, decision, append.

    The page that a row's next token would stand on must be in the table before the launch,
    whether or not the token turns out to be routed. A routed token without a page is not stored
    and counted in `scratch.faults_2`; so is a score that is NaN, which routes nothing.

    Args:
        qkv_BC, raw_B2H, parts, active_B, warps: As for `recurrent_step`.
        attention: Norm gains and rotary tables of the attention branch.
        routing: Score, agreement of the heads, threshold.
        pages: The cache; gets the token, and counts it if it is routed.
        positions_B: Int32 or int64 position of the token in its sequence, below M.
        scratch: Gets queries, read-outs of the recurrence, scores, decisions and faults.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    check_recurrence(qkv_BC, raw_B2H, parts)
    batch, heads, key_size, value_size = parts.state_BHKV.shape
    rows = batch * heads if routing.per_head else batch
    _check_step(qkv_BC, parts, attention, routing, pages, positions_B, scratch, rows)
    _check_active(active_B, batch)
    launch(
        step_kernel,
        (batch * heads,),
        qkv_BC,
        raw_B2H,
        parts.conv_weight_WC,
        parts.history_BWC,
        parts.state_BHKV,
        parts.log_rate_H,
        parts.step_bias_H,
        attention.q_gain_K,
        attention.k_gain_K,
        attention.cos_MK,
        attention.sin_MK,
        positions_B,
        active_B,
        pages.page_table_RP,
        pages.counts_R,
        routing.threshold_1,
        routing.given_R,
        scratch.o_BHV,
        scratch.q_BHK,
        scratch.head_scores_BH,
        scratch.score_R,
        scratch.routed_R,
        scratch.arrivals_B,
        scratch.faults_2,
        pages.page_table_RP.shape[1],
        **_recurrence_sizes(parts),
        BH=triton.next_power_of_2(heads),
        **_page_sizes(pages, 1 if routing.per_head else heads, key_size, value_size),
        POSITION_OFFSET=position_offset(
            pages.page_tokens,
            1 if routing.per_head else heads,
            key_size,
            value_size,
            pages.dtype.itemsize,
        ),
        SCORE=routing.score,
        REDUCTION=routing.reduction,
        P_FLOOR=PREDICTION_FLOOR,
        V_FLOOR=VALUE_FLOOR,
        EPSILON=NORM_EPSILON,
        num_warps=warps or step_warps(key_size),
    )


def paged_attention(
    pages: Pages,
    scratch: DecodeScratch,
    gates_B2H: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
    y_BHV: Tensor,
    *,
    tile: AttentionTile,
    per_head: bool = False,
    scale: float | None = None,
    active_B: Tensor | None = None,
) -> None:
    """Attend with the queries that `step` left in `scratch` to all tokens of the cache.

    A tile that is not fused leaves the shares of its splits in `scratch` for `combine`, and the
    arguments from `gates_B2H` to `y_BHV` are for the fused one.

    Args:
        pages: The cache, the token of this step included.
        scratch: Made for at least `tile.splits` splits.
        gates_B2H, recurrent_gain_V, attention_gain_V, y_BHV: As for `combine`.
        tile: How the work is cut.
        per_head: Whether each head has rows of its own.
        scale: Multiplies the scores. Default: K ** -0.5.
        active_B: Int8; sequences where it is 0 are left alone. Default: all are active.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    batch, heads, key_size = scratch.q_BHK.shape
    value_size = scratch.o_BHV.shape[2]
    check_pages(pages, batch * heads if per_head else batch)
    _check_combine(scratch, gates_B2H, recurrent_gain_V, attention_gain_V, y_BHV, tile)
    _check_active(active_B, batch)
    launch(
        attention_kernel,
        (batch * heads, tile.splits),
        scratch.q_BHK,
        pages.page_table_RP,
        pages.counts_R,
        active_B,
        scratch.partial_o_BHSV,
        scratch.partial_lm_BHS2,
        scratch.arrivals_BH,
        scratch.o_BHV,
        gates_B2H,
        recurrent_gain_V,
        attention_gain_V,
        y_BHV,
        key_size**-0.5 if scale is None else float(scale),
        pages.page_table_RP.shape[1],
        H=heads,
        K=key_size,
        V=value_size,
        BK=triton.next_power_of_2(key_size),
        BV=triton.next_power_of_2(value_size),
        BN=tile.tokens,
        S=tile.splits,
        BS=triton.next_power_of_2(tile.splits),
        **_page_sizes(pages, 1 if per_head else heads, key_size, value_size),
        PER_HEAD=per_head,
        FUSED=tile.fused,
        EPSILON=NORM_EPSILON,
        num_warps=tile.warps,
        maxnreg=attention_registers(tile, max(key_size, value_size)),
    )


def combine(
    scratch: DecodeScratch,
    gates_B2H: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
    y_BHV: Tensor,
    *,
    tile: AttentionTile,
    warps: int = 2,
) -> None:
    """Merge the splits of the attention; norm, gate and add both branches (Eq. 12-13).

    A sequence that is not active keeps what an earlier step left in the scratch.

    Args:
        scratch: As `paged_attention` left it.
        gates_B2H: Gates of the recurrent branch, then of the attention, before the sigmoid.
        recurrent_gain_V, attention_gain_V: Gains of the branch norms.
        y_BHV: Written: input of the output projection.
        tile: The one of `paged_attention`.
        warps: Warps per program.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    _check_combine(scratch, gates_B2H, recurrent_gain_V, attention_gain_V, y_BHV, tile)
    batch, heads, value_size = scratch.o_BHV.shape
    launch(
        combine_kernel,
        (batch * heads,),
        scratch.partial_o_BHSV,
        scratch.partial_lm_BHS2,
        scratch.o_BHV,
        gates_B2H,
        recurrent_gain_V,
        attention_gain_V,
        y_BHV,
        H=heads,
        V=value_size,
        BV=triton.next_power_of_2(value_size),
        S=tile.splits,
        BS=triton.next_power_of_2(tile.splits),
        EPSILON=NORM_EPSILON,
        num_warps=warps,
    )


def step_warps(key_size: int) -> int:
    """Warps of the step kernels, 1 to 4: one thread per number of a key.

    With more threads Triton deems a repeated load cheaper than moving a vector between threads: at
    K = 128 and 8 warps every thread then loads 317 numbers by one instead of 61.
    """
    return max(triton.next_power_of_2(key_size) // 32, 1)


def attention_registers(tile: AttentionTile, head_size: int) -> int:
    """Most registers of a thread of paged attention.

    Left to itself, ptxas aims for fewer, lets five of the eight loads of a tile be under way
    together (K = V = 128, bfloat16, 4 warps), and spills for some tiles.
    """
    numbers = tile.tokens * triton.next_power_of_2(head_size) // (32 * tile.warps)
    return 128 if numbers <= 32 else 255


def _recurrence_sizes(parts: Recurrence) -> dict[str, Any]:
    _, heads, key_size, value_size = parts.state_BHKV.shape
    return {
        "H": heads,
        "K": key_size,
        "V": value_size,
        "BK": triton.next_power_of_2(key_size),
        "BV": triton.next_power_of_2(value_size),
        "W": parts.conv_weight_WC.shape[0],
    }


def _page_sizes(pages: Pages, heads: int, key_size: int, value_size: int) -> dict[str, Any]:
    sizes = (pages.page_tokens, heads, key_size, value_size, pages.dtype.itemsize)
    return {
        "PAGE": pages.page_tokens,
        "ELEMENT": ELEMENTS[pages.dtype],
        "KEY_OFFSET": key_offset(*sizes),
        "VALUE_OFFSET": value_offset(*sizes),
    }


def _check_active(active_B: Tensor | None, batch: int) -> None:
    if active_B is not None:
        check("active_B", active_B, (batch,), torch.int8)


def _check_step(
    qkv_BC: Tensor,
    parts: Recurrence,
    attention: Attention,
    routing: Routing,
    pages: Pages,
    positions_B: Tensor,
    scratch: DecodeScratch,
    rows: int,
) -> None:
    batch, heads, key_size, value_size = parts.state_BHKV.shape
    check_pages(pages, rows)
    check("positions_B", positions_B, (batch,), torch.int32, torch.int64)
    check("threshold_1", routing.threshold_1, (1,), torch.float32)
    check("q_gain_K", attention.q_gain_K, (key_size,), *ACTIVATIONS)
    check("k_gain_K", attention.k_gain_K, (key_size,), *ACTIVATIONS)
    if attention.cos_MK is not None:
        table = (attention.cos_MK.shape[0], key_size // 2)
        check("cos_MK", attention.cos_MK, table, torch.float32)
        check("sin_MK", attention.sin_MK, table, torch.float32)
    if routing.given_R is not None:
        check("given_R", routing.given_R, (rows,), torch.float32)
    check("scratch.q_BHK", scratch.q_BHK, (batch, heads, key_size), qkv_BC.dtype)
    check("scratch.o_BHV", scratch.o_BHV, (batch, heads, value_size), qkv_BC.dtype)
    check("scratch.score_R", scratch.score_R, (rows,), torch.float32)


def _check_combine(
    scratch: DecodeScratch,
    gates_B2H: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
    y_BHV: Tensor,
    tile: AttentionTile,
) -> None:
    batch, heads, value_size = scratch.o_BHV.shape
    splits = scratch.partial_lm_BHS2.shape[2]
    if splits < tile.splits:
        raise ConfigError(
            f"the tile has {tile.splits} splits, the scratch memory is for at most {splits}"
        )
    check("gates_B2H", gates_B2H, (batch, 2 * heads), *ACTIVATIONS)
    check("recurrent_gain_V", recurrent_gain_V, (value_size,), *ACTIVATIONS)
    check("attention_gain_V", attention_gain_V, (value_size,), *ACTIVATIONS)
    check("y_BHV", y_BHV, (batch, heads, value_size), *ACTIVATIONS)
