"""The examples of the study against their description, and their generators against chance."""

from __future__ import annotations

import itertools

import pytest
import torch

from ham.errors import ConfigError
from ham.study.config import MqarConfig, Size
from ham.study.data import (
    BLANK,
    CLASSES,
    FILLER,
    KEY,
    POWER,
    QUERY,
    VALUE,
    distinct,
    draw_examples,
    generator,
    mixture_schedule,
    weighted_order,
)
from ham.study.training import TrainingData

CPU = torch.device("cpu")
SIZES = [Size(length=16, pairs=1), Size(length=32, pairs=8), Size(length=48, pairs=5)]
VOCABULARY = 64


def draw(size: Size, filler: str, layout: str, *key: object, count: int = 40):
    return draw_examples(
        count,
        size,
        generator(CPU, *key),
        vocabulary_size=VOCABULARY,
        filler=filler,
        layout=layout,
    )


@pytest.mark.parametrize("layout", ["prefix", "scattered"])
@pytest.mark.parametrize("filler", ["blank", "random"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_example_is_what_the_description_says(size: Size, filler: str, layout: str):
    examples = draw(size, filler, layout)
    novel_filler = set()
    for tokens, classes, queries, answers in zip(
        examples.tokens_NT.tolist(),
        examples.classes_NT.tolist(),
        examples.queries_NP.tolist(),
        examples.answers_NP.tolist(),
        strict=True,
    ):
        assert len(tokens) == size.length
        memory = {}
        for place, (token, kind) in enumerate(zip(tokens, classes, strict=True)):
            if kind == KEY:
                assert 1 <= token < VOCABULARY // 2
                assert token not in memory
                assert place % 2 == 0 and classes[place + 1] == VALUE
                memory[token] = tokens[place + 1]
            elif kind == VALUE:
                assert VOCABULARY // 2 <= token < VOCABULARY
            elif kind == FILLER and filler == "blank":
                assert token == BLANK
            elif kind == FILLER:
                novel_filler.add(token)
        assert len(memory) == size.pairs == len(set(memory.values()))
        asked = [tokens[place] for place in queries]
        assert sorted(asked) == sorted(memory)
        assert [memory[key] for key in asked] == answers
        last_pair = max(place for place, kind in enumerate(classes) if kind == VALUE)
        assert all(place % 2 == 0 and place > last_pair for place in queries)
        assert {place for place, kind in enumerate(classes) if kind == QUERY} == set(queries)
        if layout == "prefix":
            assert last_pair == 2 * size.pairs - 1
    assert filler == "blank" or len(novel_filler) > VOCABULARY // 2
    assert torch.equal(examples.wanted_NT, examples.classes_NT == CLASSES.index("value"))


def test_scattered_pairs_have_filler_between_them():
    examples = draw(Size(length=48, pairs=3), "blank", "scattered")
    first_key_N = (examples.classes_NT == KEY).int().argmax(dim=1)
    assert len(set(first_key_N.tolist())) > 3


def test_the_same_key_gives_the_same_examples_and_another_key_others():
    size = SIZES[1]
    once, again, other = (draw(size, "random", "prefix", seed) for seed in (1, 1, 2))
    assert torch.equal(once.tokens_NT, again.tokens_NT)
    assert not torch.equal(once.tokens_NT, other.tokens_NT)


def test_distinct_rows_are_equally_likely():
    rows = distinct(24_000, 2, 4, generator(CPU, "rows"))
    counts = torch.bincount(rows[:, 0] * 4 + rows[:, 1], minlength=16).view(4, 4)
    assert counts.diagonal().sum() == 0
    chosen = counts[~torch.eye(4, dtype=torch.bool)].double()
    # 12 ordered pairs, 2,000 each; the 99.9 % quantile of chi squared with 11 degrees is 31.3.
    assert ((chosen - 2000) ** 2 / 2000).sum() < 31.3


def test_gaps_follow_the_power_law_one_after_another():
    weights = torch.arange(1, 5, dtype=torch.float32) ** (POWER - 1)
    drawn = weighted_order(40_000, 2, weights, generator(CPU, "gaps"))
    share = (weights / weights.sum()).tolist()
    statistic = 0.0
    for first, second in itertools.permutations(range(4), 2):
        expected = 40_000 * share[first] * share[second] / (1 - share[first])
        count = int(((drawn[:, 0] == first) & (drawn[:, 1] == second)).sum())
        statistic += (count - expected) ** 2 / expected
    assert statistic < 31.3


def test_the_schedule_keeps_the_weights_in_every_cycle():
    sizes = [Size(length=16, pairs=1, weight=3), Size(length=16, pairs=2)]
    schedule = mixture_schedule(sizes, 42, seed=0)
    cycles = [schedule[start : start + 4] for start in range(0, 40, 4)]
    assert all(sorted(cycle) == [0, 0, 0, 1] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1
    assert len(schedule) == 42


def test_training_calibration_and_test_examples_differ(tiny_study):
    config: MqarConfig = tiny_study()
    data = TrainingData(config, "blank", 0, CPU)
    assert [len(store.tokens_NT) for store in data.stores] == [4, 2]
    trained = {tuple(row) for row in data.stores[0].tokens_NT.flatten(0, 1).tolist()}
    calibrated = {tuple(row) for row in data.calibration[0].tokens_BT.tolist()}
    assert not trained & calibrated
    assert len(data.calibration) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [1000]}, "tuning_seed 1000 must not be one of seeds"),
        ({"widths": [33]}, "width 33 must be a multiple of heads 2"),
        ({"fillers": ["noise"]}, "fillers"),
        ({"train": {"mixture": [{"length": 16, "pairs": 5}]}}, "4 tokens a pair"),
        ({"train": {"mixture": [{"length": 256, "pairs": 40}]}}, "holds no 40 keys"),
        ({"stepz": 3}, "unknown key"),
    ],
)
def test_bad_configurations_have_one_clear_message(tiny_study, changes: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        tiny_study(**changes)


def test_too_many_pairs_for_the_vocabulary():
    with pytest.raises(ConfigError, match="legal: up to 31"):
        draw(Size(length=512, pairs=32), "blank", "prefix")
