"""HAM in chosen layers, another mixer in the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ham.config_files import parse_config
from ham.errors import ConfigError
from ham.model.calibration import calibrate, realised_fractions
from ham.model.checkpoint import load_model, save_model
from ham.model.decoder import DecoderLM
from ham.model.sizing import model_config, parameter_count
from ham.plan import Plan

TRANSFORMER = {"mixer": "transformer"}
RECURRENT = {"mixer": "gated_delta_rule"}


def experiment(placement: dict[str, Any] | None, layers: int = 4):
    return parse_config(
        {
            "name": "x",
            "data": {"context": 128},
            "model": {"layers": layers, "width": 128, "heads": 2, "max_positions": 2048},
            "arms": [
                {"name": "transformer", "mixer": "transformer"},
                {
                    "name": "placed",
                    "mixer": "ham",
                    "options": {"target": 0.25},
                    "placement": placement,
                },
            ],
        }
    )


def build(placement: dict[str, Any] | None) -> DecoderLM:
    config = experiment(placement)
    torch.manual_seed(0)
    return DecoderLM(model_config(config, config.arms[1], 257)).eval()


def names(model: DecoderLM) -> list[str]:
    return [block.mixer.registered_name for block in model.blocks]


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ({"every": 2, "between": RECURRENT}, ["gated_delta_rule", "ham"] * 2),
        ({"every": 4, "between": TRANSFORMER}, ["transformer"] * 3 + ["ham"]),
        ({"layers": [0, 3], "between": RECURRENT}, ["ham"] + ["gated_delta_rule"] * 2 + ["ham"]),
        ({"every": 1, "between": RECURRENT}, ["ham"] * 4),
        (None, ["ham"] * 4),
    ],
)
def test_each_layer_has_the_mixer_it_was_given(placement, expected) -> None:
    config = experiment(placement).check_registry()
    model = build(placement)
    assert names(model) == expected
    counts = [parameter_count(model_config(config, arm, 257)) for arm in config.arms]
    assert abs(counts[1] - counts[0]) <= 0.01 * counts[0]
    assert Plan(config, cores=2).arms[1].parameters == counts[1]


def test_shares_bytes_and_flops_count_the_layers_that_route() -> None:
    model = build({"layers": [1, 3], "between": TRANSFORMER})
    tokens_BT = torch.randint(0, 257, (1, 200), generator=torch.Generator().manual_seed(0))
    calibrate(model, [tokens_BT])
    state = model.init_state(1)
    output = model.prefill(tokens_BT, state)
    assert model.routing_layers == [1, 3] and len(output.cache_fractions()) == 2
    assert output.kv_fraction() == pytest.approx(0.25, abs=0.01)
    assert list(realised_fractions(model, [tokens_BT])) == [1, 3]
    declared = model.state_bytes(200, output.cache_fractions(), element_size=4)
    assert declared.allocated == sum(state.bytes_allocated().values())
    with pytest.raises(ValueError, match="3 fractions for 2 layers"):
        model.state_bytes(200, [0.1, 0.2, 0.3])
    mixers = [block.mixer for block in model.blocks]
    by_hand = sum(mixer.forward_flops(200, 0.25) for mixer in mixers)
    rest = build(None)
    assert model.forward_flops(200, 0.25) - by_hand == pytest.approx(
        rest.forward_flops(200, 0.25)
        - sum(block.mixer.forward_flops(200, 0.25) for block in rest.blocks)
        + 200 * 4 * 6 * 128 * (model.config.mlp_width - rest.config.mlp_width)
    )


def test_decoding_and_files_keep_the_placement(tmp_path) -> None:
    model = build({"every": 2, "between": {"mixer": "sliding_window", "options": {"window": 8}}})
    tokens_BT = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    calibrate(model, [tokens_BT.flip(0, 1)])
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert names(loaded) == ["sliding_window", "ham"] * 2 and loaded.config == model.config
    state = loaded.init_state(2)
    stepped = [loaded.step(tokens_B, state) for tokens_B in tokens_BT.unbind(1)]
    torch.testing.assert_close(
        torch.stack(stepped, 1), model(tokens_BT).logits_BTV, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"layers": [1, 7], "between": RECURRENT}, r"placed.*layers \[7\].*layers 0\.\.3"),
        ({"every": 5, "between": RECURRENT}, "every 5 chooses none of 4 layers"),
        ({"between": RECURRENT}, "either layers or every"),
        ({"layers": [1], "every": 2, "between": RECURRENT}, "either layers or every"),
        ({"layers": [1, 1], "between": RECURRENT}, "layers must differ"),
        ({"layers": [], "between": RECURRENT}, "layers"),
        ({"layers": [1]}, "between"),
        ({"every": 2, "between": {"mixer": "nope"}}, "unknown mixer 'nope'"),
        ({"every": 2, "between": {**RECURRENT, "options": {"window": 3}}}, "window: unknown key"),
    ],
)
def test_impossible_placements_are_one_clear_message(placement, message) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(placement).check_registry()
