"""Peers: what is packed, what is passed on, what is refused; their packages are stand-ins here."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ham.errors import ConfigError
from ham.kernels.gated_delta_rule import gated_delta_rule
from ham.kernels.peers import fla, flex, mamba, sdpa
from ham.kernels.peers.packages import environment, given, tensor, version_of
from ham.kernels.routed_attention import routed_attention
from ham.kernels.ssd import ssd

CPU = torch.device("cpu")


def random_attention(time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence without routed tokens, one with a late start, one with all."""
    generator = torch.Generator().manual_seed(time)
    q, k, v = (torch.randn(3, time, 2, 16, generator=generator) for _ in range(3))
    routed_BT = torch.rand(3, time, generator=generator) < 0.3
    routed_BT[0], routed_BT[1, : time // 2], routed_BT[2] = False, False, True
    return q, k, v, routed_BT


@pytest.mark.parametrize("time", [1, 128, 129, 300])
def test_packed_and_masked_flex_attention_are_routed_attention(time: int) -> None:
    q, k, v, routed_BT = random_attention(time)
    expected = routed_attention(q, k, v, routed_BT, provider="reference")
    packed = flex.pack(k, v, routed_BT)
    assert packed.k_BNGK.shape[1] % flex.BLOCK == 0
    for keys, values, mask in (
        (packed.k_BNGK, packed.v_BNGV, packed.mask),
        (k, v, flex.causal_mask(routed_BT)),
    ):
        found = flex.attend(q, keys, values, mask, None, kernel=flex_attention)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(found[0], torch.zeros_like(found[0]))


def test_blocks_of_packed_keys() -> None:
    """Full and partial blocks by counting visible pairs, 300 queries and 300 keys at most."""
    _, k, v, routed_BT = random_attention(300)
    counts_BT = routed_BT.cumsum(1)
    slots = flex.pack(k, v, routed_BT).k_BNGK.shape[1]
    lists = flex.block_lists(counts_BT, slots)
    position_BN = flex.packed_positions(routed_BT, counts_BT, slots)
    visible = position_BN[:, None, :] <= torch.arange(300)[None, :, None]
    for sequence in range(3):
        for row in range(3):
            part = visible[sequence, row * 128 : (row + 1) * 128].split(128, dim=1)
            full = [block for block, pairs in enumerate(part) if pairs.all()]
            some = [block for block, pairs in enumerate(part) if pairs.any()]
            assert listed(lists, "full_kv", sequence, row) == full
            assert set(some).difference(full) <= set(listed(lists, "kv", sequence, row))


def listed(lists: dict[str, Tensor], kind: str, sequence: int, row: int) -> list[int]:
    count = int(lists[f"{kind}_num_blocks"][sequence, 0, row])
    return lists[f"{kind}_indices"][sequence, 0, row, :count].tolist()


@pytest.mark.skipif(not flex.has_choice_of_lists(), reason="this torch has no such choice")
def test_a_forward_does_not_pay_for_the_lists_of_a_backward() -> None:
    _, k, v, routed_BT = random_attention(130)
    assert flex.pack(k, v, routed_BT).mask.q_indices is not None
    with torch.no_grad():
        assert flex.pack(k, v, routed_BT).mask.q_indices is None
        assert flex.pack(k, v, routed_BT, backward=True).mask.q_indices is not None


def test_grouped_heads_reach_flex_attention() -> None:
    q, k, v, routed_BT = random_attention(130)
    shared = [x[:, :, :1] for x in (k, v)]
    expected = routed_attention(
        q, *(x.expand(-1, -1, 2, -1) for x in shared), routed_BT, provider="reference"
    )
    packed = flex.pack(*shared, routed_BT)
    found = flex.attend(q, *packed, None, kernel=flex_attention)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_switches_of_routed_attention_are_refused() -> None:
    q, k, v, routed_BT = random_attention(4)
    arguments = {"q_BTHK": q, "k_BTGK": k, "v_BTGV": v, "routed_BT": routed_BT}
    assert flex.limits({**arguments, "window": 0, "sink_HK": None}) is None
    assert flex.limits({**arguments, "window": 4}) == "window is not done here"
    assert "sink" in flex.limits({**arguments, "sink_HK": q})


@pytest.mark.parametrize("function", [flex.packed_attention, flex.masked_attention, fla.ssd])
def test_arguments_that_would_be_ignored_are_refused(function: Any) -> None:
    q, k, v, routed_BT = random_attention(4)
    rest = (q, q) if function is fla.ssd else ()
    with pytest.raises(ConfigError, match="does not take window"):
        function(q, k, v, routed_BT, *rest, window=2, chunk_size=64, sink_HK=None)


def test_dense_attention_only_where_all_is_routed_in_half_precision() -> None:
    q, k, v, routed_BT = random_attention(4)
    arguments = {"q_BTHK": q, "k_BTHK": k, "v_BTHV": v, "routed_BT": routed_BT}
    assert "takes bfloat16" in sdpa.limits(arguments)
    arguments["q_BTHK"] = q.bfloat16()
    assert "another function" in sdpa.limits(arguments)
    arguments["routed_BT"] = torch.ones_like(routed_BT)
    assert sdpa.limits(arguments) is None
    assert "sink" in sdpa.limits({**arguments, "sink_HK": q})


def test_dense_attention_is_causal_attention() -> None:
    q, k, v, routed_BT = random_attention(20)
    all_BT = torch.ones_like(routed_BT)
    expected = routed_attention(q, k, v, all_BT, provider="reference")
    found = sdpa.dense_attention(q, k, v, all_BT, backend=sdpa.SDPBackend.MATH)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


class StandIn:
    """Modules that answer imports, with functions that record what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.environment: dict[str, str] = {}

    def install(self, name: str, **functions: Any) -> ModuleType:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:length])) or ModuleType(parts[length - 1])
            self.monkeypatch.setitem(sys.modules, ".".join(parts[:length]), module)
        for key, value in functions.items():
            setattr(module, key, value)
        return module

    def record_environment(self) -> None:
        self.environment = {key: os.environ[key] for key in os.environ if key.startswith("FLA_")}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.mark.parametrize(
    ("provider", "flag"), [(fla.GATED_DELTA_RULE[0], "0"), (fla.GATED_DELTA_RULE[1], "1")]
)
def test_gated_delta_rule_of_fla(stand_in: StandIn, provider: Any, flag: str) -> None:
    """Arguments arrive under FLA's names, and the switch to FlashQLA stands where it should."""

    def chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state):
        stand_in.record_environment()
        assert output_final_state
        output = gated_delta_rule(
            q, k, v, g, beta, scale=scale, initial_state_BHKV=initial_state, provider="reference"
        )
        return output.o_BTHV, output.final_state_BHKV

    stand_in.install("fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 4, generator=generator) for _ in range(3))
    gates = (-torch.rand(1, 5, 2, generator=generator), torch.rand(1, 5, 2, generator=generator))
    state = torch.randn(1, 2, 4, 4, generator=generator)
    found = provider.function(q, k, v, *gates, initial_state_BHKV=state, scale=0.3, chunk_size=64)
    expected = gated_delta_rule(
        q, k, v, *gates, initial_state_BHKV=state, scale=0.3, provider="reference"
    )
    assert torch.equal(found.o_BTHV, expected.o_BTHV)
    assert torch.equal(found.final_state_BHKV, expected.final_state_BHKV)
    assert found.prediction_BTHV is None
    assert stand_in.environment == {"FLA_FLASH_QLA": flag, "FLA_TILELANG": "0"}
    assert "FLA_FLASH_QLA" not in os.environ


def simple_gla(q, k, v, g, scale, initial_state, output_final_state):
    """What FLA documents: S = exp(g) S + k v^T, o = scale S^T q, token by token."""
    batch, time, heads, size = k.shape
    state = torch.zeros(batch, heads, size, v.shape[-1], dtype=v.dtype)
    if initial_state is not None:
        state = initial_state
    outputs = []
    for t in range(time):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(scale * (q[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outputs, 1), state


def mamba_scan(x, dt, A, B, C, chunk_size, D, initial_states, return_final_states):
    """What mamba-ssm documents, by the reference of this project; b and c carry groups."""
    assert B.ndim == C.ndim == 4 and return_final_states
    output = ssd(
        x,
        dt,
        A,
        B.squeeze(2),
        C.squeeze(2),
        D,
        initial_state_BHPS=initial_states,
        provider="reference",
    )
    return output.y_BTHP, output.final_state_BHPS


@pytest.mark.parametrize("provider", [fla.SSD, mamba.SSD], ids=lambda provider: provider.name)
@pytest.mark.parametrize("with_state", [False, True])
def test_ssd_of_peers(stand_in: StandIn, provider: Any, with_state: bool) -> None:
    stand_in.install("fla.ops.simple_gla", chunk_simple_gla=simple_gla)
    stand_in.install("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_scan)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 5, 3, 4, generator=generator),
        torch.rand(2, 5, 3, generator=generator),
        -torch.rand(3, generator=generator),
        torch.randn(2, 5, 6, generator=generator),
        torch.randn(2, 5, 6, generator=generator),
        torch.randn(3, generator=generator),
    ]
    state = torch.randn(2, 3, 4, 6, generator=generator) if with_state else None
    found = provider.function(*inputs, initial_state_BHPS=state, chunk_size=64)
    expected = ssd(*inputs, initial_state_BHPS=state, provider="reference")
    torch.testing.assert_close(found.y_BTHP, expected.y_BTHP)
    torch.testing.assert_close(found.final_state_BHPS, expected.final_state_BHPS)


def test_groups_are_repeated_over_their_heads() -> None:
    grouped = torch.arange(2.0).view(1, 1, 2, 1)
    assert fla.per_head(grouped, 4).flatten().tolist() == [0, 0, 1, 1]
    assert fla.per_head(grouped[:, :, 0], 3).shape == (1, 1, 3, 1)


def test_guard_of_fla_is_off_only_inside(stand_in: StandIn) -> None:
    module = stand_in.install("fla.ops.common.chunk_o", TRITON_ABOVE_3_7_1=False)
    with fla.without_guard():
        assert module.TRITON_ABOVE_3_7_1 is True
    assert module.TRITON_ABOVE_3_7_1 is False


def test_limits_of_flash_qla() -> None:
    def arguments(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: torch.empty(1, 2, 1, size, dtype=dtype) for name in ("q_BTGK", "v_BTHV")}

    assert fla.flash_qla_limits(arguments(128, torch.bfloat16)) is None
    assert "K = V = 128" in fla.flash_qla_limits(arguments(64, torch.bfloat16))
    assert "bfloat16" in fla.flash_qla_limits(arguments(128, torch.float32))
    varied = {**arguments(128, torch.bfloat16), "cu_seqlens": torch.tensor([0, 2])}
    assert "cu_seqlens" in fla.rule_limits(varied)


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAM_TEST_A", "before")
    monkeypatch.delenv("HAM_TEST_B", raising=False)
    with environment({"HAM_TEST_A": "1", "HAM_TEST_B": "2"}):
        assert (os.environ["HAM_TEST_A"], os.environ["HAM_TEST_B"]) == ("1", "2")
        with environment({"HAM_TEST_A": "1"}):
            pass
        assert os.environ["HAM_TEST_A"] == "1"
    assert os.environ["HAM_TEST_A"] == "before" and "HAM_TEST_B" not in os.environ


def test_what_is_asked_about_packages() -> None:
    assert version_of("no-such-package", "torch")() == torch.__version__
    assert version_of("no-such-package")() is None
    assert given({"a": None, "b": 0, "c": 1}, "a", "b", "c") == "c"
    assert tensor({"q_BTGK": 1, "qq_B": 2}, "q") == 1
