"""The reference of the decode kernels against the layers, in float64; needs no Triton."""

from __future__ import annotations

import pytest
import torch

from ham.baselines.gated_delta_rule import GatedDeltaRule, GatedDeltaRuleOptions
from ham.kernels.decode import reference
from ham.kernels.decode.tiles import choose_tile
from ham.layer import HamMixer, HamOptions
from ham.model.mixer import MixerShape
from ham.routing import head_scores, reduce_heads

HEADS, HEAD_DIM, BATCH, TOKENS = 3, 8, 2, 12
SHAPE = MixerShape(HEADS * HEAD_DIM, HEADS, max_positions=64, kernels="torch")


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rope", [True, False])
@torch.no_grad()
def test_ham_layer(rope: bool) -> None:
    """Decisions, cache content and output of `HamMixer.step`."""
    torch.manual_seed(0)
    mixer = HamMixer(SHAPE, HamOptions(rope=rope)).double().eval()
    mixer.controller.threshold.fill_(0.9)
    state = mixer.init_state(BATCH, torch.device("cpu"), torch.float64)
    history_BWC, state_BHKV = state.history_BWC, state.recurrent_BHKV
    cache = reference.ListCache(BATCH)
    tables = {}
    if rope:
        tables = {"cos_MK": mixer.rotary.cos, "sin_MK": mixer.rotary.sin}
    for token in range(TOKENS):
        x_BD = torch.randn(BATCH, HEADS * HEAD_DIM, dtype=torch.float64)
        expected_BD = mixer.step(x_BD, state)
        mixed_BC, history_BWC = reference.convolve(
            mixer.qkv(x_BD), mixer.conv.weight_WC, history_BWC
        )
        projected = reference.project(
            mixed_BC,
            mixer.gates.projection(x_BD),
            mixer.gates.log_rate_H,
            mixer.gates.step_bias_H,
            HEAD_DIM,
            q_gain_K=mixer.q_norm.weight,
            k_gain_K=mixer.k_norm.weight,
            positions_B=torch.full((BATCH,), token),
            **tables,
        )
        o_BHV, state_BHKV, prediction_BHV = reference.recur(projected, state_BHKV)
        score_BH = reference.head_scores(
            "cosine", prediction_BHV, projected.v_BHV, projected.beta_BH
        )
        routed_B = reference.row_scores(score_BH, "min") >= mixer.controller.threshold
        cache.append(projected.attention_k_BHK, projected.v_BHV, routed_B.tolist(), [token] * BATCH)
        attended_BHV = cache.attend(projected.attention_q_BHK, projected.v_BHV, HEAD_DIM**-0.5)
        y_BHV = reference.combine(
            o_BHV,
            attended_BHV,
            mixer.branch_gates(x_BD),
            mixer.recurrent_norm.weight,
            mixer.attention_norm.weight,
        )
        assert close(mixer.out(y_BHV.flatten(1)), expected_BD)
    counts = [len(positions) for positions in cache.positions]
    assert state.cache.paged.counts_B.tolist() == counts
    assert 0 < sum(counts) < TOKENS * BATCH
    assert close(state.recurrent_BHKV, state_BHKV)


@torch.no_grad()
def test_gated_delta_rule_layer() -> None:
    torch.manual_seed(0)
    mixer = GatedDeltaRule(SHAPE, GatedDeltaRuleOptions(expand_v=2)).double().eval()
    state = mixer.init_state(BATCH, torch.device("cpu"), torch.float64)
    history_BWC, state_BHKV = state.history_BWC, state.recurrent
    for _ in range(TOKENS):
        x_BD = torch.randn(BATCH, HEADS * HEAD_DIM, dtype=torch.float64)
        expected_BD = mixer.step(x_BD, state)
        mixed_BC, history_BWC = reference.convolve(
            mixer.qkv(x_BD), mixer.conv.weight_WC, history_BWC
        )
        projected = reference.project(
            mixed_BC,
            mixer.gates.projection(x_BD),
            mixer.gates.log_rate_H,
            mixer.gates.step_bias_H,
            HEAD_DIM,
        )
        o_BHV, state_BHKV, _ = reference.recur(projected, state_BHKV)
        normed_BD = reference.rms_norm(o_BHV, mixer.output_norm.weight).flatten(1)
        y_BD = normed_BD * torch.nn.functional.silu(mixer.output_gate(x_BD))
        assert close(mixer.out(y_BD), expected_BD)


@pytest.mark.parametrize("score", ["cosine", "l2", "committed"])
@pytest.mark.parametrize("reduction", ["min", "mean", "max"])
def test_scores(score: str, reduction: str) -> None:
    """Those of `ham.routing`, also for an empty state and a value of 0."""
    torch.manual_seed(0)
    p_BHV, v_BHV = torch.randn(2, 4, HEADS, HEAD_DIM, dtype=torch.float64)
    p_BHV[0], v_BHV[1, 0] = 0, 0
    beta_BH = torch.rand(4, HEADS, dtype=torch.float64)
    ours_B = reference.row_scores(reference.head_scores(score, p_BHV, v_BHV, beta_BH), reduction)
    expected_BH = head_scores(score, p_BHV, v_BHV, beta_BH)
    assert close(ours_B, reduce_heads(expected_BH, reduction))
    assert reference.row_scores(expected_BH, "per_head").shape == (4 * HEADS,)


def test_post_update_score() -> None:
    """What is left of the error after the write, for a key of length one: |v - S^T k|."""
    torch.manual_seed(0)
    state_HKV = torch.randn(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    k_BHK = torch.nn.functional.normalize(torch.randn(1, HEADS, HEAD_DIM).double(), dim=-1)
    v_BHV = torch.randn(1, HEADS, HEAD_DIM, dtype=torch.float64)
    log_decay_BH, beta_BH = -torch.rand(1, HEADS).double(), torch.rand(1, HEADS).double()
    projected = reference.Projected(k_BHK, k_BHK, None, None, v_BHV, log_decay_BH, beta_BH)
    _, new_BHKV, prediction_BHV = reference.recur(projected, state_HKV)
    left_BH = (v_BHV - torch.einsum("bhkv,bhk->bhv", new_BHKV, k_BHK)).norm(dim=-1)
    assert close(reference.head_scores("post_update", prediction_BHV, v_BHV, beta_BH), left_BH)


@pytest.mark.parametrize(
    ("batch", "cached", "splits"), [(16, 8192, 8), (1, 8192, 64), (1, 256, 4), (64, 0, 1)]
)
def test_splits(batch: int, cached: int, splits: int) -> None:
    """An H100 has 132 multiprocessors: 2112 programs wanted, of 64 tokens at least."""
    assert choose_tile(batch, 16, cached, torch.device("cpu")).splits == splits
