"""Generation: prompts of any lengths in one batch, each as it would be alone."""

from __future__ import annotations

import pytest
import torch

from ham.errors import ConfigError, NotFiniteError
from ham.model.generation import GenerationFacts, generate, stream
from ham.model.registry import registered_mixers

MIXERS = sorted(registered_mixers())
PROMPTS = [[1, 2, 3], list(range(40)), [9, 8, 7, 6, 5], [4, 4, 4], [7], list(range(100, 170))]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("batch_size", "chunk"), [(16, None), (3, 7)])
def test_generation_equals_repeated_argmax(tiny_model, mixer, batch_size, chunk) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    found = generate(model, PROMPTS, 6, batch_size=batch_size, prefill_chunk=chunk)
    for prompt, new in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            logits = model(torch.tensor([tokens])).logits_BTV[0, -1]
            tokens.append(int(logits.argmax()))
        assert new == tokens[len(prompt) :]


def test_generation_stops_each_prompt_on_its_own(tiny_model) -> None:
    model = tiny_model("gated_delta_rule", dtype=torch.float64)
    prompts = [[1, 2], [3, 4, 5], [5, 6]]
    free = generate(model, prompts, max_new_tokens=5)
    lengths = iter([1, 3, 5])
    wanted = {tuple(new[:n]) for new, n in zip(free, lengths, strict=True)}
    stopped = generate(model, prompts, 5, stop=lambda new: tuple(new) in wanted)
    assert [len(new) for new in stopped] == [
        min(n for n in range(1, 6) if tuple(new[:n]) in wanted or n == 5) for new in free
    ]
    for new, whole in zip(stopped, free, strict=True):
        assert new == whole[: len(new)]


@pytest.mark.parametrize("mixer", ["ham", "transformer"])
def test_samples_do_not_depend_on_the_batch(tiny_model, mixer) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    rules = {"temperature": 1.5, "top_p": 0.95}
    together = generate(model, PROMPTS, 12, seed=4, **rules)
    assert generate(model, PROMPTS, 12, seed=4, batch_size=2, **rules) == together
    assert generate(model, PROMPTS[:3], 12, seed=4, prefill_chunk=3, **rules) == together[:3]
    other = generate(model, PROMPTS, 12, seed=5, **rules)
    assert all(a != b for a, b in zip(together, other, strict=True))
    first, second = generate(model, [[1, 2]] * 2, 12, seed=4, **rules)
    assert first != second


def test_waiting_prompts_join_when_half_of_the_batch_is_free(tiny_model, monkeypatch) -> None:
    model = tiny_model("ham")
    sizes: list[int] = []
    step = model.step
    monkeypatch.setattr(
        model, "step", lambda tokens_B, state: sizes.append(len(tokens_B)) or step(tokens_B, state)
    )
    prompts = [[9] * 8, [9] * 7, [9] * 6, [9] * 5, [9] * 4, [9] * 3]
    ends = [4, 1, 4, 1, 4, 1]
    limits: dict[int, int] = {}
    finished: list[tuple[int, int]] = []

    def stop(made: list[int]) -> bool:
        # Lists of new tokens are first asked about in the order of the prompts: longest first.
        if id(made) not in limits:
            limits[id(made)] = ends[len(limits)]
        return len(made) == limits[id(made)]

    found = generate(
        model, prompts, 9, stop, batch_size=4, on_finished=lambda *done: finished.append(done)
    )
    assert [len(made) for made in found] == ends
    # Four begin and two end at once; the last two join, one of them ends at once.
    assert sizes == [2, 3, 3, 1]
    assert finished == [(2, 6), (3, 6), (5, 6), (6, 6)]


def test_no_prompts_and_no_tokens(tiny_model) -> None:
    model = tiny_model("ham")
    assert generate(model, [], 3) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0, "seed": 2, "top_k": 50}], ids=str)
def test_a_stream_gives_the_tokens_of_generate(tiny_model, rules) -> None:
    model = tiny_model("ham")
    facts = GenerationFacts()
    tokens = stream(model, PROMPTS[1], 20, prefill_chunk=16, facts=facts, **rules)
    first = next(tokens)
    assert facts.new_tokens == 1, "the first token comes before the others are made"
    (expected,) = generate(model, [PROMPTS[1]], 20, **rules)
    assert [first, *tokens] == expected


def test_facts_are_what_the_model_did(tiny_model) -> None:
    model = tiny_model("ham", dtype=torch.float64)
    facts = GenerationFacts()
    answers = generate(model, PROMPTS, 10, batch_size=4, facts=facts)
    kept = torch.zeros(2)
    read = 0
    for prompt, new in zip(PROMPTS, answers, strict=True):
        output = model(torch.tensor([prompt + new[:-1]]))
        kept += torch.tensor([aux.routed_BT.sum() for aux in output.aux])
        read += len(prompt) + len(new) - 1
    assert facts.new_tokens == 60 and facts.read_tokens == read
    assert facts.kept_tokens == dict(enumerate(kept.tolist()))
    assert facts.kept_fraction_per_layer()[1] == float(kept[1]) / read
    assert 0 < facts.first_token_seconds < facts.seconds


def test_facts_of_a_model_that_routes_nothing(tiny_model) -> None:
    model, facts = tiny_model("transformer"), GenerationFacts()
    generate(model, [[1] * 60], 11, facts=facts)
    # Ten of the eleven new tokens were read.
    assert facts.memory_bytes == model.state_bytes(70, element_size=4).allocated
    assert facts.kept_fraction_per_layer() == {}


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 257]], {}, r"prompt 1 has the token 257; legal: 0\.\.256"),
        ([[-1]], {}, "prompt 0 has the token -1"),
        ([[1], [1] * 1022], {}, "prompt 1 has 1022 tokens and 3 new ones .* max_positions 1024"),
        ([[1]], {"batch_size": 0}, "batch_size 0; legal: an integer >= 1"),
        ([[1]], {"prefill_chunk": -2}, "prefill_chunk -2; legal"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens -1; legal: an integer >= 0"),
        ([[1]], {"top_p": 2.0}, r"top_p 2\.0; legal"),
    ],
    ids=str,
)
def test_bad_input_has_one_clear_message(tiny_model, prompts, arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(tiny_model("transformer"), prompts, **{"max_new_tokens": 3, **arguments})


def test_a_stream_refuses_bad_input_when_it_is_called(tiny_model) -> None:
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        stream(tiny_model("transformer"), [], 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_named(tiny_model, monkeypatch, temperature) -> None:
    model = tiny_model("gated_delta_rule")
    step, calls = model.step, []

    def breaking(tokens_B, state):
        logits_BV = step(tokens_B, state)
        calls.append(1)
        if len(calls) == 3:
            logits_BV[1, 5] = float("inf")
        return logits_BV

    monkeypatch.setattr(model, "step", breaking)
    # The longest prompt is the first of the batch.
    with pytest.raises(NotFiniteError, match="prompt 0: the logits of new token 3"):
        generate(model, [[1], [2, 3]], 9, temperature=temperature)


def test_scores_that_are_not_finite_are_named(tiny_model) -> None:
    model = tiny_model("ham")
    with torch.no_grad():
        # The first of the 32 rows that make keys.
        model.blocks[1].mixer.qkv.weight[32, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="prompt 0: a routing score of layer 1 is NaN"):
        generate(model, [[1, 2, 3]], 2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_in_bfloat16(tiny_model, mixer) -> None:
    model, facts = tiny_model(mixer), GenerationFacts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generate(model, PROMPTS, 5, batch_size=4, prefill_chunk=32, facts=facts)
    assert [len(new) for new in found] == [5] * len(PROMPTS)
