"""The shared decoder, its sizing and its files."""

from __future__ import annotations

import pytest
import torch

from ham.config_files import parse_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.model.checkpoint import load_model, read_description, save_model
from ham.model.decoder import IGNORED, next_token_loss
from ham.model.sizing import model_config, parameter_count

ARMS = [
    {"name": "transformer", "mixer": "transformer"},
    {"name": "window", "mixer": "sliding_window", "options": {"window": 64}},
    {"name": "gdn", "mixer": "gated_delta_rule"},
    {"name": "mamba2", "mixer": "mamba2"},
    {"name": "ham", "mixer": "ham"},
]


def experiment(**model):
    return parse_config({"name": "x", "arms": ARMS, "model": model})


@pytest.mark.parametrize(("layers", "width", "heads"), [(2, 128, 4), (6, 256, 4), (24, 1536, 16)])
def test_parameters_agree_within_one_percent(layers, width, heads) -> None:
    config = experiment(layers=layers, width=width, heads=heads)
    counts = [parameter_count(model_config(config, arm, 257)) for arm in config.arms]
    assert max(counts) <= 1.01 * counts[0]
    assert min(counts) >= 0.99 * counts[0]


def test_first_arm_keeps_the_plain_mlp() -> None:
    config = experiment(layers=2, width=128, heads=4)
    assert model_config(config, config.arms[0], 257).mlp_width == 344


def test_parameter_count_by_hand(tiny_model) -> None:
    # 320 padded rows x 32; per layer: qkv 32x96, out 32x32, MLP 3x32x64, two norms of 32; one norm.
    by_hand = 320 * 32 + 2 * (32 * 96 + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert tiny_model("transformer").count_parameters() == by_hand


def test_a_mixer_too_large_for_the_budget_is_refused() -> None:
    config = parse_config(
        {
            "name": "x",
            "model": {"layers": 2, "width": 64, "heads": 2},
            "arms": [ARMS[0], {"name": "big", "mixer": "mamba2", "options": {"expand": 16}}],
        }
    )
    with pytest.raises(ConfigError, match="big"):
        model_config(config, config.arms[1], 257)


def test_sequences_beyond_max_positions_are_refused(tiny_model) -> None:
    model = tiny_model("transformer")
    with pytest.raises(ConfigError, match=r"1025 tokens.*max_positions 1024"):
        model(torch.zeros(1, 1025, dtype=torch.int64))
    state = model.init_state(1)
    model.prefill(torch.zeros(1, 1024, dtype=torch.int64), state)
    with pytest.raises(ConfigError, match="1025"):
        model.step(torch.zeros(1, dtype=torch.int64), state)


def test_prefill_may_give_the_last_logits_only(tiny_model) -> None:
    model, tokens_BT = tiny_model("gated_delta_rule"), torch.arange(60).view(2, 30)
    last = model.prefill(tokens_BT, model.init_state(2), last_only=True).logits_BTV
    assert last.shape == (2, 1, 257)
    torch.testing.assert_close(last, model(tokens_BT).logits_BTV[:, -1:])


def test_saving_and_loading_keeps_logits_and_thresholds(tiny_model, tmp_path) -> None:
    model = tiny_model("ham", target=0.4)
    save_model(tmp_path, model, facts={"steps": 3})
    loaded = load_model(tmp_path)
    tokens_BT = torch.arange(60)[None]
    assert torch.equal(loaded(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)
    assert read_description(tmp_path)["facts"] == {"steps": 3}
    assert loaded.config == model.config


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_weights_are_refused(tiny_model, tmp_path, damage) -> None:
    save_model(tmp_path, tiny_model("transformer"))
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    else:
        content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="truncated or changed"):
        load_model(tmp_path)


def test_missing_and_foreign_model_folders_are_refused(tmp_path) -> None:
    with pytest.raises(MissingDataError, match="holds no model"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="lacks config, format_version, sha256"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_is_the_mean_over_the_targets(dtype) -> None:
    logits_BTV = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets_BT = torch.tensor([[0, 4, IGNORED], [IGNORED, 2, 2]])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_p_BTV = logits_BTV.to(wide).log_softmax(-1)
    wanted = [log_p_BTV[0, 0, 0], log_p_BTV[0, 1, 4], log_p_BTV[1, 1, 2], log_p_BTV[1, 2, 2]]
    loss = next_token_loss(logits_BTV, targets_BT)
    assert loss.dtype == wide
    torch.testing.assert_close(loss, -sum(wanted) / 4)


def test_without_a_target_the_loss_and_its_gradient_are_zero() -> None:
    logits_BTV = torch.randn(2, 3, 5, requires_grad=True)
    loss = next_token_loss(logits_BTV, torch.full((2, 3), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(logits_BTV.grad, torch.zeros(2, 3, 5))
