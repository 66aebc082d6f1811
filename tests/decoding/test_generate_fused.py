"""Generation through the fused decoder: the same texts, sequences that leave and join."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, interpreter

from ham.errors import ConfigError
from ham.model.generation import GenerationFacts, generate, stream

__all__ = ["interpreter"]

PROMPTS = [[1, 2, 3], [7] * 20, [5, 6], [9, 8, 7, 6, 5]]


def stops_early(made: list[int]) -> bool:
    return len(made) >= 2 + made[0] % 4


def test_the_texts_are_those_of_the_model_itself(tiny_model) -> None:
    model = tiny_model("ham", target=0.5).to(DEVICE)
    rules = {"max_new_tokens": 6, "batch_size": 2, "stop": stops_early}
    plain, fused = GenerationFacts(), GenerationFacts()
    expected = generate(model, PROMPTS, **rules, fused=False, facts=plain)
    assert generate(model, PROMPTS, **rules, fused=True, facts=fused) == expected
    assert fused.new_tokens == plain.new_tokens == sum(map(len, expected))
    assert fused.kept_tokens == plain.kept_tokens and fused.read_tokens == plain.read_tokens
    assert fused.memory_bytes > 0
    assert plain.decoder == "the model's own steps" and fused.decoder.startswith("fused kernels")


def test_a_stream_samples_the_same_tokens(tiny_model) -> None:
    model = tiny_model("gated_delta_rule").to(DEVICE)
    rules = {"temperature": 0.8, "top_k": 20, "seed": 3}
    texts = [list(stream(model, PROMPTS[3], 5, fused=fused, **rules)) for fused in (False, True)]
    assert texts[0] == texts[1]


def test_a_model_without_fused_kernels_is_refused(tiny_model) -> None:
    with pytest.raises(ConfigError, match="mixer 'mamba2' has no fused step"):
        generate(tiny_model("mamba2").to(DEVICE), [[1]], 2, fused=True)


def test_on_a_cpu_the_model_decodes_itself(tiny_model, monkeypatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("needs a machine without a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model("ham")
    assert generate(model, [[1, 2]], 2) == generate(model, [[1, 2]], 2, fused=False)
    with pytest.raises(ConfigError, match="Triton cannot run on cpu"):
        generate(model, [[1, 2]], 2, fused=True)


@torch.inference_mode()
def test_what_leaves_frees_its_pages(tiny_model) -> None:
    from ham.decoding.stepper import make_stepper

    model = tiny_model("ham", target=1.0).to(DEVICE)
    state = model.init_state(3)
    model.prefill(torch.arange(120, device=DEVICE).view(3, 40), state)
    fused = make_stepper(model, state, fused=True)
    before = fused.bytes_allocated()["kv"]
    fused.select([1])
    assert fused.bytes_allocated()["kv"] * 3 == before
