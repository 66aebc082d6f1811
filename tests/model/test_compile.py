"""`train.compile: true` gives the losses and gradients of eager execution."""

from __future__ import annotations

import pytest
import torch

from ham.doctor import examine


@pytest.fixture
def compiler() -> None:
    """Skip, with the reason, where torch.compile has no C++ compiler or no Python headers."""
    check = next(check for check in examine() if check.name == "compiler")
    if not check.good:
        pytest.skip(f"torch.compile cannot run here: {check.detail}")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mixer", ["transformer", "ham"])
def test_compiled_training_equals_eager_training(tiny_model, mixer) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 257, (2, 65), generator=generator)
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny_model(mixer, dtype=torch.float64).train()
        function = torch.compile(model.loss) if compiled else model.loss
        loss, _ = function(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-8, atol=1e-10, msg=name)
