"""One optimiser step: launched eagerly, compiled, as a CUDA graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from triton_device import CUDA, DEVICE

from ham.config import TrainConfig
from ham.errors import DeviceError
from ham.model.decoder import IGNORED, DecoderLM
from ham.routing.controls import hash_uniform
from ham.train.clock import WARM_UP, StepClock
from ham.train.optimiser import make_optimiser
from ham.train.step import COMPILED_STEPS, OptimiserStep

BATCH, LENGTH = 4, 96
STEPS = COMPILED_STEPS + 5
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def batches(vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (STEPS, BATCH, LENGTH + 1), generator=generator)
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


def train(model: DecoderLM, **settings: Any) -> tuple[list[float], OptimiserStep]:
    """Losses of a few steps, on fresh batches at a changing learning rate."""
    options = TrainConfig(batch_size=BATCH, precision="float32", **settings)
    step = OptimiserStep(model.train(), make_optimiser(model, options), options)
    losses = []
    for index, (inputs_BT, targets_BT) in enumerate(batches(model.config.vocabulary_size)):
        losses.append(float(step(inputs_BT, targets_BT, 1e-3 * (index + 1)).loss))
    return losses, step


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("transformer", {}),
        ("gated_delta_rule", {}),
        ("mamba2", {}),
        ("ham", {"score": "cosine"}),
        ("ham", {"score": "random"}),
        ("ham", {"score": "learned"}),
    ],
)
def test_a_graph_trains_as_plain_launches_do(tiny_model, mixer, options, compiled) -> None:
    expected, _ = train(tiny_model(mixer, **options).to(DEVICE), launch="eager")
    model = tiny_model(mixer, **options).to(DEVICE)
    losses, step = train(model, launch="cuda_graph", compile=compiled)
    assert step.launch_mode == "cuda_graph"
    assert losses == pytest.approx(expected, rel=2e-3)
    assert len(set(losses)) == STEPS
    for controller in model.controllers:
        assert int(controller.steps) == STEPS


def test_micro_batches_add_up_to_the_batch(tiny_model) -> None:
    whole, step = train(tiny_model("gated_delta_rule"))
    parts, _ = train(tiny_model("gated_delta_rule"), accumulate=2)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert step.launch_mode == "eager" or CUDA


def one_step(model: DecoderLM, targets_BT: torch.Tensor, accumulate: int) -> tuple[float, dict]:
    """Loss and gradients of one step in which some targets are `IGNORED`."""
    options = TrainConfig(batch_size=BATCH, precision="float32", accumulate=accumulate)
    step = OptimiserStep(model.train(), make_optimiser(model, options), options)
    inputs_BT, _ = batches(model.config.vocabulary_size)[0]
    loss = float(step(inputs_BT, targets_BT, 1e-3).loss)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_targets_weigh_the_same_however_a_batch_is_cut(tiny_model) -> None:
    """Recall rows have few targets, and a micro-batch of them may have none."""
    _, targets_BT = batches(tiny_model("gated_delta_rule").config.vocabulary_size)[0]
    targets_BT = targets_BT.clone()
    targets_BT[0] = IGNORED
    targets_BT[1, 3:] = IGNORED
    loss, gradients = one_step(tiny_model("gated_delta_rule"), targets_BT, accumulate=1)
    assert math.isfinite(loss) and loss > 1
    for parts in (2, BATCH):
        again, found = one_step(tiny_model("gated_delta_rule"), targets_BT, accumulate=parts)
        assert again == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_without_targets_gives_no_gradient(tiny_model) -> None:
    _, targets_BT = batches(tiny_model("gated_delta_rule").config.vocabulary_size)[0]
    nothing_BT = torch.full_like(targets_BT, IGNORED)
    loss, gradients = one_step(tiny_model("gated_delta_rule"), nothing_BT, accumulate=2)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())


@pytest.mark.skipif(CUDA, reason="there is one")
def test_a_graph_asked_for_by_name_needs_a_gpu(tiny_model) -> None:
    with pytest.raises(DeviceError, match="'cuda_graph' needs a CUDA device, not cpu"):
        train(tiny_model("transformer"), launch="cuda_graph")


def test_the_hash_is_one_operator_for_a_compiler() -> None:
    key, position_T = (1, 0, 3), torch.arange(1000)
    traced = torch.compile(lambda x: hash_uniform(key, x) * 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(position_T), hash_uniform(key, position_T), rtol=0, atol=0)


def test_steady_speed_counts_whole_stretches_after_the_warm_up() -> None:
    clock = StepClock()
    for step in range(1, 2 * WARM_UP + 6):
        clock.add(1.0 if step <= WARM_UP else 0.25, waited=step % 10 == 0)
    assert clock.seconds == WARM_UP + 0.25 * (WARM_UP + 5)
    # The five steps after the last wait may still be running.
    assert (clock.steady_steps, clock.steady_seconds) == (WARM_UP, 0.25 * WARM_UP)
