"""The small decode kernels against the modules of the models that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decode_checks import CUDA, DEVICE, LIMIT, interpreter, random_numbers, relative_error

from ham.errors import ConfigError
from ham.kernels.decode import reference
from ham.model.blocks import RotaryPositions

__all__ = ["interpreter"]

GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=GPU),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, pytest.param(1024, marks=GPU)])
def test_add_rms_norm(dtype: torch.dtype, size: int) -> None:
    from ham.kernels.decode.blocks import add_rms_norm

    x_BD, y_BD = (random_numbers(seed, 3, size, dtype=dtype) for seed in (1, 2))
    gain_D = random_numbers(3, size)
    normed_BD = torch.empty_like(x_BD)
    add_rms_norm(x_BD, None, gain_D, None, normed_BD)
    assert relative_error(normed_BD, reference.rms_norm(x_BD, gain_D)) < LIMIT[dtype]
    sum_BD = x_BD + y_BD
    add_rms_norm(x_BD, y_BD, gain_D, x_BD, normed_BD)
    assert torch.equal(x_BD, sum_BD)
    assert relative_error(normed_BD, reference.rms_norm(sum_BD, gain_D)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [40, pytest.param(2752, marks=GPU)])
def test_silu_multiply(dtype: torch.dtype, hidden: int) -> None:
    from ham.kernels.decode.blocks import silu_multiply

    up_BF = random_numbers(1, 3, 2 * hidden, dtype=dtype, scale=3.0)
    hidden_BF = torch.empty(3, hidden, dtype=dtype, device=DEVICE)
    silu_multiply(up_BF, hidden_BF)
    gate_BF, value_BF = up_BF.chunk(2, dim=1)
    assert relative_error(hidden_BF, F.silu(gate_BF) * value_BF) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, pytest.param(128, marks=GPU)])
def test_gated_rms_norm(dtype: torch.dtype, size: int) -> None:
    from ham.kernels.decode.blocks import gated_rms_norm

    o_BHV = random_numbers(1, 2, 3, size, dtype=dtype)
    gate_BD = random_numbers(2, 2, 3 * size, dtype=dtype, scale=3.0)
    gain_V = random_numbers(3, size)
    y_BD = torch.empty_like(gate_BD)
    gated_rms_norm(o_BHV, gate_BD, gain_V, y_BD)
    truth_BD = reference.rms_norm(o_BHV, gain_V).flatten(1) * F.silu(gate_BD)
    assert relative_error(y_BD, truth_BD) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("key_size", [24, pytest.param(128, marks=GPU)])
def test_rope_append(dtype: torch.dtype, ring: bool, key_size: int) -> None:
    """Each sequence at its own position; a position beyond a dense cache is not stored."""
    from ham.kernels.decode.blocks import rope_append

    batch, heads, slots = 3, 2, 5
    qkv_BC = random_numbers(1, batch, 3 * heads * key_size, dtype=dtype)
    rotary = RotaryPositions(key_size, 16).to(DEVICE)
    positions_B = torch.tensor([0, 4, 6], device=DEVICE)
    q_BHK = torch.empty(batch, heads, key_size, dtype=dtype, device=DEVICE)
    k_cache_BNHK, v_cache_BNHK = (
        torch.full((batch, slots, heads, key_size), 9.0, dtype=dtype, device=DEVICE)
        for _ in range(2)
    )
    truth_k_BNHK, truth_v_BNHK = k_cache_BNHK.clone(), v_cache_BNHK.clone()
    rope_append(
        qkv_BC,
        rotary.cos,
        rotary.sin,
        positions_B,
        q_BHK,
        k_cache_BNHK,
        v_cache_BNHK,
        ring=ring,
    )
    q, k, v = (part.unflatten(1, (heads, key_size)) for part in qkv_BC.chunk(3, dim=1))
    for row, position in enumerate(positions_B.tolist()):
        truth_q_HK = rotary(q[row, None, None], position)[0, 0]
        assert relative_error(q_BHK[row], truth_q_HK) < LIMIT[dtype]
        if ring or position < slots:
            truth_k_BNHK[row, position % slots] = rotary(k[row, None, None], position)[0, 0]
            truth_v_BNHK[row, position % slots] = v[row]
    assert relative_error(k_cache_BNHK, truth_k_BNHK) < LIMIT[dtype]
    assert torch.equal(v_cache_BNHK, truth_v_BNHK)


def test_bad_arguments() -> None:
    from ham.kernels.decode.blocks import add_rms_norm, silu_multiply

    x_BD = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ConfigError, match=r"gain_D has shape \(4,\); needed is \(8,\)"):
        add_rms_norm(x_BD, None, torch.zeros(4), None, x_BD)
    with pytest.raises(ConfigError, match=r"up_BF has shape \(2, 8\); needed is \(2, 16\)"):
        silu_multiply(x_BD, x_BD)
