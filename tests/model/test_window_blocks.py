"""FlexAttention over a window: its mask, its results, when it is used and what rows call it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ham.job import used_providers
from ham.kernels import flex
from ham.model import window_blocks
from ham.model.window_attention import banded_attention, window_attention
from ham.model.window_blocks import window_mask

CPU = torch.device("cpu")


def inputs(length: int, size: int = 16, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 2, length, 2, size, generator=generator, dtype=dtype))


def pairs(mask: BlockMask, name: str) -> set[tuple[int, int]]:
    """Row and listed block, for the lists `kv`, `full_kv`, `q` or `full_q` of a mask."""
    numbers = getattr(mask, f"{name}_num_blocks")[0, 0].tolist()
    indices = getattr(mask, f"{name}_indices")[0, 0].tolist()
    listed = [(row, c) for row, number in enumerate(numbers) for c in indices[row][:number]]
    assert len(set(listed)) == len(listed), "no block twice"
    return set(listed)


@pytest.mark.parametrize("length", [128, 130, 512, 700])
@pytest.mark.parametrize("window", [1, 24, 128, 129, 130, 300, 511])
@pytest.mark.parametrize("sinks", [0, 4, 128, 129, 300])
def test_the_blocks_are_those_that_looking_at_every_pair_finds(length, window, sinks) -> None:
    mask = window_mask(length, window, sinks, CPU)
    expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    part, full = pairs(mask, "kv"), pairs(mask, "full_kv")
    assert part.isdisjoint(full)
    assert part | full == pairs(expected, "kv") | pairs(expected, "full_kv")
    # A block that only window and sinks together fill is listed as seen in part.
    assert full <= pairs(expected, "full_kv")
    assert full == pairs(expected, "full_kv") or sinks
    for name, listed in (("q", part), ("full_q", full)):
        assert pairs(mask, name) == {(block, row) for row, block in listed}
    assert mask.kv_indices.dtype == torch.int32 and mask.shape == expected.shape


@pytest.mark.parametrize(
    ("length", "window", "sinks"), [(200, 24, 3), (256, 128, 0), (129, 100, 0), (384, 300, 129)]
)
def test_flex_attention_is_banded_attention(length, window, sinks) -> None:
    q, k, v = inputs(length)
    mask = window_mask(length, window, sinks, CPU)
    with warnings.catch_warnings():
        # That it should be compiled, which takes a C++ compiler and longer than this test may.
        warnings.simplefilter("ignore", UserWarning)
        found = flex.attend(q, k, v, mask, kernel=flex_attention)
    expected = banded_attention(q, k, v, window, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_compiler_makes_one_graph_and_one_code_of_it() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(window_blocks.attend, backend=counter, dynamic=False, fullgraph=True)
    q, k, v = inputs(200)
    for shift in range(3):
        found = compiled(q + shift, k, v, 24, 3)
        expected = banded_attention(q + shift, k, v, 24, 3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_a_mask_is_made_once_and_serves_training_after_prefill() -> None:
    with torch.inference_mode():
        mask = window_mask(256, 77, 0, CPU)
    assert window_mask(256, 77, 0, CPU) is mask
    assert not mask.kv_indices.is_inference()
    assert window_mask(256, 78, 0, CPU) is not mask


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"grad": False}, True),
        ({"length": 200}, True),
        ({"length": 200, "grad": False}, False),
        ({"length": 100, "window": 24}, False),
        ({"length": 128}, False),
        ({"size": 8}, False),
        ({"size": 256}, False),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"device": "cpu"}, False),
    ],
)
def test_when_flex_attention_is_used(change, expected) -> None:
    case = {"length": 256, "window": 128, "size": 64, "dtype": torch.float32, "device": "cuda"}
    case = {**case, "grad": True, **change}
    # There need be no such device: nothing but these is looked at.
    q = SimpleNamespace(
        shape=(2, case["length"], 2, case["size"]),
        dtype=case["dtype"],
        device=torch.device(case["device"]),
    )
    with torch.set_grad_enabled(case["grad"]):
        assert window_blocks.takes(q, case["window"]) is expected


def test_a_cpu_keeps_to_banded_attention() -> None:
    q, k, v = inputs(256, dtype=torch.float32)
    expected = banded_attention(q, k, v, 24, 3)
    torch.testing.assert_close(window_attention(q, k, v, 24, 3), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mixer", "on_gpu"), [("sliding_window", "flex"), ("gated_delta_rule_window", "torch+flex")]
)
def test_rows_name_it_where_it_can_run(tiny_model, monkeypatch, mixer, on_gpu) -> None:
    model = tiny_model(mixer)
    assert used_providers(model) == "torch"
    monkeypatch.setattr(window_blocks, "runs_on", lambda device, size: size == 16)
    assert used_providers(model) == on_gpu
