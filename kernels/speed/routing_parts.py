"""Parts of routing that are timed alone: index building, and index building with packing.

`route_index` turns the mask into positions in packed order and counts; `route_pack` also gathers K
and V. The `torch` provider is what one writes with torch: cumulative sum, scatter, gather;
`argsort` is the way that is common elsewhere, a stable sort of the mask.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ham.kernels.peers.flex import packed_positions
from ham.kernels.registry import TORCH, TRITON
from ham.kernels.speed.problems import Inputs
from ham.kernels.triton_target import triton_available

ARGSORT = "argsort"
Part = Callable[[Inputs], dict[str, Tensor]]


def index_with_torch(inputs: Inputs) -> dict[str, Tensor]:
    """Cumulative sum and scatter; slots beyond the count hold T."""
    routed_BT = inputs["routed_BT"]
    counts_BT = routed_BT.cumsum(1)
    return {
        "position": packed_positions(routed_BT, counts_BT, routed_BT.shape[1]),
        "count": counts_BT[:, -1],
    }


def index_with_argsort(inputs: Inputs) -> dict[str, Tensor]:
    """A stable sort that brings routed tokens to the front."""
    routed_BT = inputs["routed_BT"]
    count_B = routed_BT.sum(1)
    order_BT = torch.argsort(~routed_BT, dim=1, stable=True)
    slot_T = torch.arange(routed_BT.shape[1], device=routed_BT.device)
    unused_BT = slot_T >= count_B.unsqueeze(1)
    return {"position": order_BT.masked_fill(unused_BT, routed_BT.shape[1]), "count": count_B}


def index_with_triton(inputs: Inputs) -> dict[str, Tensor]:
    """The index launch of the Triton provider."""
    from ham.kernels.routed_attention.triton_pack import scan

    routed_BT = inputs["routed_BT"]
    index = scan(routed_BT)
    return {
        "position": index.positions_BN[:, : routed_BT.shape[1]],
        "count": index.counts_BT[:, -1],
    }


def pack_with_triton(inputs: Inputs) -> dict[str, Tensor]:
    """The index and packing launches of the Triton provider."""
    from ham.kernels.routed_attention.triton_pack import pack, scan

    k, v, routed_BT = inputs.values()
    index = scan(routed_BT)
    time = k.shape[1]
    packed_k, packed_v = pack(k, v, index)
    return {
        "position": index.positions_BN[:, :time],
        "count": index.counts_BT[:, -1],
        "k": packed_k.transpose(1, 2)[:, :time],
        "v": packed_v.transpose(1, 2)[:, :time],
    }


def mismatch(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """What differs in the slots in use, or None; everything has to be equal."""
    count_B = expected["count"]
    if not torch.equal(found["count"].long(), count_B.long()):
        return "counts differ"
    slot_N = torch.arange(expected["position"].shape[1], device=count_B.device)
    used_BN = slot_N < count_B.unsqueeze(1)
    for name in set(expected).difference({"count"}):
        if not torch.equal(found[name][used_BN].double(), expected[name][used_BN].double()):
            return f"{name} differs in slots in use"
    return None


def _packing(index: Part) -> Part:
    def pack(inputs: Inputs) -> dict[str, Tensor]:
        found = index(inputs)
        k, v, _ = inputs.values()
        # Without asking the device for the largest count, room is needed for every token.
        slot_BT = found["position"].clamp(max=k.shape[1] - 1).long()[:, :, None, None]
        return {
            **found,
            "k": k.gather(1, slot_BT.expand_as(k)),
            "v": v.gather(1, slot_BT.expand_as(v)),
        }

    return pack


def providers(operation: str) -> dict[str, Part]:
    """Every provider of a part by name."""
    known = {TORCH: index_with_torch, ARGSORT: index_with_argsort}
    if operation == "route_pack":
        packing = {name: _packing(part) for name, part in known.items()}
        return {TRITON: pack_with_triton, **packing}
    return {TRITON: index_with_triton, **known}


def refusal(name: str, device: torch.device) -> str | None:
    """Why a part cannot run on a device, or None."""
    if name != TRITON:
        return None
    if not triton_available(device):
        return "not available: Triton is missing or cannot run on this device"
    if importlib.util.find_spec("ham.kernels.routed_attention.triton_pack") is None:
        return "not available: routed attention has no Triton kernels"
    return None
