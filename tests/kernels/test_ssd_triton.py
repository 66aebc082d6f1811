"""The Triton provider of the Mamba-2 recurrence against the float64 reference.

Without a GPU the kernels run in Triton's interpreter, in float32. On a GPU the same comparisons run
compiled, and every tile configuration is compared once more: Triton 3.4-3.7 compiles some products
of transposed products wrongly on Hopper (FLA#640), which no interpreter shows.
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from triton_device import DEVICE, interpreter, needs_gpu

from ham.errors import ConfigError, DeviceError
from ham.kernels.ssd import ssd
from ham.kernels.ssd.cases import SsdCase as Case

__all__ = ["interpreter", "needs_gpu"]
OUTPUTS = ("y", "final_state")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

CASES = [
    Case(1, 1, 5, 16, 24, initial_state=True),
    Case(3, 63, 1, 16, 24),
    Case(1, 64, 2, 24, 16, initial_state=True, groups=2),
    Case(1, 65, 5, 16, 24, initial_state=True, gates="extreme", groups=1),
    Case(1, 130, 2, 72, 40, gates="extreme", groups=2),
    Case(1, 200, 4, 16, 16, initial_state=True, gates="extreme", groups=2),
]
GPU_CASES = [
    *(
        Case(3, time, 5, 32, 64, initial_state=True, gates="extreme", groups=groups)
        for time in (1, 63, 64, 65, 200)
        for groups in (None, 5)
    ),
    Case(1, 1000, 4, 64, 64),
    Case(1, 1000, 1, 128, 128, initial_state=True),
    Case(3, 200, 5, 128, 128, initial_state=True, gates="extreme", groups=5),
    Case(2, 500, 8, 64, 128, initial_state=True, groups=2),
    Case(1, 500, 2, 128, 64, groups=2),
    Case(2, 200, 6, 128, 128, groups=3),
    Case(2, 200, 2, 16, 24, gates="extreme", groups=2),
    Case(1, 500, 4, 16, 16, groups=4),
]
SIZES = [(head, state) for head in (32, 64, 128) for state in (16, 64, 128)]
gpu = pytest.mark.gpu


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    inputs = case.inputs(dtype, DEVICE, seed)
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def outputs_and_gradients(
    inputs: dict[str, torch.Tensor], provider: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """All outputs, and all gradients of their sum weighted with fixed random numbers."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = ssd(**leaves, provider=provider)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator).to(DEVICE, dtype) for part in output]
    torch.autograd.backward(output, [w.to(o.dtype) for w, o in zip(weights, output, strict=True)])
    gradients = {f"d{name.rsplit('_', 1)[0]}": leaf.grad for name, leaf in leaves.items()}
    return dict(zip(OUTPUTS, (part.detach() for part in output), strict=True)) | gradients


def worst(errors: dict[str, float]) -> float:
    """The largest error; NaN counts as infinite, and all are printed should a test fail."""
    print({name: f"{error:.1e}" for name, error in errors.items()})
    return max(math.inf if math.isnan(error) else error for error in errors.values())


def relative_errors(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """Errors on the inputs of a case."""
    return errors_on(make_inputs(case, dtype, seed), dtype)


def errors_on(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Norm of the difference to float64 over the norm, 0/0 counted as 0."""
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(wide, "torch", dtype)
    received = outputs_and_gradients(inputs, "triton", dtype)
    assert received.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        difference = (received[name].double() - value).norm().item()
        errors[name] = difference / value.norm().item() if difference else 0.0
    return errors


def cut_into(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    from ham.kernels.ssd import triton_tiles

    monkeypatch.setattr(triton_tiles, "count_segments", lambda *sizes: segments)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_match_float64(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    cut_into(monkeypatch, 1)
    errors = relative_errors(case, torch.float32)
    assert worst(errors) < LIMIT[torch.float32], errors


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Five chunks; in four segments of two the last segment is empty."""
    cut_into(monkeypatch, segments)
    errors = relative_errors(Case(1, 132, 2, 16, 16, initial_state=True), torch.float32)
    assert worst(errors) < LIMIT[torch.float32], errors


def test_segments_fill_the_chip_and_are_never_more_than_the_chunks() -> None:
    from ham.kernels.ssd.triton_tiles import count_segments

    assert count_segments(programs=256, chunks=64, multiprocessors=132) == 1
    assert count_segments(programs=32, chunks=512, multiprocessors=132) == 8
    assert count_segments(programs=1, chunks=3, multiprocessors=132) == 3
    assert count_segments(programs=1000, chunks=3, multiprocessors=132) == 1


@pytest.mark.parametrize(("blocks", "heads"), [(1, 3), (2, 3), (2, 4)])
def test_blocks_of_heads(monkeypatch: pytest.MonkeyPatch, blocks: int, heads: int) -> None:
    """Two blocks of three heads: one of two and one of one."""
    from ham.kernels.ssd import triton_backward

    monkeypatch.setattr(triton_backward, "count_head_blocks", lambda *sizes: blocks)
    cut_into(monkeypatch, 1)
    errors = relative_errors(Case(2, 70, 2 * heads, 16, 16, groups=2), torch.float32)
    assert worst(errors) < LIMIT[torch.float32], errors


def test_without_decay_and_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log decays of 0 and of -16,000 a token; steps of 0 write nothing."""
    cut_into(monkeypatch, 2)
    for step in (0.0, 1000.0):
        inputs = make_inputs(Case(1, 130, 2, 16, 16, initial_state=True, groups=2), torch.float32)
        inputs["dt_BTH"] = torch.full_like(inputs["dt_BTH"], step)
        errors = errors_on(inputs, torch.float32)
        assert worst(errors) < LIMIT[torch.float32], errors


def test_loads_through_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way to load, taken in bfloat16 on Hopper."""
    from ham.kernels.ssd import triton_forward, triton_states

    cut_into(monkeypatch, 2)
    monkeypatch.setattr(triton_forward, "use_descriptors", lambda *tensors: True)
    monkeypatch.setattr(triton_states, "use_descriptors", lambda *tensors: True)
    errors = relative_errors(Case(1, 130, 2, 24, 40, initial_state=True), torch.float32)
    assert worst(errors) < LIMIT[torch.float32]


@pytest.mark.parametrize("chunk", [64, 128])
def test_other_chunk_sizes(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    from ham.kernels.ssd import triton_tiles

    monkeypatch.setattr(triton_tiles, "CHUNKS", {torch.float32: chunk})
    monkeypatch.setattr(
        triton_tiles, "choose_tile", lambda *asked: triton_tiles.Tile(chunk, 16, 4, 1)
    )
    errors = relative_errors(Case(1, 150, 2, 24, 16, initial_state=True), torch.float32)
    assert worst(errors) < LIMIT[torch.float32]


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that starts as NaN must not show in any output or gradient."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    cut_into(monkeypatch, 2)
    for groups in (1, 2):
        case = Case(1, 65, 2, 24, 24, initial_state=True, groups=groups)
        received = outputs_and_gradients(make_inputs(case, torch.float32), "triton", torch.float32)
        assert all(value.isfinite().all() for value in received.values())


def test_inputs_need_not_be_contiguous() -> None:
    inputs = make_inputs(Case(2, 20, 2, 16, 16, groups=2), torch.float32)
    expected = ssd(**inputs, provider="triton").y_BTHP
    wide = torch.cat([inputs[name].flatten(2) for name in ("x_BTHP", "b_BTS", "c_BTS")], -1)
    parts = (part.unflatten(-1, (2, 16)) for part in wide.split(32, -1))
    views = inputs | dict(zip(("x_BTHP", "b_BTS", "c_BTS"), parts, strict=True))
    assert not views["x_BTHP"].is_contiguous()
    assert torch.equal(ssd(**views, provider="triton").y_BTHP, expected)
    strided = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in inputs.items()
    }
    assert torch.equal(ssd(**strided, provider="triton").y_BTHP, expected)


def test_one_output_alone_can_be_differentiated() -> None:
    inputs = make_inputs(Case(1, 20, 2, 16, 16), torch.float32)
    for output in OUTPUTS:
        gradients = []
        for provider in ("torch", "triton"):
            leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
            result = dict(zip(OUTPUTS, ssd(**leaves, provider=provider), strict=True))[output]
            gradients.append(
                torch.autograd.grad(result.sum(), leaves.values(), materialize_grads=True)
            )
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_compiled_whole_and_differentiated() -> None:
    inputs = make_inputs(Case(1, 20, 2, 16, 16, initial_state=True), torch.float32)

    def loss(**leaves: torch.Tensor) -> torch.Tensor:
        output = ssd(**leaves, provider="triton")
        return output.y_BTHP.square().sum() + output.final_state_BHPS.sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        function(**leaves).backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.equal(eager, compiled)


def test_operators_agree_with_their_fakes() -> None:
    inputs = make_inputs(Case(1, 70, 2, 16, 16, initial_state=True, groups=2), torch.float32)
    leaves = [value.requires_grad_() for value in inputs.values()]
    from ham.kernels.ssd.triton_provider import ssd_forward

    torch.library.opcheck(
        ssd_forward, (*leaves, True), test_utils=("test_schema", "test_faketensor")
    )


def test_what_the_kernels_lack_is_refused_by_name() -> None:
    inputs = make_inputs(Case(1, 2, 1, 16, 16), torch.float32)
    with pytest.raises(ConfigError, match=r"float64"):
        ssd(**{n: v.double() for n, v in inputs.items()}, provider="triton")
    with pytest.raises(ConfigError, match="P = 18"):
        ssd(**make_inputs(Case(1, 2, 1, 18, 16), torch.float32), provider="triton")
    with pytest.raises(ConfigError, match="S = 160"):
        ssd(**make_inputs(Case(1, 2, 1, 16, 160), torch.float32), provider="triton")


def test_without_interpreter_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = Case(1, 2, 1, 16, 16).inputs(torch.float32, torch.device("cpu"), 0)
    with pytest.raises(DeviceError, match="triton"):
        ssd(**inputs, provider="triton")


def test_importing_the_operation_does_not_import_triton() -> None:
    code = "import ham.kernels.ssd, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("case", "segments"),
    [
        (Case(1, 70, 2, 32, 24, initial_state=True, gates="extreme", groups=2), 1),
        (Case(2, 65, 3, 16, 16, groups=3), 2),
        (Case(1, 33, 1, 24, 40, initial_state=True), 1),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_groups_of_one_head(monkeypatch: pytest.MonkeyPatch, case: Case, segments: int) -> None:
    """What narrow heads with b and c of their own take in bfloat16, here in float32."""
    from ham.kernels.ssd import triton_tiles

    monkeypatch.setattr(triton_tiles, "choose_gradient", lambda *asked: "group_gradient")
    cut_into(monkeypatch, segments)
    errors = relative_errors(case, torch.float32)
    assert worst(errors) < LIMIT[torch.float32], errors


def test_the_kernel_of_the_gradients() -> None:
    from ham.kernels.ssd.triton_tiles import choose_gradient

    chosen = {
        (dtype, head_size, groups): choose_gradient(dtype, head_size, 4, groups)
        for dtype in LIMIT
        for head_size in (32, 64)
        for groups in (1, 2, 4)
    }
    own = {asked for asked, kernel in chosen.items() if kernel == "gradient"}
    assert own == {
        (torch.float32, 32, 4),
        (torch.float32, 64, 4),
        (torch.bfloat16, 64, 4),
    }
    assert {kernel for asked, kernel in chosen.items() if asked not in own} == {"group_gradient"}


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu_matches_float64(needs_gpu: None, case: Case, dtype: torch.dtype) -> None:
    errors = relative_errors(case, dtype)
    assert worst(errors) < LIMIT[dtype], errors


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gpu_every_tile_configuration(
    needs_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int],
    groups: int,
    dtype: torch.dtype,
) -> None:
    from ham.kernels.ssd import triton_tiles

    case = Case(1, 200, 2, *sizes, initial_state=True, gates="extreme", groups=groups)
    choose = triton_tiles.choose_tile
    for kernel in triton_tiles.TILES:
        legal = triton_tiles.tiles(kernel, dtype, sizes[0], triton_tiles.choose_chunk(dtype))
        for number, tile in enumerate(legal):

            def chosen(asked: str, *sizes: Any, kernel=kernel, tile=tile) -> Any:
                return tile if asked == kernel else choose(asked, *sizes)

            monkeypatch.setattr(triton_tiles, "choose_tile", chosen)
            errors = relative_errors(case, dtype, seed=number)
            assert worst(errors) < LIMIT[dtype], (kernel, tile, errors)


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(
    ("sizes", "groups"), [((16, 24), 1), ((64, 128), 1), ((128, 128), 16)], ids=str
)
def test_gpu_same_inputs_give_same_bits(
    needs_gpu: None, sizes: tuple[int, int], groups: int, dtype: torch.dtype
) -> None:
    """A difference between runs would be a race."""
    inputs = make_inputs(Case(2, 1000, 16, *sizes, initial_state=True, groups=groups), dtype)
    first = outputs_and_gradients(inputs, "triton", dtype)
    for _ in range(10):
        again = outputs_and_gradients(inputs, "triton", dtype)
        assert all(torch.equal(first[name], again[name]) for name in first)
