"""Launch 5 of the Triton gated delta rule: the gradients that are local to a chunk.

The kernels stand in `triton_gradient_kernels.py`, the derivation in the README beside this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_gradient_kernels import (
    gradient_kernel,
    resident_gradient_kernel,
)
from ham.kernels.gated_delta_rule.triton_sequences import Sequences
from ham.kernels.gated_delta_rule.triton_tiles import (
    CHUNK,
    Gates,
    GradientTile,
    allow_descriptors,
    decay_parts,
    padded,
    precision,
    use_descriptors,
)
from ham.kernels.triton_launch import launch


class Gradients(NamedTuple):
    """Gradients of the local part: q and k in their dtype, gates in float32."""

    dq_BTGK: Tensor
    dk_BTGK: Tensor
    dlog_decay_BTH: Tensor
    dbeta_BTH: Tensor


def over_groups(made_BTHK: Tensor, like_BTGK: Tensor) -> Tensor:
    """Add up the gradients that the value heads of a group send to the key head they share."""
    if made_BTHK.shape == like_BTGK.shape:
        return made_BTHK
    key_heads = like_BTGK.shape[2]
    return made_BTHK.unflatten(2, (key_heads, -1)).sum(3)


def gradients(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    do_BTHV: Tensor,
    residual_BTHV: Tensor,
    w_BTHV: Tensor,
    states_XMKV: Tensor,
    dstates_XMKV: Tensor,
    gates: Gates,
    sequences: Sequences,
    scale: float,
    tile: GradientTile,
) -> Gradients:
    """Launch `gradient_kernel` or, for tiles with chunks, the resident one; all contiguous."""
    heads, value_size = do_BTHV.shape[2:]
    key_heads, key_size = q_BTGK.shape[2:]
    rows, chunks = sequences.rows * heads, sequences.chunks
    blocks = -(-key_size // tile.block_k)
    made = {"dtype": q_BTGK.dtype, "device": q_BTGK.device}
    dq_BTHK = torch.empty(*do_BTHV.shape[:3], key_size, **made)
    dk_BTHK = torch.empty_like(dq_BTHK)
    wide = {"dtype": torch.float32, "device": q_BTGK.device}
    dlog_decay_NBTH = torch.empty(blocks, *do_BTHV.shape[:3], **wide)
    dbeta_NBTH = torch.empty_like(dlog_decay_NBTH)
    arguments = (
        q_BTGK,
        k_BTGK,
        do_BTHV,
        residual_BTHV,
        w_BTHV,
        states_XMKV,
        dstates_XMKV,
        gates.gates_XM3C,
        sequences.first_M,
        sequences.left_M,
        dq_BTHK,
        dk_BTHK,
        dlog_decay_NBTH,
        dbeta_NBTH,
        scale,
        sequences.time,
        chunks,
        sequences.rows * sequences.time,
        heads,
        key_heads,
    )
    sizes = {
        "K": key_size,
        "V": value_size,
        "BK": tile.block_k,
        "C": CHUNK,
        "PARTS": decay_parts(q_BTGK.dtype),
        "PRECISION": precision(q_BTGK.dtype),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    if tile.chunks == 0:
        launch(gradient_kernel, (blocks, chunks, rows), *arguments, BV=tile.block_v, **sizes)
    else:
        allow_descriptors()
        launch(
            resident_gradient_kernel,
            (blocks, -(-chunks // tile.chunks), rows),
            *arguments,
            tile.chunks,
            BV=padded(value_size),
            DESCRIPTORS=use_descriptors(q_BTGK) and key_size % tile.block_k == 0,
            **sizes,
        )
    return Gradients(
        over_groups(dq_BTHK, q_BTGK),
        over_groups(dk_BTHK, k_BTGK),
        dlog_decay_NBTH[0] if blocks == 1 else dlog_decay_NBTH.sum(0),
        dbeta_NBTH[0] if blocks == 1 else dbeta_NBTH.sum(0),
    )
