"""Grouped heads and sequences side by side, for providers that know neither."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ham.kernels.chunks import compute_dtype
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput

Provided = Callable[..., GatedDeltaRuleOutput]


def any_layout(function: Provided) -> Provided:
    """Let `function` take key heads shared by several value heads, and `cu_seqlens_N1`.

    Keys and queries are repeated for the value heads of their group. Sequences are run one after
    the other, which reads their lengths on the host.
    """

    @functools.wraps(function)
    def wrapped(
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTHV: Tensor,
        *gates_BTH: Tensor,
        cu_seqlens_N1: Tensor | None = None,
        **options: Any,
    ) -> GatedDeltaRuleOutput:
        repeats = v_BTHV.shape[2] // k_BTGK.shape[2]
        if repeats > 1:
            q_BTGK, k_BTGK = (x.repeat_interleave(repeats, dim=2) for x in (q_BTGK, k_BTGK))
        inputs = (q_BTGK, k_BTGK, v_BTHV, *gates_BTH)
        if cu_seqlens_N1 is None:
            return function(*inputs, **options)
        return _one_by_one(function, inputs, cu_seqlens_N1.tolist(), **options)

    return wrapped


def _one_by_one(
    function: Provided,
    inputs: tuple[Tensor, ...],
    bounds: list[int],
    *,
    initial_state_BHKV: Tensor | None,
    **options: Any,
) -> GatedDeltaRuleOutput:
    k_BTHK, v_BTHV = inputs[1:3]
    shape = (1, v_BTHV.shape[2], k_BTHK.shape[-1], v_BTHV.shape[-1])
    outputs, states, predictions = [], [], []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if initial_state_BHKV is None:
            state = v_BTHV.new_zeros(shape, dtype=compute_dtype(*inputs))
        else:
            state = initial_state_BHKV[i : i + 1].to(compute_dtype(*inputs, initial_state_BHKV))
        if start < stop:
            part = (x[:, start:stop] for x in inputs)
            output, state, prediction = function(*part, initial_state_BHKV=state, **options)
            outputs.append(output)
            predictions.append(prediction)
        states.append(state)
    return GatedDeltaRuleOutput(torch.cat(outputs, 1), torch.cat(states), torch.cat(predictions, 1))
