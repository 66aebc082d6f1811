"""Triton routed attention against float64: in the interpreter anywhere, on the GPU where there is
one (tests marked `gpu`)."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from triton_device import DEVICE, interpreter, needs_gpu

from ham.errors import ConfigError, DeviceError
from ham.kernels.registry import find_operation
from ham.kernels.routed_attention import routed_attention
from ham.kernels.routed_attention.cases import VERIFY_CASES
from ham.kernels.routed_attention.cases import RoutedAttentionCase as Case
from ham.kernels.verify import SEED, compare

__all__ = ["interpreter", "needs_gpu"]
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
KERNELS = ("forward", "query_gradient", "key_gradient")

CASES = [
    Case(1, 1, 5, 16, 16, fraction=1.0, key_heads=1, window=2, sink=True, score=True),
    Case(3, 64, 1, 32, 16, ragged=True, window=1, score=True),
    Case(1, 200, 5, 24, 40, key_heads=5, window=33, sink=True, score=True),
]
GPU_CASES = [
    *(
        Case(3, time, 5, 32, 64, ragged=True, key_heads=1, window=7, sink=True, score=True)
        for time in (1, 63, 64, 65, 200)
    ),
    Case(1, 1000, 2, 128, 128),
    Case(3, 500, 4, 128, 128, ragged=True, key_heads=2, window=100, sink=True, score=True),
    Case(1, 1000, 1, 64, 64, fraction=1.0),
    Case(2, 500, 2, 64, 128, fraction=0.03, score=True),
    Case(3, 200, 5, 128, 64, ragged=True, window=1),
    Case(2, 200, 2, 72, 40, sink=True),
    Case(3, 65, 3, 16, 16, fraction=0.0, sink=True, score=True),
]
gpu = pytest.mark.gpu


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new memory start as NaN, or as a large index."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def outputs_and_gradients(
    inputs: dict[str, Any], provider: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read-outs, and all gradients of their sum weighted with fixed random numbers."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in inputs.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }
    o = routed_attention(**{**inputs, **leaves}, provider=provider)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(o.shape, generator=generator).to(DEVICE, dtype).to(o.dtype)
    gradients = torch.autograd.grad(o, list(leaves.values()), weight, materialize_grads=True)
    names = [f"d{name.rsplit('_', 1)[0]}" for name in leaves]
    return {"o": o.detach(), **dict(zip(names, gradients, strict=True))}


def relative_errors(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Norm of the difference to float64 over the norm, 0/0 counted as 0.

    A gradient that vanishes, as those of scores do where every query sees one key, is measured
    against the largest gradient: what is left of it is the rounding of its terms.
    """
    wide = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    expected = outputs_and_gradients(wide, "reference", dtype)
    received = outputs_and_gradients(inputs, "triton", dtype)
    assert received.keys() == expected.keys()
    norms = {name: value.norm().item() for name, value in expected.items()}
    largest = max(norms.values())
    errors = {}
    for name, value in expected.items():
        difference = (received[name].double() - value).norm().item()
        size = norms[name] if norms[name] > 1e-12 * largest else largest
        errors[name] = difference / size if difference else 0.0
    return errors


def worst(errors: dict[str, float]) -> float:
    """The largest error; NaN counts as infinite, and all are printed should a test fail."""
    print({name: f"{error:.1e}" for name, error in errors.items()})
    return max(math.inf if math.isnan(error) else error for error in errors.values())


@pytest.mark.parametrize("case", [*VERIFY_CASES, *CASES], ids=lambda case: case.name)
def test_outputs_and_gradients_match_float64(case: Case, poisoned: None) -> None:
    result = compare(find_operation("routed_attention"), "triton", case, torch.float32, DEVICE)
    assert result.passed, result.errors


def test_loads_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way to load, taken in float32 and before Hopper."""
    from ham.kernels.routed_attention import (
        triton_forward,
        triton_key_gradient,
        triton_query_gradient,
    )

    for module in (triton_forward, triton_query_gradient, triton_key_gradient):
        monkeypatch.setattr(module, "use_descriptors", lambda *tensors: False)
    case = Case(2, 130, 2, 16, 32, key_heads=1, window=9, sink=True, score=True)
    inputs = case.inputs(torch.float32, DEVICE, SEED)
    assert worst(relative_errors(inputs, torch.float32)) < LIMIT[torch.float32]


@pytest.mark.parametrize("tile", [(64, 128), (128, 64), (128, 128)], ids=str)
def test_tiles_of_other_shapes(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    """Blocks that end inside, at the end of, and beyond the sequence and its packed keys."""
    from ham.kernels.routed_attention import triton_tiles

    chosen = triton_tiles.Tile(*tile, 4, 2)
    monkeypatch.setattr(triton_tiles, "choose_tile", lambda *_: chosen)
    case = Case(3, 150, 1, 16, 16, 0.6, ragged=True, window=5, score=True)
    inputs = case.inputs(torch.float32, DEVICE, SEED)
    assert worst(relative_errors(inputs, torch.float32)) < LIMIT[torch.float32]


def test_index_of_several_blocks(poisoned: None) -> None:
    """2,500 flags are three blocks of the scan; the last sequence fills up behind its count."""
    from ham.kernels.routed_attention.packed import pack_positions
    from ham.kernels.routed_attention.triton_pack import scan
    from ham.kernels.routed_attention.triton_tiles import packed_rows

    generator = torch.Generator().manual_seed(0)
    routed = (torch.rand(4, 2500, generator=generator) < 0.3).to(DEVICE)
    routed[0], routed[1] = False, True
    index = scan(routed)
    counts = routed.cumsum(1)
    assert torch.equal(index.counts_BT.long(), counts)
    assert index.positions_BN.shape[1] == packed_rows(2500) == 2560
    assert torch.equal(index.positions_BN[:, :2500].long(), pack_positions(routed, counts))
    assert (index.positions_BN[:, 2500:] == 2500).all()


def test_packing_moves_routed_rows_and_pads_with_zeros(poisoned: None) -> None:
    from ham.kernels.routed_attention.triton_pack import pack, scan

    inputs = Case(2, 200, 2, 24, 16, 0.3).inputs(torch.float32, DEVICE, SEED)
    routed = inputs["routed_BT"]
    packed = pack(inputs["k_BTGK"], inputs["v_BTGV"], scan(routed))
    for rows, tokens in zip(packed, (inputs["k_BTGK"], inputs["v_BTGV"]), strict=True):
        for sequence in range(2):
            count = int(routed[sequence].sum())
            expected = tokens[sequence][routed[sequence]].transpose(0, 1)
            assert torch.equal(rows[sequence, :, :count], expected)
            assert (rows[sequence, :, count:128] == 0).all()
            assert rows[sequence, :, 128:].isnan().all()


@pytest.mark.parametrize("size", [1e-4, 8.0, 30.0])
def test_extreme_scores(size: float) -> None:
    """Flat softmax, and one that is a maximum: scores up to a few thousand."""
    case = Case(2, 100, 2, 16, 16, 0.4, window=3, sink=True, score=True)
    inputs = case.inputs(torch.float32, DEVICE, SEED)
    inputs["q_BTHK"], inputs["k_BTGK"] = inputs["q_BTHK"] * size, inputs["k_BTGK"] * size
    errors = relative_errors(inputs, torch.float32)
    if size == 30.0:
        # Differences of nearly equal numbers: the reference in float32 is off by 1e-4 as well.
        assert max(errors.pop("dq"), errors.pop("dk")) < 1e-3
    assert worst(errors) < LIMIT[torch.float32]


def test_a_row_without_keys_is_exactly_zero_whatever_the_others_hold() -> None:
    inputs = Case(1, 70, 1, 16, 16).inputs(torch.float32, DEVICE, SEED)
    inputs["routed_BT"][:] = False
    inputs["routed_BT"][0, 40:] = True
    inputs["v_BTGV"][0, :40] = torch.nan
    inputs["k_BTGK"][0, :40] = torch.inf
    received = outputs_and_gradients(inputs, "triton", torch.float32)
    assert (received["o"][:, :40] == 0).all() and (received["dq"][:, :40] == 0).all()
    assert all(value.isfinite().all() for value in received.values())
    assert (received["dk"][:, :40] == 0).all() and (received["dv"][:, :40] == 0).all()


def test_router_scores_change_no_output_and_only_the_asked_gradients() -> None:
    inputs = Case(1, 40, 1, 16, 16, score=True).inputs(torch.float32, DEVICE, SEED)
    with_scores = routed_attention(**inputs, provider="triton")
    scores = inputs.pop("router_score_BT").requires_grad_()
    assert torch.equal(with_scores, routed_attention(**inputs, provider="triton"))
    o = routed_attention(**inputs, router_score_BT=scores, provider="triton")
    o.sum().backward()
    assert (scores.grad[~inputs["routed_BT"]] == 0).all()
    assert (scores.grad[inputs["routed_BT"]] != 0).any()


def test_compiles_into_one_graph() -> None:
    case = Case(2, 70, 2, 16, 16, key_heads=1, window=3, sink=True, score=True)
    inputs = case.inputs(torch.float32, DEVICE, SEED)
    names = [name for name, value in inputs.items() if torch.is_tensor(value)]
    names.remove("routed_BT")

    def run(leaves: dict[str, torch.Tensor], routed: torch.Tensor) -> torch.Tensor:
        o = routed_attention(**leaves, routed_BT=routed, window=case.window, provider="triton")
        return (o * o).sum()

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        loss = function(leaves, inputs["routed_BT"])
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("switches", [False, True])
def test_custom_operators_keep_their_contracts(switches: bool) -> None:
    from ham.kernels.routed_attention.triton_provider import forward_op

    case = Case(1, 20, 2, 16, 16, window=2 * switches, sink=switches, score=switches)
    inputs = case.inputs(torch.float32, DEVICE, SEED)
    tensors = [inputs.get(name) for name in ("q_BTHK", "k_BTGK", "v_BTGV", "routed_BT")]
    tensors += [inputs.get("sink_HK"), inputs.get("router_score_BT")]
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward_op, (*leaves, case.window, 0.3), test_utils=tests)


def test_inputs_need_not_be_contiguous() -> None:
    inputs = Case(1, 20, 2, 16, 16).inputs(torch.float32, DEVICE, SEED)
    expected = outputs_and_gradients(inputs, "triton", torch.float32)
    strided = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2) if value.ndim == 4 else value
        for name, value in inputs.items()
    }
    assert not strided["q_BTHK"].is_contiguous()
    received = outputs_and_gradients(strided, "triton", torch.float32)
    assert all(torch.equal(received[name], expected[name]) for name in expected)


def test_what_the_kernels_lack_is_refused_by_name() -> None:
    inputs = Case(1, 2, 1, 16, 16).inputs(torch.float32, DEVICE, SEED)
    with pytest.raises(ConfigError, match=r"positive scale, not -1"):
        routed_attention(**inputs, scale=-1.0, provider="triton")
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    with pytest.raises(ConfigError, match=r"float64"):
        routed_attention(**wide, provider="triton")
    large = Case(1, 2, 1, 160, 16).inputs(torch.float32, DEVICE, SEED)
    with pytest.raises(ConfigError, match="K = 160"):
        routed_attention(**large, provider="triton")


def test_without_interpreter_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = Case(1, 2, 1, 16, 16).inputs(torch.float32, torch.device("cpu"), SEED)
    with pytest.raises(DeviceError, match="triton"):
        routed_attention(**inputs, provider="triton")


def test_importing_the_operation_does_not_import_triton() -> None:
    code = "import ham.kernels.routed_attention, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_compile_cases_have_unique_names_and_a_small_default_set() -> None:
    from ham.kernels.routed_attention.compile_cases import COMPILE_CASES

    names = [case.name for case in COMPILE_CASES]
    assert len(set(names)) == len(names)
    assert sum(case.default for case in COMPILE_CASES) <= 12


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu_matches_float64(needs_gpu: None, case: Case, dtype: torch.dtype) -> None:
    errors = relative_errors(case.inputs(dtype, DEVICE, SEED), dtype)
    assert worst(errors) < LIMIT[dtype], errors


@gpu
@pytest.mark.parametrize("size", [32, 64, 128])
def test_gpu_every_tile_configuration(
    needs_gpu: None, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from ham.kernels.routed_attention import triton_tiles

    case = Case(2, 400, 2, size, size, key_heads=1, window=20, sink=True, score=True)
    inputs = case.inputs(torch.bfloat16, DEVICE, SEED)
    choose = triton_tiles.choose_tile
    for kernel in KERNELS:
        for tile in triton_tiles.CANDIDATES[kernel]:

            def chosen(asked: str, *tensors: torch.Tensor, kernel=kernel, tile=tile) -> Any:
                return tile if asked == kernel else choose(asked, *tensors)

            monkeypatch.setattr(triton_tiles, "choose_tile", chosen)
            errors = relative_errors(inputs, torch.bfloat16)
            assert worst(errors) < LIMIT[torch.bfloat16], (kernel, tile, errors)


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_gpu_same_inputs_give_same_bits(needs_gpu: None, size: int, dtype: torch.dtype) -> None:
    """A difference between runs would be a race."""
    case = Case(4, 1000, 8, size, size, key_heads=4, window=20, sink=True, score=True)
    inputs = case.inputs(dtype, DEVICE, SEED)
    first = outputs_and_gradients(inputs, "triton", dtype)
    for _ in range(10):
        again = outputs_and_gradients(inputs, "triton", dtype)
        assert all(torch.equal(first[name], again[name]) for name in first)
