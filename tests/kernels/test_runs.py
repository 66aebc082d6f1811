"""Operations under `torch.vmap` over runs against a loop over the runs: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from triton_device import DEVICE, interpreter

from ham.kernels.convolved_heads import Rotation, convolved_heads
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_scored
from ham.kernels.gated_sum import gated_sum
from ham.kernels.routed_attention import routed_attention
from ham.kernels.runs import differs_between_runs, takes_runs
from ham.model.window_attention import window_attention

__all__ = ["interpreter"]
R, B, T, H, K = 2, 2, 3, 1, 16


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def three(*shape: int) -> list[torch.Tensor]:
    return [drawn(*shape) + shift for shift in range(3)]


def rule(function: Callable[..., Any], provider: str) -> tuple[Callable[..., Any], list]:
    def call(q, k, v, decay, beta):
        return function(
            q, F.normalize(k, dim=-1), v, -decay.exp(), beta.sigmoid(), provider=provider
        )

    return call, [*three(R, B, T, H, K), drawn(R, B, T, H), drawn(R, B, T, H) - 1]


def attention(provider: str, sink: str) -> tuple[Callable[..., Any], list]:
    routed = drawn(R, B, T) > 0
    sinks = {"none": [], "shared": [drawn(1, H, K)[0]], "per run": [drawn(R, H, K)]}[sink]

    def call(q, k, v, score, routed, *sink_HK):
        return routed_attention(
            q,
            k,
            v,
            routed,
            window=2,
            sink_HK=sink_HK[0] if sink_HK else None,
            router_score_BT=score,
            provider=provider,
        )

    return call, [*three(R, B, T, H, K), drawn(R, B, T), routed, *sinks]


def heads(provider: str) -> tuple[Callable[..., Any], list]:
    angle_TK = drawn(T, K // 2)

    def call(x, weight, q_gain, k_gain):
        return convolved_heads(
            x,
            weight,
            heads=H,
            key_size=K,
            q_gain_K=q_gain,
            k_gain_K=k_gain,
            rotation=Rotation(angle_TK.cos(), angle_TK.sin()),
            provider=provider,
        )

    return call, [drawn(R, 1, T, 3 * H * K), drawn(R, 4, 3 * H * K), drawn(R, K), drawn(R, K) + 1]


def sums(provider: str) -> tuple[Callable[..., Any], list]:
    rows = [drawn(R, B, T, H, K), drawn(R, B, T, H, K) + 1, drawn(R, B, T, 2 * H)]
    return lambda *x: gated_sum(*x, provider=provider), [*rows, drawn(R, K), drawn(R, K) + 1]


CASES = {
    "delta rule": rule(gated_delta_rule, "torch"),
    "scored, torch": rule(gated_delta_rule_scored, "torch"),
    "scored, triton": rule(gated_delta_rule_scored, "triton"),
    "attention, torch": attention("torch", "none"),
    "shared null key, torch": attention("torch", "shared"),
    "shared null key, triton": attention("triton", "shared"),
    "null key per run, triton": attention("triton", "per run"),
    "heads, torch": heads("torch"),
    "heads, triton": heads("triton"),
    "sum, triton": sums("triton"),
    "window": (lambda *x: window_attention(*x, window=2, sinks=1), three(R, B, T, H, K)),
}


def weighed(made: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A sum of all outputs with a gradient in which every number has another weight."""
    total = torch.zeros((), device=DEVICE)
    for x in made:
        if x.requires_grad:
            total = total + (x * torch.arange(x.numel(), device=DEVICE).view_as(x)).sum()
    return total


@pytest.mark.parametrize("case", CASES)
def test_runs_together_are_runs_one_by_one(case: str) -> None:
    operation, inputs = CASES[case]

    def call(*tensors):
        return tuple(x for x in pytree.tree_leaves(operation(*tensors)) if x is not None)

    # A null key that all runs share has no axis of them.
    axes = [0] * (len(inputs) - 1) + [None if "shared" in case else 0]
    found = []
    for together in (True, False):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        if together:
            made = torch.vmap(call, in_dims=tuple(axes))(*leaves)
        else:
            each = [
                call(*(x if axis is None else x[run] for x, axis in zip(leaves, axes, strict=True)))
                for run in range(R)
            ]
            made = tuple(torch.stack(part) for part in zip(*each, strict=True))
        learned = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(weighed(made), learned)
        found.append([x.detach() for x in (*made, *grads)])
    assert len(found[0]) > len(inputs) - 1
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_rows_of_all_runs_are_one_call_and_shared_tensors_that_differ_one_each() -> None:
    calls = []

    @takes_runs("gain")
    def scaled(x_BT: torch.Tensor, gain: torch.Tensor, note: str = "") -> tuple:
        calls.append((tuple(x_BT.shape), note))
        assert not differs_between_runs(x_BT, gain)
        return x_BT * gain, None

    def product(x_BT: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        y_BT, nothing = scaled(x_BT, gain, note="rows")
        assert nothing is None
        return y_BT

    x_RBT, gain_R = drawn(R, B, T), drawn(R)
    y_RBT = torch.vmap(product, in_dims=(0, None))(x_RBT, gain_R[0])
    assert torch.equal(y_RBT, x_RBT * gain_R[0])
    y_RBT = torch.vmap(product, in_dims=(1, 0))(x_RBT.movedim(0, 1), gain_R)
    assert torch.equal(y_RBT, x_RBT * gain_R[:, None, None])
    assert calls == [((R * B, T), "rows"), *[((B, T), "rows")] * R]
    # A table that all runs read is repeated for their rows.
    together = takes_runs()(torch.add)
    y_RBT = torch.vmap(together, in_dims=(0, None))(x_RBT, x_RBT[1])
    assert torch.equal(y_RBT, x_RBT + x_RBT[1])
    assert torch.equal(scaled(x_RBT[0], gain_R[0])[0], x_RBT[0] * gain_R[0])
