"""Every arm of `workflow/config/rivals.yaml` can be trained as it stands, or reads one that can."""

from __future__ import annotations

import pytest
import torch

from ham.config_files import load_config
from ham.fingerprint import repository_root
from ham.model.decoder import DecoderLM
from ham.model.sizing import model_config, parameter_count

CONFIG = load_config(repository_root() / "workflow/config/rivals.yaml").check_registry()
ARMS = {arm.name: arm for arm in CONFIG.arms}
# Memory of one layer for one sequence, in tokens: HAM's at a quarter of the training context.
TOKENS = CONFIG.data.context // 4


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.trained])
def test_an_arm_has_as_many_parameters_and_trains(name) -> None:
    first = parameter_count(model_config(CONFIG, CONFIG.arms[0], 257))
    torch.manual_seed(0)
    model = DecoderLM(model_config(CONFIG, ARMS[name], 257)).train()
    assert abs(model.count_parameters() - first) <= 0.01 * first
    before = [parameter.clone() for parameter in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens_BT = torch.randint(0, 257, (1, 65))
    loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    optimiser.step()
    model.end_step()
    assert torch.isfinite(loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    again, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert again < loss


@pytest.mark.parametrize(
    "name",
    [
        "transformer-gqa",
        "transformer-random",
        "transformer-streaming",
        "transformer-norm",
        "transformer-snapkv",
        "sliding-window",
        "window-sinks",
        "delta-rule-window",
        "hola",
        "hybrid-3-to-1",
        "hybrid-window",
        "samba",
    ],
)
def test_an_arm_holds_as_many_keys_and_values_as_ham(name) -> None:
    with torch.device("meta"):
        model = DecoderLM(model_config(CONFIG, ARMS[name], 257))
        ham = DecoderLM(model_config(CONFIG, ARMS["ham-committed"], 257))
    context = CONFIG.data.context
    pair = 2 * CONFIG.model.width * 2
    assert ham.state_bytes(context, 0.25).kv == CONFIG.model.layers * TOKENS * pair
    assert model.state_bytes(context).kv == ham.state_bytes(context, 0.25).kv
