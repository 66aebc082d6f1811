"""Matches worked out by hand, on a model of two layers of width 128 with four heads."""

from __future__ import annotations

import pytest

from ham.config import ArmConfig, Config
from ham.config_files import parse_config
from ham.errors import ConfigError
from ham.matching.bench import Bench
from ham.matching.budgets import Match, match_rival
from ham.model import registry
from ham.model.knob import Knob
from ham.model.mixer import MixerOptions, MixerShape
from ham.model.registry import mixer_class, parse_options, register_baseline, registered_mixers

WIDTH, HEADS, LAYERS = 128, 4, 2
HEAD = WIDTH // HEADS
# One key and one value of all heads, two bytes an element.
PAIR = 2 * WIDTH * 2
STATE = HEADS * HEAD * HEAD * 4
CONV = 3 * 3 * WIDTH * 2
# 32 tokens: keys and values, int32 positions, rounded up to a multiple of 256 bytes.
PAGE = -(-(32 * PAIR + 32 * 4) // 256) * 256


def experiment(*arms: dict, **changes: dict) -> Config:
    ham = {"name": "ham", "mixer": "ham", "options": {"target": 0.25}}
    values = {
        "name": "tiny",
        "device": "cpu",
        "data": {"context": 4096},
        "model": {"layers": LAYERS, "width": WIDTH, "heads": HEADS},
        "train": {"precision": "bfloat16", "steps": 100, "batch_size": 3},
        "evaluate": {"lm_eval": None},
        "arms": [ham, *arms],
    }
    return parse_config({**values, **changes})


def ham_bytes(context: int, share: float) -> int:
    """Of one layer: whole pages, their 8-byte addresses, a count, the state, the convolution."""
    pages = -(-round(context * share) // 32)
    return pages * (PAGE + 8) + 4 + STATE + CONV


def matches(arm: dict, budget: str, contexts=(4096,), fraction=None, **changes) -> list[Match]:
    config = experiment(arm, **changes)
    bench = Bench(config, "ham", fraction)
    return match_rival(bench, config.arm(arm["name"]), contexts, [budget])


def sliding(**options: int) -> dict:
    return {"name": "w", "mixer": "sliding_window", "options": {"window": 64, **options}}


def test_the_window_that_takes_what_a_quarter_of_4096_tokens_takes():
    # By hand: 1024 tokens on 32 pages of 65 x 256 bytes.
    assert PAGE == 16_640
    assert ham_bytes(4096, 0.25) == 32 * 16_640 + 32 * 8 + 4 + 16_384 + 2_304 == 551_428
    # 551,428 / 512 = 1077.01: 1077 pairs of 512 bytes are 4 bytes short.
    [match] = matches(sliding(), "bytes")
    assert match.wanted == LAYERS * 551_428
    assert (match.before, match.got) == (LAYERS * 64 * 512, LAYERS * 551_424)
    assert (match.knob, match.value, match.matched) == ("window", 1077, True)
    assert match.arm == ArmConfig(name="w@4096", mixer="sliding_window", options={"window": 1077})


def test_one_arm_for_each_length_and_the_sinks_count():
    found = matches(sliding(sinks=4), "bytes", contexts=(1024, 4096))
    windows = [round(ham_bytes(length, 0.25) / PAIR) - 4 for length in (1024, 4096)]
    assert [match.value for match in found] == windows
    assert [match.arm.name for match in found] == ["w@1024", "w@4096"]


def test_a_fraction_other_than_the_target_of_the_arm():
    [match] = matches(sliding(), "bytes", fraction=0.125)
    assert match.wanted == LAYERS * ham_bytes(4096, 0.125)
    assert match.value == round(ham_bytes(4096, 0.125) / PAIR)


def test_float32_elements_are_four_bytes():
    [match] = matches(sliding(), "bytes", train={"precision": "float32"})
    page = -(-(32 * 2 * PAIR + 32 * 4) // 256) * 256
    assert match.wanted == LAYERS * (32 * (page + 8) + 4 + STATE + 2 * CONV)


@pytest.mark.parametrize(("share", "heads", "matched"), [(0.25, 1, False), (0.48, 2, True)])
def test_key_heads_come_in_divisors(share: float, heads: int, matched: bool):
    [match] = matches({"name": "t", "mixer": "transformer"}, "bytes", fraction=share)
    assert (match.knob, match.value, match.matched) == ("kv_heads", heads, matched)
    assert match.got == LAYERS * 4096 * PAIR * heads // HEADS
    # A head of keys and values is 524,288 bytes of 551,428 wanted: 5 % short; two are far too many.
    if not matched:
        assert match.difference(match.got) == pytest.approx(524_288 / 551_428 - 1)
        assert match.limit == f"kv_heads: the next one, 2, gives {LAYERS * 1_048_576:,}"


def test_an_interleaved_hybrid_takes_as_many_layers_of_attention_as_come_close():
    # Six layers that keep somewhat less than half of the tokens, and pages and states besides.
    arm = {
        "name": "h",
        "mixer": "transformer",
        "placement": {"every": 6, "between": {"mixer": "gated_delta_rule"}},
    }
    model = {"layers": 6, "width": WIDTH, "heads": HEADS}
    [match] = matches(arm, "bytes", fraction=0.48, model=model)
    recurrent = STATE + CONV
    assert match.wanted == 6 * ham_bytes(4096, 0.48)
    assert (match.knob, match.value) == ("placement.layers", [1, 3, 5])
    assert match.got == 3 * 4096 * PAIR + 3 * recurrent
    assert match.matched
    assert match.arm.placement.chosen(6) == [1, 3, 5]
    assert match.arm.placement.between.mixer == "gated_delta_rule"


@pytest.mark.parametrize(
    ("options", "knob"),
    [
        ({"budget": "bounded", "slots": 64}, "slots"),
        ({"budget": "chunk_topk", "chunk": 64, "top_k": 3}, "top_k"),
        ({"target": 0.9}, "target"),
    ],
)
def test_each_budget_of_ham_has_its_own_knob(options: dict, knob: str):
    [match] = matches({"name": "other", "mixer": "ham", "options": options}, "bytes")
    assert match.knob == knob
    assert match.matched
    assert match.arm.options == {**options, knob: match.value}


def test_slots_of_the_bounded_store_by_hand():
    # A slot: a pair, an int32 position, a float32 score. Of two that are equally near, the first.
    options = {"budget": "bounded", "slots": 64}
    [match] = matches({"name": "other", "mixer": "ham", "options": options}, "bytes")
    assert match.value == 1024
    assert (ham_bytes(4096, 0.25) - STATE - CONV) / (PAIR + 8) == 1024.5


def test_training_flops_through_the_steps():
    # A window differs from full attention in the pairs alone, and both have equal parameters.
    context, window = 64, 16
    config = experiment(
        {"name": "t", "mixer": "transformer"}, sliding(window=window), data={"context": context}
    )
    bench = Bench(config, "t")
    [match] = match_rival(bench, config.arm("w"), [context], ["flops"])
    hidden = bench.measure(config.arm("t")).sizing.model.mlp_width
    dense = 2 * context * (LAYERS * (4 * WIDTH**2 + 3 * WIDTH * hidden) + WIDTH * 320)
    full = dense + LAYERS * 4 * WIDTH * context * (context + 1) / 2
    banded = dense + LAYERS * 4 * WIDTH * (window * (window + 1) / 2 + (context - window) * window)
    assert match.wanted == 3 * full * 3 * 100
    assert match.before == 3 * banded * 3 * 100
    assert match.value == match.arm.steps == round(100 * full / banded) > 100
    assert match.got == pytest.approx(match.before * match.value / 100)
    assert match.matched
    assert config.training(match.arm).steps == match.value
    assert config.training(config.arm("w")) == config.train


def test_parameters_before_and_after():
    [match] = matches({"name": "m", "mixer": "mamba2"}, "parameters")
    assert abs(match.difference(match.got)) <= 0.01 < abs(match.difference(match.before))
    per_unit = 3 * WIDTH * LAYERS
    usual = 344
    assert match.got - match.before == per_unit * (match.value - usual)


def test_a_budget_that_the_training_context_forbids_says_so():
    [match] = matches(sliding(), "bytes", contexts=(8192,), fraction=1.0)
    assert (match.matched, match.value) == (False, 4096)
    assert match.limit.startswith("window: 4097 is refused: window 4097 is larger than the context")


def test_a_state_that_leaves_no_parameters_for_the_mlp_is_refused():
    [match] = matches({"name": "g", "mixer": "gated_delta_rule"}, "bytes", fraction=1.0)
    assert not match.matched
    assert "is refused" in match.limit and "nearest MLP width, 8" in match.limit


def test_a_fixed_threshold_has_no_known_share():
    fixed = {"control": "fixed", "threshold": 0.5}
    [match] = matches({"name": "other", "mixer": "ham", "options": fixed}, "bytes")
    assert match.got is None and "known only once it is trained" in match.limit
    with pytest.raises(ConfigError, match="cannot be matched to: routes by a fixed threshold"):
        Bench(experiment({"name": "f", "mixer": "ham", "options": fixed}), "f")
    with pytest.raises(ConfigError, match="has no share of tokens to set"):
        Bench(experiment({"name": "t", "mixer": "transformer"}), "t", 0.5)


@pytest.mark.parametrize(
    ("knob", "reason"),
    [
        ((), "mixer 'broken' declares no knob"),
        ((Knob("size"),), "declares a knob on size, which is no option of it; known: none"),
    ],
)
def test_a_baseline_without_a_usable_knob_is_unmatched(monkeypatch, knob, reason):
    monkeypatch.setattr(registry, "_MIXERS", dict(registered_mixers()))

    @register_baseline("broken")
    class Broken(mixer_class("gated_delta_rule")):
        Options = MixerOptions
        memory_knobs = knob

        def __init__(self, shape, options):
            super().__init__(shape, parse_options("gated_delta_rule", {}, 4096))

    [match] = matches({"name": "b", "mixer": "broken"}, "bytes")
    assert not match.matched
    assert match.limit.endswith(reason)


def test_what_an_outside_baseline_raises_is_its_own_fault(monkeypatch):
    monkeypatch.setattr(registry, "_MIXERS", dict(registered_mixers()))

    @register_baseline("broken")
    class Broken(mixer_class("sliding_window")):
        def state_bytes(self, position, kv_fraction=1.0, element_size=2):
            raise RuntimeError("no idea")

    [match] = matches({"name": "b", "mixer": "broken"}, "bytes")
    assert match.got is None
    assert match.limit == "window: RuntimeError: no idea"


@pytest.mark.parametrize(
    ("name", "options", "knob", "values"),
    [
        ("ham", {}, "target", [0.0, 0.25, 1.0]),
        ("ham", {"budget": "bounded"}, "slots", [1, 2, 100]),
        ("ham", {"budget": "chunk_topk", "chunk": 32}, "top_k", [1, 17, 32]),
        ("sliding_window", {}, "window", [1, 2, 100]),
        ("gated_delta_rule_window", {}, "window", [1, 2, 100]),
        ("gated_delta_rule", {}, "expand_v", [1, 2, 3]),
        ("mamba2", {}, "state_size", [16, 32, 64]),
        ("transformer", {}, "kv_heads", [1, 2, 4]),
    ],
)
def test_more_of_a_knob_takes_more_bytes(name: str, options: dict, knob: str, values: list):
    mixer, shape = mixer_class(name), MixerShape(WIDTH, HEADS, max_positions=512)
    [declared] = [one for one in mixer.memory_knobs if one.option == knob]
    sizes = []
    for value in values:
        parsed = parse_options(name, {**options, knob: value}, 4096)
        assert declared.applies(parsed) and value in declared.values(shape, 1024)
        memory = mixer(shape, parsed).state_bytes(1024, value if declared.share else 1.0)
        sizes.append(memory.allocated)
    assert sizes == sorted(set(sizes))
