"""What runs on a CPU gives the same on a GPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from ham.model.generation import generate
from ham.model.registry import registered_mixers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXERS = sorted(registered_mixers())


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_and_gradients_agree_with_the_cpu(tiny_model, mixer) -> None:
    tokens_BT = random_tokens(2, 130)
    gradients = []
    for device in ("cpu", "cuda"):
        model = tiny_model(mixer, dtype=torch.float64).to(device).train()
        loss, _ = model.loss(tokens_BT[:, :-1].to(device), tokens_BT[:, 1:].to(device))
        loss.backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_decoding_on_the_gpu_equals_the_parallel_form(tiny_model, mixer) -> None:
    model = tiny_model(mixer, dtype=torch.float64).cuda()
    tokens_BT = random_tokens(2, 70).cuda()
    state = model.init_state(2)
    first = model.prefill(tokens_BT[:, :50], state).logits_BTV
    rest = [model.step(tokens_B, state) for tokens_B in tokens_BT[:, 50:].unbind(1)]
    found = torch.cat((first, torch.stack(rest, 1)), dim=1)
    torch.testing.assert_close(found, model(tokens_BT).logits_BTV, rtol=1e-8, atol=1e-8)
    assert len(generate(model, [[1, 2, 3]], 4)[0]) == 4


@pytest.mark.parametrize("mixer", MIXERS)
def test_prompts_of_different_lengths_decode_as_on_the_cpu(tiny_model, mixer) -> None:
    prompts = [[1], [5] * 9, list(range(64)), list(range(100, 190))]
    model = tiny_model(mixer, dtype=torch.float64)
    rules = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "batch_size": 3}
    expected = generate(model, prompts, **rules)
    assert generate(model.cuda(), prompts, **rules) == expected
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = generate(tiny_model(mixer).cuda(), prompts, **rules)
    assert [len(new) for new in found] == [20] * 4


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_training_lowers_the_loss(tiny_model, mixer) -> None:
    model = tiny_model(mixer).cuda().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens_BT = random_tokens(1, 40).repeat(4, 2).cuda()
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.end_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
