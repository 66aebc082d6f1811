"""Which way `ham measure` decodes, and that every way decodes what the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_device import CUDA, DEVICE, interpreter

from ham.config import MeasureConfig, TrainConfig
from ham.config_files import parse_config
from ham.measure import decoding
from ham.measure.decoding import (
    Reading,
    TimedDecoder,
    captured_decoder,
    decoder_paths,
    fused_decoder,
    not_captured,
    timed_decoder,
)
from ham.measure.sweep.layers import DenseLayer
from ham.measure.throughput import Measurement
from ham.model.decoder import DecoderLM
from ham.model.registry import registered_mixers
from ham.model.sizing import model_config
from ham.report.rows import RowWriter

__all__ = ["interpreter"]

BOTH = (fused_decoder, captured_decoder)
FUSED = {"ham", "gated_delta_rule"}


class Text:
    """Reads the same tokens as often as it is asked."""

    def __init__(self, model: DecoderLM, context: int = 40):
        self.model, self.context, self.times = model, context, 0
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(257, (2, context), generator=generator)
        self.tokens_BT = tokens_BT.to(model.device)

    def __call__(self) -> Reading:
        self.times += 1
        state = self.model.init_state(2)
        output = self.model.prefill(self.tokens_BT, state)
        return Reading(state, self.context, 2, output.kv_fraction_per_layer())


def test_only_a_gpu_has_other_paths_than_the_models_own_steps() -> None:
    assert decoder_paths("cpu") == () and decoder_paths("cuda") == BOTH


@pytest.mark.parametrize("mixer", sorted(registered_mixers()))
@torch.inference_mode()
def test_every_baseline_has_a_path_of_its_own(tiny_model: Any, mixer: str) -> None:
    model = tiny_model(mixer).to(DEVICE)
    text = Text(model)
    decoder = timed_decoder(model, text, BOTH)
    assert decoder.note is None
    assert (decoder.provider == "triton") or mixer not in FUSED
    assert decoder.launch_mode == ("cuda_graph" if CUDA else "eager")
    for token in (5, 250):
        decoder.step(torch.full((2,), token, device=DEVICE))
    decoder.finish()


@pytest.mark.parametrize("mixer", sorted(FUSED))
@torch.inference_mode()
def test_the_fused_path_goes_on_with_the_text(tiny_model: Any, mixer: str) -> None:
    model = tiny_model(mixer).to(DEVICE)
    text = Text(model)
    decoder, state = timed_decoder(model, text, BOTH), text().state
    tokens_B = torch.tensor([5, 250], device=DEVICE)
    for _ in range(2):
        found, expected = decoder.step(tokens_B), model.step(tokens_B, state)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    decoder.finish()


@torch.inference_mode()
def test_what_has_no_path_takes_its_own_steps_and_says_why(tiny_model: Any) -> None:
    model = tiny_model("transformer", kv_heads=1).to(DEVICE)
    text = Text(model)
    decoder = timed_decoder(model, text, BOTH)
    assert decoder.launch_mode == "eager" and decoder.labels().keys() == {"note"}
    assert "mixer 'transformer' has no fused step" in decoder.note
    assert "1 heads of keys for 2 of queries have none" in decoder.note
    expected = model.step(torch.tensor([5, 250], device=DEVICE), text().state)
    assert torch.equal(decoder.step(torch.tensor([5, 250], device=DEVICE)), expected)


@torch.inference_mode()
def test_a_path_that_breaks_is_left_with_its_cause_and_the_text_read_again(
    tiny_model: Any,
) -> None:
    def breaking(model: Any, reading: Reading) -> TimedDecoder:
        model.step(torch.zeros(2, dtype=torch.int64, device=DEVICE), reading.state)
        raise RuntimeError("capture failed:\nthe device waited")

    model = tiny_model("ham").to(DEVICE)
    text = Text(model)
    decoder = timed_decoder(model, text, (breaking,))
    assert decoder.note == "RuntimeError: capture failed: the device waited"
    assert text.times == 2
    tokens_B = torch.tensor([5, 250], device=DEVICE)
    assert torch.equal(decoder.step(tokens_B), model.step(tokens_B, text().state))


def test_layers_that_have_no_captured_step_are_named(tiny_model: Any) -> None:
    assert not_captured(tiny_model("ham")) is None
    assert "per_head" in not_captured(tiny_model("ham", reduction="per_head"))
    assert "score 'random'" in not_captured(tiny_model("ham", score="random"))
    assert "window has no fused step" in not_captured(tiny_model("ham", window=4))
    assert not_captured(object()) == "its layers are those of another library"


def test_rows_say_how_they_were_launched(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def graph(model: Any, reading: Reading) -> TimedDecoder:
        return TimedDecoder(lambda tokens_B: None, "cuda_graph", "triton")

    def refused(model: Any, reading: Reading) -> TimedDecoder:
        raise ValueError("not today")

    settings = MeasureConfig(contexts=[32], batch_size=2, decode_tokens=3, repeats=2, warmup=1)
    found = {}
    for name, path in (("graph", graph), ("refused", refused)):
        monkeypatch.setattr(decoding, "decoder_paths", lambda device_type, path=path: (path,))
        writer = RowWriter(model="ham", mixer="ham", device="test", provider="torch")
        tokens_T = torch.randint(0, 257, (100,))
        training = TrainConfig(precision="float32")
        Measurement(tiny_model("ham"), tokens_T, settings, training, writer, "x").run(print)
        rows = [row for row in writer.rows if row.metric in ("decode_ms", "prefill_ms")]
        assert not [row.error for row in rows if row.error]
        found[name] = {
            row.metric: (row.launch_mode, row.provider, row.labels.get("note")) for row in rows
        }
    assert found["graph"]["decode_ms"] == ("cuda_graph", "triton", None)
    assert found["refused"]["decode_ms"] == ("eager", "torch", "ValueError: not today")
    assert found["graph"]["prefill_ms"] == ("eager", "torch", None)


@torch.inference_mode()
def test_layers_of_a_hybrid_are_captured_each_as_its_own_kind() -> None:
    config = parse_config(
        {
            "name": "x",
            "data": {"context": 128},
            "model": {"layers": 4, "width": 128, "heads": 2, "max_positions": 2048},
            "arms": [
                {"name": "transformer", "mixer": "transformer"},
                {
                    "name": "placed",
                    "mixer": "ham",
                    "options": {"target": 0.25},
                    "placement": {"layers": [0], "between": {"mixer": "transformer"}},
                },
            ],
        }
    )
    torch.manual_seed(0)
    model = DecoderLM(model_config(config, config.arms[1], 257)).eval().to(DEVICE)
    for controller in model.controllers:
        controller.freeze(0.5, 0.25)
    session = decoding._session(model, Text(model)())
    session.prepare()
    assert [layer.mixer.registered_name for layer in session.layers] == [
        "ham",
        *["transformer"] * 3,
    ]
    assert not isinstance(session.layers[0], DenseLayer)
    assert isinstance(session.layers[1], DenseLayer)
    session.capture()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("mixer", sorted(registered_mixers()))
@torch.inference_mode()
def test_every_baseline_decodes_in_a_graph_under_autocast(tiny_model: Any, mixer: str) -> None:
    model = tiny_model(mixer).to(DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        decoder = timed_decoder(model, Text(model))
        assert (decoder.launch_mode, decoder.note) == ("cuda_graph", None)
        decoder.step(torch.full((2,), 5, device=DEVICE))
        torch.cuda.synchronize()
        decoder.finish()
