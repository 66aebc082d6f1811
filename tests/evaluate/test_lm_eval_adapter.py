"""The lm-eval model: encoding, windows, truncation and generation, against hand-worked answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from stand_ins import ByteText, FakeRequest, SuccessorModel, UniformModel

from ham.errors import ConfigError, CorruptFileError
from ham.evaluate import lm_eval_adapter
from ham.evaluate.lm_eval_adapter import HamLM, cut_before, generation_settings
from ham.model.checkpoint import save_model
from ham.model.generation import generate
from ham.train.tokenizer import train_bpe

HIT = math.log(math.exp(5) + 256) - 5
MISS = math.log(math.exp(5) + 256)


def successor(**options) -> HamLM:
    return HamLM(SuccessorModel(), tokenizer=ByteText(), **options)


def test_it_is_registered_under_its_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("ham") is HamLM
    assert get_model("dummy").__name__ == "DummyLM", "lm-eval's own models stay known"


def test_loglikelihood_of_text() -> None:
    lm = successor()
    requests = [FakeRequest(("ab", "cd")), FakeRequest(("ab", "xy")), FakeRequest(("a ", "b"))]
    (hit, hit_greedy), (miss, miss_greedy), (blank, _) = lm.loglikelihood(requests)
    assert hit_greedy and hit == pytest.approx(-2 * HIT)
    assert not miss_greedy and miss == pytest.approx(-HIT - MISS)
    assert blank == pytest.approx(-2 * MISS), "the blank belongs to the continuation"


def test_an_empty_context_begins_with_end_of_text() -> None:
    ((value, greedy),) = successor().loglikelihood([FakeRequest(("", "\x00\x01"))])
    assert greedy and value == pytest.approx(-2 * HIT), "256 + 1 wraps around to byte 0"


def test_counts_belong_to_their_task() -> None:
    lm = successor(max_length=4)
    requests = [
        FakeRequest(("abc", "de"), "short"),
        FakeRequest(("xxabc", "de"), "long"),
        FakeRequest(("yyyyabc", "de"), "long"),
    ]
    values = [value for value, _ in lm.loglikelihood(requests)]
    assert values == pytest.approx([-2 * HIT] * 3)
    assert lm.records["short"].truncated == 0
    assert lm.records["long"].truncated == 2
    assert lm.records["long"].scored_tokens == {("xxabc", "de"): 2, ("yyyyabc", "de"): 2}
    assert lm.records["long"].routing.tokens == 8


def test_rolling_predicts_every_token_once_in_any_window() -> None:
    text = "The quick brown fox jumps over the lazy dog"
    for max_length in (4, 7, 100):
        lm = HamLM(UniformModel(), tokenizer=ByteText(), max_length=max_length)
        first, second = lm.loglikelihood_rolling([FakeRequest((text,)), FakeRequest(("ab",))])
        assert first == pytest.approx(-len(text) * math.log(257))
        assert second == pytest.approx(-2 * math.log(257))


def test_a_byte_pair_vocabulary() -> None:
    """Each continuation token is scored once, and blanks at the seam belong to the continuation."""
    tokenizer = train_bpe(["the whale and the sea and the ship. " * 20], vocabulary_size=280)
    assert 257 < tokenizer.vocabulary_size <= 280
    nats = math.log(tokenizer.vocabulary_size)
    lm = HamLM(UniformModel(tokenizer.vocabulary_size), tokenizer=tokenizer)
    whole = tokenizer.encode("the whale and the sea")
    for context, continuation in (("the whale", " and the sea"), ("the whale ", "and the sea")):
        ((value, _),) = lm.loglikelihood([FakeRequest((context, continuation))])
        assert value == pytest.approx(-nats * (len(whole) - len(tokenizer.encode("the whale"))))
    (total,) = lm.loglikelihood_rolling([FakeRequest(("the whale and the sea",))])
    assert total == pytest.approx(-nats * len(whole)) and len(whole) < 21


def test_generation_is_real_and_stops(tiny_model) -> None:
    model = tiny_model("ham")
    lm = HamLM(model, tokenizer=ByteText())
    (tokens,) = generate(model, [list(b"abc")], 12)
    text = ByteText().decode(tokens)
    everything = FakeRequest(("abc", {"until": [], "max_gen_toks": 12}))
    stop = text[5]
    stopped = FakeRequest(("abc", {"until": [stop], "max_gen_toks": 12}))
    assert lm.generate_until([everything, stopped, everything]) == [
        text,
        text.split(stop)[0],
        text,
    ]


def test_generation_stops_at_strings_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = list(b"one two STOP three")

    def scripted(model, prompts, new_tokens, stop, batch_size, on_finished):
        made: list[int] = []
        for token in answer:
            made.append(token)
            if stop(made):
                break
        scripted.made = len(made)
        return [made for _ in prompts]

    monkeypatch.setattr(lm_eval_adapter, "generate", scripted)
    request = FakeRequest(("q", {"until": ["\n", "STOP"], "max_gen_toks": 50}))
    assert successor().generate_until([request]) == ["one two "]
    assert scripted.made == len("one two STOP"), "generation ended with the stop string"


def test_long_prompts_lose_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []

    def record(model, given, new_tokens, stop, batch_size, on_finished):
        prompts.extend(given)
        return [[65] for _ in given]

    monkeypatch.setattr(lm_eval_adapter, "generate", record)
    lm = successor(max_length=10)
    arguments = {"until": ["."], "max_gen_toks": 6}
    lm.generate_until([FakeRequest(("abcdefgh", arguments)), FakeRequest(("xyz", arguments))])
    assert prompts == [list(b"efgh"), list(b"xyz")]
    assert lm.records["task"].truncated == 1
    with pytest.raises(ConfigError, match="max_gen_toks 10 leaves no room"):
        lm.generate_until([FakeRequest(("abc", {"until": [], "max_gen_toks": 10}))])


def test_sampling_is_refused() -> None:
    with pytest.raises(ConfigError, match="greedily only"):
        generation_settings({"do_sample": True, "temperature": 0.8})
    assert generation_settings({"until": "x", "max_gen_toks": 3}) == (3, ("x",))
    assert generation_settings({"until": ["", "b"]}) == (256, ("b",))


def test_cut_before_the_first_stop() -> None:
    assert cut_before("a b. c\n d", ["\n", "."]) == "a b"
    assert cut_before("abc", []) == "abc"


def test_from_a_checkpoint_folder(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("gated_delta_rule")
    save_model(tmp_path, model)
    request = [FakeRequest(("In the ", "beginning"))]
    loaded = HamLM.create_from_arg_string(
        f"pretrained={tmp_path},device=cpu,batch_size=4",
        {"device": "cuda:0", "batch_size": 1, "max_batch_size": None},
    )
    direct = HamLM(model, tokenizer=ByteText())
    assert loaded.batch_size == 4 and loaded.max_length == 128
    assert loaded.loglikelihood(request) == direct.loglikelihood(request)
    assert loaded.tokenizer_name == "byte" and loaded.eot_token_id == 256


def test_faulty_arguments(tiny_model, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("gated_delta_rule"))
    with pytest.raises(ConfigError, match=r"max_length 4096 is beyond .* max_positions 1024"):
        HamLM(str(tmp_path), device="cpu", max_length=4096)
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        HamLM(str(tmp_path), device="tpu")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="truncated or changed"):
        HamLM(str(tmp_path), device="cpu")
