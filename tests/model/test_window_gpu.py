"""FlexAttention over a window on a GPU: against banded attention, in both mixers, in a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ham.config import TrainConfig
from ham.model import window_blocks
from ham.model.mixer import MixerShape
from ham.model.precision import precision_context
from ham.model.registry import mixer_class, parse_options
from ham.model.window_attention import banded_attention, window_attention
from ham.train.optimiser import make_optimiser
from ham.train.step import COMPILED_STEPS, OptimiserStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of ||found - expected|| / ||expected||, as for kernels (kernels/README.md)."""

MIXERS = [
    ("sliding_window", {"window": 24, "sinks": 3}),
    ("gated_delta_rule_window", {"window": 24}),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Code compiled by other tests counts towards the limits of torch.compile."""
    torch._dynamo.reset()


@pytest.fixture
def banded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function; before its call no attention may be banded, after it all is."""
    monkeypatch.setattr("ham.model.window_attention.banded_attention", None)

    def switch() -> None:
        monkeypatch.undo()
        monkeypatch.setattr(window_blocks, "takes", lambda q, window: False)

    return switch


def assert_near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        other = other.double()
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("length", "size", "window", "sinks"),
    [(1000, 64, 300, 129), (512, 128, 128, 4), (200, 48, 130, 0)],
)
def test_outputs_and_gradients(length, size, window, sinks, dtype, compiled) -> None:
    shape = 2, length, 3, size
    torch.manual_seed(0)
    leaves = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
    upstream = torch.randn(shape, device="cuda", dtype=dtype)
    assert window_blocks.takes(leaves[0], window)
    attention = window_attention
    if compiled:
        attention = torch.compile(window_attention, dynamic=False, fullgraph=True)
    found = attention(*leaves, window, sinks)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = banded_attention(*wide, window, sinks)
    assert found.dtype == dtype
    assert_near([found], [expected], dtype)
    gradients = torch.autograd.grad(found, leaves, upstream)
    assert_near(gradients, torch.autograd.grad(expected, wide, upstream.double()), dtype)


def run_mixer(mixer: nn.Module, x_BTD: Tensor, precision: str) -> list[Tensor]:
    """Output, and the gradients of all weights as one vector: alone, some are next to nothing."""
    with precision_context(x_BTD.device, precision):
        y_BTD, _ = mixer(x_BTD)
    gradients = torch.autograd.grad(y_BTD.float().square().sum(), list(mixer.parameters()))
    return [y_BTD.detach(), torch.cat([gradient.flatten() for gradient in gradients])]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "options"), MIXERS)
def test_both_mixers(name, options, dtype, banded) -> None:
    precision = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    mixer = mixer_class(name)(MixerShape(width=128, heads=2), parse_options(name, options, 256))
    mixer, x_BTD = mixer.cuda(), torch.randn(2, 256, 128, device="cuda")
    found = [run_mixer(mixer, x_BTD, precision)]
    if dtype == torch.float32:
        # In bfloat16 a compiler rounds at other places than eager code.
        compiled = torch.compile(mixer, dynamic=False, fullgraph=True)
        found.append(run_mixer(compiled, x_BTD, precision))
    with torch.inference_mode(), precision_context(x_BTD.device, precision):
        prefilled, _ = mixer.prefill(x_BTD, mixer.init_state(2, x_BTD.device, dtype))
    banded()
    expected = run_mixer(mixer, x_BTD, precision)
    for each in found:
        assert_near(each, expected, dtype)
    assert_near([prefilled], expected[:1], dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "options"), MIXERS)
def test_a_training_step_is_a_cuda_graph(tiny_model, name, options, compiled, banded) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(257, (COMPILED_STEPS + 4, 4, 257), generator=generator)

    def train(launch: str, compile: bool) -> tuple[list[float], OptimiserStep]:
        settings = TrainConfig(batch_size=4, launch=launch, compile=compile, precision="float32")
        model = tiny_model(name, **options).cuda().train()
        step = OptimiserStep(model, make_optimiser(model, settings), settings)
        return [float(step(x[:, :-1], x[:, 1:], 1e-3).loss) for x in batches], step

    losses, step = train("cuda_graph", compiled)
    assert step.launch_mode == "cuda_graph", step.note
    banded()
    expected, _ = train("eager", False)
    assert losses == pytest.approx(expected, rel=2e-3)
    assert len(set(losses)) == len(batches)


@torch.no_grad()
def test_there_may_be_more_shapes_than_torch_keeps_kernels_for() -> None:
    assert torch._dynamo.config.recompile_limit < 10
    for blocks in range(1, 11):
        q, k, v = torch.randn(3, 1, window_blocks.BLOCK * blocks, 1, 16, device="cuda")
        assert window_blocks.takes(q, 24)
        expected = banded_attention(q, k, v, 24)
        assert_near([window_attention(q, k, v, 24)], [expected], torch.float32)


def test_tokens_behind_a_position_change_nothing_before_it() -> None:
    q, k, v = torch.randn(3, 1, 512, 2, 64, device="cuda", dtype=torch.bfloat16)
    before = window_attention(q, k, v, 100, 4)
    for x in (q, k, v):
        x[:, 300:] = torch.randn_like(x[:, 300:])
    after = window_attention(q, k, v, 100, 4)
    assert torch.equal(before[:, :300], after[:, :300])
    assert not torch.equal(before[:, 300:], after[:, 300:])
