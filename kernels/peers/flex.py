"""FlexAttention for routed attention: over packed keys, and over all keys with a mask.

Packing takes one cumulative count, one scatter of positions and one gather, no sort. Packed
positions increase, so a block of queries needs a prefix of the packed keys, and the block mask
follows from the counts at its first and last query, without looking at T × N pairs. For a backward
FlexAttention wants the transposed lists as well, which torch derives from these; without gradients
they are left out, so that a forward does not pay for them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ham.kernels.flex import BLOCK, attend
from ham.kernels.peers.packages import given, on_cuda_with, refuse_others
from ham.kernels.registry import Provider


class Packed(NamedTuple):
    """Keys and values of the routed tokens, moved together, with the mask that goes with them.

    Attributes:
        k_BNGK, v_BNGV: Slots beyond a sequence's count repeat its last token; no query sees them.
        mask: Which queries see which slots.
    """

    k_BNGK: Tensor
    v_BNGV: Tensor
    mask: Any


def packed_positions(routed_BT: Tensor, counts_BT: Tensor, slots: int) -> Tensor:
    """Positions of the routed tokens in increasing order, filled up with T: int32 `[B, N]`."""
    batch, time = routed_BT.shape
    # Unrouted tokens all go to one more slot, which is cut off.
    slot_BT = torch.where(routed_BT, counts_BT - 1, slots).long()
    position_BT = torch.arange(time, device=routed_BT.device, dtype=torch.int32).expand(batch, time)
    filled = torch.full((batch, slots + 1), time, device=routed_BT.device, dtype=torch.int32)
    return filled.scatter_(1, slot_BT, position_BT)[:, :slots]


def block_lists(counts_BT: Tensor, slots: int) -> dict[str, Tensor]:
    """Which blocks of packed keys a block of queries sees in full, and which in part.

    Keys before the count at the first query are seen by every query of the block; keys from the
    count at its last query on by none.
    """
    time = counts_BT.shape[1]
    blocks, key_blocks = -(-time // BLOCK), -(-slots // BLOCK)
    first = torch.arange(blocks, device=counts_BT.device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=time - 1)
    full_BR = (counts_BT[:, first] // BLOCK).to(torch.int32)
    needed_BR = ((counts_BT[:, last] + BLOCK - 1) // BLOCK).to(torch.int32)
    order = torch.arange(key_blocks, device=counts_BT.device, dtype=torch.int32)
    full_indices = order.expand(*full_BR.shape, key_blocks)
    partial_indices = (order + full_BR.unsqueeze(-1)).clamp(max=key_blocks - 1)
    return {
        "kv_num_blocks": (needed_BR - full_BR).unsqueeze(1).contiguous(),
        "kv_indices": partial_indices.unsqueeze(1).contiguous(),
        "full_kv_num_blocks": full_BR.unsqueeze(1).contiguous(),
        "full_kv_indices": full_indices.unsqueeze(1).contiguous(),
    }


def pack(k_BTGK: Tensor, v_BTGV: Tensor, routed_BT: Tensor, backward: bool | None = None) -> Packed:
    """Pack to the longest sequence of the batch, rounded up to whole blocks; waits for the device.

    The number of slots has to be known on the host, as it is the shape of the packed keys.
    `backward`: whether a backward may follow; by default if gradients are on.
    """
    time = routed_BT.shape[1]
    counts_BT = routed_BT.cumsum(1)
    longest = int(counts_BT[:, -1].max())
    slots = max(BLOCK, -(-longest // BLOCK) * BLOCK)
    position_BN = packed_positions(routed_BT, counts_BT, slots)
    index_BN = position_BN.clamp(max=time - 1).long()

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return position_BN[b, kv] <= q

    mask = _block_mask(block_lists(counts_BT, slots), visible, (time, slots), backward)
    return Packed(_gather(k_BTGK, index_BN), _gather(v_BTGV, index_BN), mask)


def _gather(x_BTGX: Tensor, index_BN: Tensor) -> Tensor:
    index = index_BN[:, :, None, None].expand(-1, -1, *x_BTGX.shape[2:])
    return x_BTGX.gather(1, index)


def packed_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    *,
    scale: float | None = None,
    **unused: Any,
) -> Tensor:
    """Pack, build the mask, attend."""
    refuse_others(unused)
    packed = pack(k_BTGK, v_BTGV, routed_BT)
    return attend(q_BTHK, packed.k_BNGK, packed.v_BNGV, packed.mask, scale)


def causal_mask(routed_BT: Tensor) -> Any:
    """Causal and routed over all keys: routing without structure leaves no block empty or full."""
    batch, time = routed_BT.shape
    blocks = -(-time // BLOCK)
    row = torch.arange(blocks, device=routed_BT.device, dtype=torch.int32)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & routed_BT[b, kv]

    lists = {
        "kv_num_blocks": (row + 1).expand(batch, 1, blocks).contiguous(),
        "kv_indices": row.expand(batch, 1, blocks, blocks).contiguous(),
    }
    return _block_mask(lists, visible, (time, time), None)


@functools.cache
def has_choice_of_lists() -> bool:
    """Whether this torch can leave the transposed lists out; older versions make them always."""
    from torch.nn.attention.flex_attention import BlockMask

    return "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters


def _block_mask(
    lists: dict[str, Tensor],
    visible: Callable[..., Tensor],
    lengths: tuple[int, int],
    backward: bool | None,
) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    options: dict[str, bool] = {}
    if has_choice_of_lists():
        options["compute_q_blocks"] = torch.is_grad_enabled() if backward is None else backward
    return BlockMask.from_kv_blocks(
        **lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths, **options
    )


def masked_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    *,
    scale: float | None = None,
    **unused: Any,
) -> Tensor:
    """Attend to all keys under a mask of the routed ones."""
    refuse_others(unused)
    return attend(q_BTHK, k_BTGK, v_BTGV, causal_mask(routed_BT), scale)


def limits(arguments: Mapping[str, Any]) -> str | None:
    """Which switches of routed attention this wrapper lacks."""
    extra = given(arguments, "window", "sink_HK", "router_score_BT")
    return None if extra is None else f"{extra.rpartition('_')[0] or extra} is not done here"


def _torch_version() -> str:
    return torch.__version__


ROUTED_ATTENTION = tuple(
    Provider(name, function, on_cuda_with(), kind="peer", limits=limits, version=_torch_version)
    for name, function in (("flex", packed_attention), ("flex_masked", masked_attention))
)
