"""`HamForCausalLM`: saved and loaded bit for bit; padding, caches and `generate` change nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest

pytest.importorskip("transformers", minversion="5.24")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ham.errors import CachePoolFullError, ConfigError, NotFiniteError, RoutingError
from ham.hf import HamCache, HamForCausalLM, save
from ham.model.decoder import DecoderLM
from ham.model.generation import generate
from ham.model.registry import registered_mixers
from ham.train.tokenizer import ByteTokenizer

MIXERS = sorted(registered_mixers())
PROMPTS = ["The whale", "a", "old men, ships and the sea"]


def with_own_dtypes(model: DecoderLM) -> DecoderLM:
    """The same model with the buffer dtypes of its layers, which `.to(dtype)` has changed."""
    fresh = DecoderLM(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def ragged(side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows of 30, 7, 7 and 1 tokens: alone, padded with token 99, and their mask."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 257, (length,), generator=generator) for length in (30, 7, 7, 1)]
    tokens_BT = torch.full((4, 32), 99)
    mask_BT = torch.zeros_like(tokens_BT)
    for index, row in enumerate(rows):
        start = {"left": 32 - len(row), "right": 0, "both": index}[side]
        tokens_BT[index, start : start + len(row)] = row
        mask_BT[index, start : start + len(row)] = 1
    return rows, tokens_BT, mask_BT


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_saved_model_comes_back_bit_for_bit(tiny_model, saved, mixer) -> None:
    model = with_own_dtypes(tiny_model(mixer))
    loaded = AutoModelForCausalLM.from_pretrained(saved(mixer))
    assert type(loaded) is HamForCausalLM and not loaded.training
    assert loaded.config.vocab_size == 257 and loaded.config.max_position_embeddings == 1024
    found = dict(loaded.decoder.state_dict(), **dict(loaded.decoder.named_buffers()))
    expected = dict(model.state_dict(), **dict(model.named_buffers()))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert bits(found[name]) == bits(tensor), name
    tokens_BT = ragged("left")[1]
    assert torch.equal(loaded(tokens_BT).logits, model(tokens_BT).logits_BTV)


def test_random_routing_keeps_the_hash_of_its_training(tiny_model, tmp_path) -> None:
    first = tiny_model("ham", score="random", target=0.3)
    model = DecoderLM(dataclasses.replace(first.config, seed=7)).eval()
    model.load_state_dict(first.state_dict())
    save(model, ByteTokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BT = ragged("left")[1]
    assert torch.equal(loaded(tokens_BT).logits, model(tokens_BT).logits_BTV)
    assert not torch.equal(model(tokens_BT).logits_BTV, first(tokens_BT).logits_BTV)


def test_thresholds_that_are_no_numbers_or_infinite_survive(tiny_model, tmp_path) -> None:
    model = with_own_dtypes(tiny_model("ham"))
    first, second = (block.mixer.controller for block in model.blocks)
    first.threshold.fill_(math.inf)
    second.threshold.fill_(math.nan)
    second.spread.fill_(-math.inf)
    second.frozen.fill_(False)
    HamForCausalLM.from_decoder(model).save_pretrained(tmp_path)
    loaded = HamForCausalLM.from_pretrained(tmp_path).decoder
    for mine, theirs in zip(model.blocks, loaded.blocks, strict=True):
        for name, tensor in mine.mixer.controller.state_dict().items():
            assert bits(theirs.mixer.controller.state_dict()[name]) == bits(tensor), name


def test_half_precision_leaves_thresholds_and_positions_alone(saved) -> None:
    folder = saved("ham")
    whole = HamForCausalLM.from_pretrained(folder)
    half = HamForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    buffers = dict(half.named_buffers())
    for name, tensor in whole.named_buffers():
        assert bits(buffers[name]) == bits(tensor), name
    assert half(torch.arange(20)[None]).logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_changes_no_logit(tiny_model, mixer, use_cache, side) -> None:
    decoder = tiny_model(mixer, dtype=torch.float64)
    model = HamForCausalLM.from_decoder(decoder)
    rows, tokens_BT, mask_BT = ragged(side)
    logits_BTV = model(tokens_BT, mask_BT, use_cache=use_cache).logits
    assert not logits_BTV[mask_BT == 0].any()
    for index, row in enumerate(rows):
        alone = decoder(row[None]).logits_BTV[0]
        torch.testing.assert_close(logits_BTV[index, mask_BT[index] == 1], alone, rtol=0, atol=1e-9)
    tokens_BT = torch.where(mask_BT == 1, tokens_BT, 7)
    assert torch.equal(model(tokens_BT, mask_BT, use_cache=use_cache).logits, logits_BTV)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_padded_batch_continues_in_any_order(tiny_model, mixer) -> None:
    """Rows of different length are exchanged, repeated and dropped, then read on unequally."""
    decoder = tiny_model(mixer, dtype=torch.float64)
    model = HamForCausalLM.from_decoder(decoder)
    rows, tokens_BT, mask_BT = ragged("left")
    cache = model(tokens_BT, mask_BT, use_cache=True).cache
    order = [3, 0, 0, 2]
    cache.reorder_cache(torch.tensor(order))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([7, 1, 3, 4]))
    order = [order[index // 2] for index in (7, 1, 3, 4)]
    more_BT = torch.randint(0, 257, (4, 5), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    model(more_BT, mask_BT, cache=cache)
    last_BT = torch.tensor([[1], [2], [3], [4]])
    logits_BTV = model(last_BT, cache=cache).logits
    for index, old in enumerate(order):
        read = torch.cat((rows[old], more_BT[index, mask_BT[index] == 1], last_BT[index]))
        expected_V = decoder(read[None]).logits_BTV[0, -1]
        torch.testing.assert_close(logits_BTV[index, 0], expected_V, rtol=0, atol=1e-9)
    mask_BT[2] = 1
    with pytest.raises(ConfigError, match=r"rows \[2, 3\] have read 34 tokens each and now get"):
        model(more_BT, mask_BT, cache=cache)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generate(saved, mixer) -> None:
    """Greedy is ours, beams do not depend on the batch, and no way to prefill matters."""
    folder = saved(mixer)
    model = HamForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)

    def new_tokens(inputs, **options) -> list[list[int]]:
        made = model.generate(**inputs, max_new_tokens=9, **options)
        return made[:, inputs["input_ids"].shape[1] :].tolist()

    ours = generate(model.decoder, [list(text.encode()) for text in PROMPTS], 9)
    greedy = new_tokens(batch, do_sample=False)
    assert greedy == ours
    assert new_tokens(batch, do_sample=False, use_cache=False) == greedy
    assert new_tokens(batch, do_sample=False, prefill_chunk_size=4) == greedy
    beams = new_tokens(batch, do_sample=False, num_beams=3)
    for text, beam in zip(PROMPTS, beams, strict=True):
        alone = tokenizer([text], return_tensors="pt")
        assert new_tokens(alone, do_sample=False, num_beams=3) == [beam]
    torch.manual_seed(0)
    sampled = new_tokens(batch, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    again = new_tokens(batch, do_sample=True, num_return_sequences=2, use_cache=False)
    assert sampled == again and sampled[0] != sampled[1]


def test_a_conversation_goes_on_from_its_cache(saved) -> None:
    model = HamForCausalLM.from_pretrained(saved("ham"))
    tokens_BT = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(2))
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    whole = model.generate(torch.cat((tokens_BT, tokens_BT), dim=1), **options)
    cache = HamCache()
    model(tokens_BT, cache=cache)
    parts = model.generate(torch.cat((tokens_BT, tokens_BT), dim=1), cache=cache, **options)
    assert torch.equal(whole, parts) and cache.columns == 28


def test_the_loss_scores_real_tokens_only(tiny_model) -> None:
    model = HamForCausalLM.from_decoder(tiny_model("ham", dtype=torch.float64))
    rows, tokens_BT, mask_BT = ragged("left")
    losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows[:3]]
    expected = sum(losses) / sum(len(row) - 1 for row in rows)
    output = model(tokens_BT, mask_BT, labels=tokens_BT)
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    output.loss.backward()
    assert model.decoder.embedding.weight.grad.isfinite().all()
    short = model(tokens_BT, mask_BT, logits_to_keep=2).logits
    assert torch.equal(short, output.logits[:, -2:])
    picked = model(tokens_BT, mask_BT, logits_to_keep=torch.tensor([31, 3])).logits
    assert torch.equal(picked, output.logits[:, [31, 3]])


def test_faulty_calls_have_one_message(saved) -> None:
    model = HamForCausalLM.from_pretrained(saved("ham"))
    tokens_BT = torch.zeros(2, 6, dtype=torch.long)
    mask_BT = torch.ones_like(tokens_BT)
    gap_BT, right_BT = mask_BT.clone(), mask_BT.clone()
    gap_BT[1, 3] = 0
    right_BT[1, 5:] = 0
    cache = model(tokens_BT, use_cache=True).cache
    with pytest.raises(ConfigError, match="padding between the tokens of row 1"):
        model(tokens_BT, gap_BT)
    with pytest.raises(ConfigError, match=r"attention_mask has shape \(2, 3\)"):
        model(tokens_BT, mask_BT[:, :3])
    with pytest.raises(ConfigError, match="pad on the left"):
        model.generate(tokens_BT, attention_mask=right_BT, max_new_tokens=2)
    with pytest.raises(ConfigError, match="holds 2 sequences, input_ids has 1"):
        model(tokens_BT[:1], cache=cache)
    with pytest.raises(ConfigError, match="does not roll back"):
        cache.crop(1)
    with pytest.raises(ConfigError, match="received DynamicCache"):
        model(tokens_BT, cache=DynamicCache())
    with pytest.raises(ConfigError, match="cache_implementation 'static'"):
        model.generate(tokens_BT, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ConfigError, match="cannot be resized"):
        model.resize_token_embeddings(300)
    with pytest.raises(ConfigError, match="batch by time, received shape None"):
        model()


def test_the_position_range_ends_where_it_says(saved) -> None:
    model = HamForCausalLM.from_pretrained(saved("gated_delta_rule"))
    tokens_BT = torch.zeros(1, 1020, dtype=torch.long)
    mask_BT = torch.ones_like(tokens_BT)
    options = {"do_sample": False, "eos_token_id": None}
    assert model.generate(tokens_BT, max_new_tokens=5, **options).shape == (1, 1025)
    with pytest.raises(ConfigError, match=r"make 1026 tokens; this model reads up to 1024"):
        model.generate(tokens_BT, max_new_tokens=6, **options)
    mask_BT[:, :10] = 0
    made = model.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=15, **options)
    assert made.shape == (1, 1035), "padding takes no position"
    with pytest.raises(ConfigError, match="1025 tokens is longer than the model's max_positions"):
        model(torch.zeros(1, 1025, dtype=torch.long))


@pytest.mark.parametrize(
    ("mixer", "error", "message"),
    [
        ("ham", RoutingError, "scores must be finite.* in layer 0"),
        ("transformer", NotFiniteError, r"\d+ logits of '.*' are NaN or infinite"),
    ],
)
def test_broken_weights_are_an_error_instead_of_tokens(tiny_model, mixer, error, message) -> None:
    model = HamForCausalLM.from_decoder(tiny_model(mixer)).eval()
    with torch.no_grad():
        model.decoder.blocks[0].mixer_norm.weight.fill_(math.nan)
    tokens_BT = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(error, match=message):
        model(tokens_BT)
    with pytest.raises(error, match=message):
        model(tokens_BT, use_cache=True)
    with pytest.raises(error, match=message):
        model.generate(tokens_BT, max_new_tokens=2, do_sample=False)
    assert model.train()(tokens_BT, labels=tokens_BT).loss.isnan()


def test_generate_keeps_to_the_cache_it_may_have(tiny_model) -> None:
    model = HamForCausalLM.from_decoder(tiny_model("ham", target=1.0)).eval()
    tokens_BT = torch.arange(40)[None]
    settings = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(tokens_BT, **settings)
    found = model.generate(tokens_BT, **settings, cache_config={"cache_bytes": 1 << 24})
    assert torch.equal(found, expected)
    with pytest.raises(CachePoolFullError, match="of at most 1,000 bytes"):
        model.generate(tokens_BT, **settings, cache_config={"cache_bytes": 1000})
    with pytest.raises(ConfigError, match="cache_config has 'pages'; legal: 'cache_bytes'"):
        model.generate(tokens_BT, **settings, cache_config={"pages": 3})
    with pytest.raises(CachePoolFullError, match="of at most 1,000 bytes"):
        model(tokens_BT, cache=HamCache(cache_bytes=1000))
