"""Prefills to compare: what one leaves, against an ordinary prefill of the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ham.kernels.sdpa import fastest_first
from ham.measure.sweep.prefill_graph import routed_cache
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState


class Left(NamedTuple):
    """Logits after the last token, fixed-size memories by name, and exact counts.

    Attributes:
        tensors: Of the fixed-size memories and of the caches, packed.
        integers: Counts and positions of the routed tokens.
    """

    logits_BV: Tensor
    tensors: dict[str, Tensor]
    integers: dict[str, Tensor]
    bytes_by_kind: dict[str, int]


def what_is_left(logits_BV: Tensor, state: DecoderState) -> Left:
    """Copies of everything that decoding would read."""
    tensors, integers = {}, {}
    for index, layer in enumerate(state.layers):
        cache = routed_cache(layer)
        if cache is None:
            held = layer.tensors()
        else:
            packed = cache.paged.packed()
            used = torch.arange(packed.k_BNHK.shape[1], device=logits_BV.device)
            used_BN11 = (used < packed.counts_B[:, None])[..., None, None]
            held = {
                "packed": [packed.k_BNHK * used_BN11, packed.v_BNHV * used_BN11],
                "ring": cache.recent.tensors(),
                "recurrent": [layer.recurrent_BHKV],
                "conv": [layer.history_BWC],
            }
            integers[f"{index} counts"] = packed.counts_B.clone()
            positions_BN = packed.positions_BN * used_BN11[..., 0, 0]
            integers[f"{index} positions"] = positions_BN.clone()
            assert cache.paged.counts == packed.counts_B.tolist()
        for kind, group in held.items():
            for nth, tensor in enumerate(group):
                tensors[f"{index} {kind} {nth}"] = _filled(tensor, kind, state).clone()
    return Left(logits_BV.clone(), tensors, integers, state.bytes_allocated())


def _filled(tensor: Tensor, kind: str, state: DecoderState) -> Tensor:
    """Without the slots of a growing cache that nobody has filled: they may hold anything."""
    return tensor[:, : state.longest] if kind == "kv" else tensor


@torch.no_grad()
def ordinary(model: DecoderLM, tokens_BT: Tensor) -> Left:
    """What `DecoderLM.prefill` leaves."""
    state = model.init_state(tokens_BT.shape[0])
    with fastest_first(model.device):
        logits_BTV = model.prefill(tokens_BT, state, last_only=True).logits_BTV
    return what_is_left(logits_BTV[:, -1], state)


@torch.no_grad()
def route_a_share(model: DecoderLM, tokens_BT: Tensor, share: float) -> None:
    """Freeze every threshold where about `share` of these tokens pass, so that data decide."""
    x_BTD = model.embedding(tokens_BT)
    for block in model.blocks:
        score = block.mixer.score(block.mixer_norm(x_BTD))
        block.mixer.controller.calibrate(score, share)
        x_BTD = block(x_BTD)[0]


def worst(found: Left, expected: Left) -> float:
    """Largest relative distance of a tensor; everything that is exact must be equal.

    Raises:
        AssertionError: If counts, positions, shapes or bytes differ.
    """
    assert found.bytes_by_kind == expected.bytes_by_kind
    assert found.integers.keys() == expected.integers.keys()
    for name, integers in expected.integers.items():
        assert torch.equal(found.integers[name], integers), name
    pairs = [(found.logits_BV, expected.logits_BV)]
    assert found.tensors.keys() == expected.tensors.keys()
    pairs += [(found.tensors[name], tensor) for name, tensor in expected.tensors.items()]
    distances = [0.0]
    for one, other in pairs:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        size = float(other.double().norm())
        distance = float((one.double() - other.double()).norm())
        distances.append(distance / size if size else distance)
    return max(distances)
