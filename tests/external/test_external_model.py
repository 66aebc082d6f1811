"""Models of transformers: the answers of the library, real bytes, clear refusals."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from ham.errors import ConfigError, UnusableModelError
from ham.evaluate.lm_eval_chance import untrained_twin
from ham.external.library import legal_keys
from ham.external.memory import ExternalState, cache_bytes
from ham.model.generation import generate

MODELS = {
    "llama": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 16},
    "mamba": {},
}
FLOAT = 4


@pytest.mark.parametrize("model_type", MODELS)
@torch.inference_mode()
def test_at_once_in_pieces_and_by_steps(build, model_type: str) -> None:
    model = build(model_type, **MODELS[model_type])
    tokens_BT = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    whole_BTV = model(tokens_BT).logits_BTV
    expected_BTV = model.network(input_ids=tokens_BT).logits
    torch.testing.assert_close(whole_BTV, expected_BTV, rtol=0, atol=0)
    state = model.init_state(2)
    parts = [model.prefill(part, state).logits_BTV for part in tokens_BT[:, :33].split(11, dim=1)]
    parts += [model.step(tokens_B, state)[:, None] for tokens_B in tokens_BT[:, 33:].unbind(dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=1e-4, atol=1e-5)
    assert state.position == 40
    last = model.prefill(tokens_BT, model.init_state(2), last_only=True).logits_BTV
    torch.testing.assert_close(last, whole_BTV[:, -1:], rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_real_cache(build) -> None:
    layers, width, length = 2, 32, 40

    @torch.inference_mode()
    def held(model_type: str, **config) -> dict[str, int]:
        model = build(model_type, **config)
        state = model.init_state(1)
        model.prefill(torch.zeros(1, length, dtype=torch.int64), state)
        assert (model.held_share(length) == 1.0) == (model_type == "llama" and not config)
        return state.bytes_allocated()

    kept = 2 * layers * width * FLOAT
    assert held("llama") == {"kv": length * kept}
    # A window of 16 has the current token and 15 older ones; the buffer behind it stays for a step.
    window = held("mistral", sliding_window=16)
    assert window["kv"] == 15 * kept and window["unused"] == (length - 15) * kept
    # Mamba: inner width 2 W, convolution of 4, state of 16 (arXiv 2312.00752, section 3.4).
    assert held("mamba") == {
        "conv": layers * 2 * width * 4 * FLOAT,
        "recurrent": layers * 2 * width * 16 * FLOAT,
    }


def test_a_cache_is_walked_through_whatever_it_is_made_of() -> None:
    buffer = torch.zeros(10, 8)

    class Layer:
        def __init__(self):
            self.state = {"attn_state": (buffer[:4], None), "conv_state": [torch.zeros(3)]}
            self.seen = torch.zeros(2, dtype=torch.int64)
            self.itself, self.again, self.name = self, self.state, "layer"

    assert cache_bytes([Layer(), {"ssm": torch.zeros(5, dtype=torch.bfloat16)}]) == {
        "kv": 4 * 8 * 4,
        "conv": 12,
        "positions": 16,
        "recurrent": 10,
        "unused": 6 * 8 * 4,
    }
    assert cache_bytes(None) == {}


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_prompts_of_any_length_decode_in_one_batch(build, model_type: str) -> None:
    model = build(model_type)
    prompts = [[5, 9, 2], [7] * 9, [1, 2, 3], [250, 0], [8, 8, 9]]

    def stop(made: list[int]) -> bool:
        return made[-1] % 5 == 0

    together = generate(model, prompts, 12, stop, batch_size=4)
    assert together == [generate(model, [prompt], 12, stop)[0] for prompt in prompts]
    assert len({len(made) for made in together}) > 1
    with pytest.raises(ConfigError, match="another library"):
        generate(model, prompts, 2, fused=True)


def test_the_untrained_twin_starts_where_training_did(build) -> None:
    model = build("llama")
    started = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    twin = untrained_twin(model, seed=0)
    assert not twin.training and all(
        torch.equal(tensor, started[name]) for name, tensor in twin.state_dict().items()
    )


@torch.inference_mode()
def test_joined_memories_stay_as_they_are(build) -> None:
    model = build("llama")
    tokens_BT = torch.arange(20).reshape(2, 10)
    one, other = model.init_state(2), model.init_state(1)
    model.prefill(tokens_BT, one)
    model.prefill(tokens_BT[:1, :4], other)
    both = ExternalState.join([one, other])
    assert both.positions.lengths == [10, 10, 4]
    both.select(torch.tensor([2, 1]))
    logits_BV = model.step(torch.tensor([3, 3]), both)
    torch.testing.assert_close(logits_BV[1], model.step(torch.tensor([3, 3]), one)[1])
    torch.testing.assert_close(logits_BV[0], model.step(torch.tensor([3]), other)[0])
    with pytest.raises(ValueError, match="not different"):
        both.select(torch.tensor([0, 0]))


def test_flops_are_counted_or_said_to_be_approximate(build, monkeypatch) -> None:
    model = build("llama", intermediate_size=64)
    layer = 4 * 32 * 32 + 3 * 32 * 64
    # The counter sees both halves of the attention matrix.
    attention = 2 * 2 * 2 * 24 * 24 * 32
    assert model.forward_flops(24) == 2 * 24 * (2 * layer + 32 * 257) + attention
    assert model.flops_source == "torch's flop counter"
    monkeypatch.setattr(model, "_traced", lambda *_: 1 / 0)
    assert model.flops_source == "6N approximation"
    assert model.forward_flops(8) == 2 * model.count_parameters() * 8


def test_no_kernel_is_launched_on_tensors_without_memory(build, monkeypatch) -> None:
    """Triton launches on address 0, which breaks CUDA for the rest of the process."""
    jit = pytest.importorskip("triton.runtime.jit")
    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: launched.append(True))
    model = build("llama")
    network = type(model._outline)
    whole = network.forward

    def forward(self, *args, **kwargs):
        jit.JITFunction.run(None, grid=(1,), warmup=False)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(network, "forward", forward)
    assert model.flops_source == "6N approximation" and model.planned_bytes(8) == 0
    assert not launched
    jit.JITFunction.run(None, grid=(1,), warmup=False)
    assert launched, "launches are as before"


def test_keys_of_a_class_with_an_init_of_its_own_under_a_dataclass() -> None:
    """As flash-linear-attention's: without them its models had their default sizes."""

    @dataclasses.dataclass
    class Base:
        use_cache: bool = True

    class Own(Base):
        attribute_map: ClassVar = {"width": "hidden_size"}

        def __init__(self, hidden_size: int = 2048, vocab_size: int = 32000, **others):
            super().__init__(**others)

    assert legal_keys(Own) == {"hidden_size", "vocab_size", "width", "use_cache"}


def test_models_that_cannot_be_judged_say_so(build, monkeypatch) -> None:
    with pytest.raises(
        UnusableModelError, match=r"'other' .transformers:bert. is not causal: token"
    ):
        build("bert").check_runs()
    model = build("llama")
    with pytest.raises(UnusableModelError, match=r"of 1025 tokens is longer than .* 1024"):
        model(torch.zeros(1, 1025, dtype=torch.int64))
    whole = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda **given: whole(**{**given, "cache": None}))
    with pytest.raises(UnusableModelError, match="steps from its cache give logits that differ"):
        model.init_state(1)
    monkeypatch.setattr(
        model.network, "forward", lambda **given: whole(**{**given, "use_cache": False})
    )
    with pytest.raises(UnusableModelError, match=r"no tensor is found in its cache .NoneType."):
        model.init_state(1)
    model._cache_name = None
    with pytest.raises(UnusableModelError, match="takes none of cache, past_key_values"):
        model.init_state(1)
