"""The examples of the study against their description, and their generators against chance."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from ham.errors import ConfigError
from ham.fingerprint import repository_root
from ham.study import data
from ham.study.config import MqarConfig, Size, Task, load_mqar_config
from ham.study.data import (
    BLANK,
    CLASSES,
    FILLER,
    KEY,
    NEVER,
    POWER,
    QUERY,
    REPEAT,
    STALE,
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


def draw(size: Size, *key: object, count: int = 40, **task):
    return draw_examples(
        count, size, Task(**task), generator(CPU, *key), vocabulary_size=VOCABULARY
    )


@pytest.mark.parametrize("layout", ["prefix", "scattered"])
@pytest.mark.parametrize("filler", ["blank", "random"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_example_is_what_the_description_says(size: Size, filler: str, layout: str):
    examples = draw(size, filler=filler, layout=layout)
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


VARIANTS = [{"passes": 2}, {"passes": 3}, {"updates": 2}, {"updates": 5}]


@pytest.mark.parametrize("layout", ["prefix", "scattered"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_read_as_a_story_give_the_answers(variant: dict, layout: str):
    """Reads every example from left to right and remembers the last value of each key."""
    size = Size(length=80, pairs=5)
    examples = draw(size, filler="random", layout=layout, **variant)
    overwritten_rows = set()
    for tokens, classes, queries, answers, stale, places in zip(
        *(getattr(examples, f.name).tolist() for f in fields(examples)), strict=True
    ):
        story: dict[int, list[tuple[int, int]]] = {}
        for place in range(size.length - 1):
            if classes[place] == KEY:
                story.setdefault(tokens[place], []).append((place + 1, tokens[place + 1]))
        first_query = min(queries)
        assert len(story) == size.pairs
        assert all(place < first_query for copies in story.values() for place, _ in copies)
        for query, answer, old, where in zip(queries, answers, stale, places, strict=True):
            copies = story[tokens[query]]
            assert copies[-1][1] == answer
            if "passes" in variant:
                assert len(copies) == variant["passes"] and len({v for _, v in copies}) == 1
                assert [place for place, _ in copies] == where and old == NEVER
                kinds = [VALUE] + [REPEAT] * (variant["passes"] - 1)
            else:
                assert where == [copies[-1][0]]
                assert old == (NEVER if len(copies) == 1 else copies[0][1]) and old != answer
                kinds = [VALUE] if len(copies) == 1 else [STALE, VALUE]
                overwritten_rows.add(tuple(len(story[tokens[q]]) for q in queries))
            assert [classes[place] for place, _ in copies] == kinds
        counts = [classes.count(kind) for kind in (KEY, VALUE, QUERY)]
        written = 5 * variant.get("passes", 1) + variant.get("updates", 0)
        assert counts == [written, 5, 5]
    assert torch.equal(examples.wanted_NT.sum(1), torch.full((40,), 5))
    assert variant.get("updates") != 2 or len(overwritten_rows) > 5, "any two keys are updated"


def test_a_repeated_and_an_overwritten_list_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Keys 3, 1 with values 9, 8; gaps 1, 0; the second key is updated by one step to 9."""
    monkeypatch.setattr(data, "distinct", lambda *_: next(drawn))
    monkeypatch.setattr(data, "weighted_order", lambda *_: next(ordered))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([[1]]))
    size = Size(length=12, pairs=2)

    def numbers(*rows: list[int]):
        return iter(torch.tensor([row]) for row in rows)

    # `distinct` counts keys from 1 and values from 5, half of a vocabulary of 10.
    drawn, ordered = numbers([2, 0], [4, 3]), numbers([1, 0])
    twice = draw_examples(
        1, size, Task(filler="blank", passes=2), generator(CPU), vocabulary_size=10
    )
    assert twice.tokens_NT.tolist() == [[3, 9, 1, 8, 3, 9, 1, 8, 1, 0, 3, 0]]
    assert twice.classes_NT.tolist() == [[1, 2, 1, 2, 1, 4, 1, 4, 3, 0, 3, 0]]
    assert twice.queries_NP.tolist() == [[10, 8]]
    assert twice.places_NPC.tolist() == [[[1, 5], [3, 7]]]
    assert twice.answers_NP.tolist() == [[9, 8]]

    drawn, ordered = numbers([2, 0], [4, 3]), numbers([1, 0], [1])
    updated = draw_examples(
        1, size, Task(filler="blank", updates=1), generator(CPU), vocabulary_size=10
    )
    assert updated.tokens_NT.tolist() == [[3, 9, 1, 8, 1, 9, 1, 0, 3, 0, 0, 0]]
    assert updated.classes_NT.tolist() == [[1, 2, 1, 5, 1, 2, 3, 0, 3, 0, 0, 0]]
    assert updated.answers_NP.tolist() == [[9, 9]]
    assert updated.stale_NP.tolist() == [[NEVER, 8]]
    assert updated.places_NPC.tolist() == [[[1], [5]]]


def published_gaps(count: int, size: Size, seed: int) -> np.ndarray:
    """The gaps of queries as Zoology describes them, drawn by numpy one example at a time."""
    random = np.random.default_rng(seed)
    space = (size.length - 2 * size.pairs) // 2
    law = 0.01 * np.arange(1, space + 1) ** (0.01 - 1.0)
    law /= law.sum()
    return np.stack([random.choice(space, size.pairs, replace=False, p=law) for _ in range(count)])


@pytest.mark.parametrize("size", [Size(length=64, pairs=4), Size(length=64, pairs=16)], ids=str)
def test_queries_stand_where_the_published_law_puts_them(size: Size):
    """Two samples, chi squared over the gap of the first pair and of the last."""
    count = 4000
    drawn = draw_examples(
        count, size, Task(filler="blank"), generator(CPU, "law"), vocabulary_size=8192
    )
    ours = ((drawn.queries_NP - 2 * size.pairs) // 2).numpy()
    theirs = published_gaps(count, size, seed=1)
    for pair in (0, -1):
        space = (size.length - 2 * size.pairs) // 2
        found, expected = (np.bincount(x[:, pair], minlength=space) for x in (ours, theirs))
        both = found + expected
        statistic = ((found - expected) ** 2 / both.clip(1))[both > 0].sum()
        # 99.9 % quantile of chi squared with one degree less than gaps.
        assert statistic < chi2.ppf(0.999, (both > 0).sum() - 1)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"passes": 2}, "task blank-repeats-2: 32/8 needs 48 tokens"),
        ({"updates": 2}, "task blank-overwrites-2: 32/8 needs 36 tokens"),
        ({"updates": 9}, "32/8 has fewer keys than the 9 updates"),
        ({"layout": "scattered", "updates": 1}, "needs 36 tokens"),
    ],
)
def test_a_size_that_does_not_fit_a_task_is_refused(tiny_study, task: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        draw(Size(length=32, pairs=8), filler="blank", **task)
    size = {"length": 32, "pairs": 8}
    with pytest.raises(ConfigError, match=words):
        tiny_study(tasks=[{"filler": "blank", "mixture": [size], **task}])


def test_scattered_pairs_have_filler_between_them():
    examples = draw(Size(length=48, pairs=3), filler="blank", layout="scattered")
    first_key_N = (examples.classes_NT == KEY).int().argmax(dim=1)
    assert len(set(first_key_N.tolist())) > 3


def test_the_same_key_gives_the_same_examples_and_another_key_others():
    size = SIZES[1]
    once, again, other = (draw(size, seed, filler="random") for seed in (1, 1, 2))
    assert torch.equal(once.tokens_NT, again.tokens_NT)
    assert not torch.equal(once.tokens_NT, other.tokens_NT)


def chance_of_counts(rows_NP: torch.Tensor, choices: int) -> float:
    """How likely counts as uneven as these are if every row of different numbers is as likely."""
    powers_P = choices ** torch.arange(rows_NP.shape[1])
    found = torch.bincount((rows_NP * powers_P).sum(dim=1), minlength=choices ** len(powers_P))
    legal = [
        sum(number * power for number, power in zip(row, powers_P.tolist(), strict=True))
        for row in itertools.permutations(range(choices), len(powers_P))
    ]
    assert found[legal].sum() == len(rows_NP), "a number is twice in a row"
    expected = len(rows_NP) / len(legal)
    statistic = ((found[legal] - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, len(legal) - 1))


# Numbers are drawn again in the first two, and ordered by keys in the others.
@pytest.mark.parametrize(("drawn", "choices"), [(2, 4), (3, 7), (2, 3), (4, 4)])
def test_distinct_rows_are_equally_likely(drawn: int, choices: int):
    rows_NP = distinct(200 * math.perm(choices, drawn), drawn, choices, generator(CPU, "rows"))
    assert chance_of_counts(rows_NP, choices) > 0.001


def test_rows_that_prefer_some_numbers_are_found_out():
    """The nearest free number instead of another draw, and rows of which the last one is larger."""
    rows_NP = torch.randint(7, (42_000, 3), generator=generator(CPU, "rows"))
    for place in (1, 2):
        while (taken := (rows_NP[:, :place] == rows_NP[:, place : place + 1]).any(dim=1)).any():
            rows_NP[taken, place] = (rows_NP[taken, place] + 1) % 7
    assert chance_of_counts(rows_NP, 7) < 1e-9
    rows_NP = distinct(42_000, 3, 7, generator(CPU, "rows"))
    rows_NP[::20] = rows_NP[::20].sort(dim=1).values
    assert chance_of_counts(rows_NP, 7) < 1e-9


def test_many_pairs_are_different_and_as_likely_at_every_place():
    """256 keys of 4,095, of which a row has eight repeats before they are drawn again."""
    rows_NP = distinct(4000, 256, 4095, generator(CPU, "many"))
    ordered_NP = rows_NP.sort(dim=1).values
    assert (ordered_NP[:, 1:] > ordered_NP[:, :-1]).all()
    assert ordered_NP[:, 0].min() == 0 and ordered_NP[:, -1].max() == 4094
    for place in (0, 128, 255):
        counts = torch.bincount(rows_NP[:, place] // 65, minlength=63).double()
        assert ((counts - 4000 / 63) ** 2 / (4000 / 63)).sum() < chi2.ppf(0.999, 62)


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
    schedule = mixture_schedule(sizes, 42)
    cycles = [schedule[start : start + 4] for start in range(0, 40, 4)]
    assert all(sorted(cycle) == [0, 0, 0, 1] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1
    assert len(schedule) == 42


def test_training_calibration_and_test_examples_differ(tiny_study):
    config: MqarConfig = tiny_study()
    made = TrainingData(config, config.tasks[0], 0, 6, CPU)
    assert [len(store.tokens_NT) for store in made.stores] == [4, 2]
    trained = {tuple(row) for row in made.stores[0].tokens_NT.flatten(0, 1).tolist()}
    calibrated = {tuple(row) for row in made.calibration[0].tokens_BT.tolist()}
    assert not trained & calibrated
    assert len(made.calibration) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [1000]}, "tuning_seed 1000 must not be one of seeds"),
        ({"widths": [33]}, "width 33 must be a multiple of heads 2"),
        ({"tasks": [{"filler": "noise"}]}, "filler"),
        ({"train": {"mixture": [{"length": 16, "pairs": 5}]}}, "4 tokens a pair"),
        ({"train": {"mixture": [{"length": 256, "pairs": 40}]}}, "holds no 40 keys"),
        ({"stepz": 3}, "unknown key"),
        ({"tasks": [{"filler": "blank"}, {"filler": "blank", "sizes": None}]}, "tasks must differ"),
        ({"tasks": [{"filler": "blank", "passes": 2, "updates": 1}]}, "do not go together"),
        ({"tasks": [{"filler": "blank", "rates_from": "random"}]}, "tuned tasks: none"),
        ({"only": ["random"]}, "unknown tasks .*; known: blank"),
        (
            {"learning_rates": [0.1, 0.2], "evaluate": {"sizes": [{"length": 64, "pairs": 2}]}},
            "every evaluated size is longer than 32",
        ),
    ],
)
def test_bad_configurations_have_one_clear_message(tiny_study, changes: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        tiny_study(**changes)


def test_the_shipped_mixture_is_the_published_one():
    """Based's sweep in Zoology's code (d88d6f5): examples of each size, and the tests."""
    study = load_mqar_config(repository_root() / "workflow/config/mqar.yaml")
    published = {"64/4": 100_000, "128/8": 20_000, "256/16": 20_000, "256/32": 20_000}
    published["256/64"] = 20_000
    assert {str(size): 20_000 * size.weight for size in study.train.mixture} == published
    tests = "64/4 64/8 64/16 128/32 256/64 512/128 1024/256"
    assert " ".join(map(str, study.evaluate.sizes)) == tests
    assert (study.evaluate.examples, study.vocabulary_size, study.heads) == (1000, 8192, 2)
    assert (POWER, study.train.weight_decay) == (0.01, 0.1)
    plain = [
        task for task in study.tasks if task.key in {("blank", "prefix"), ("random", "prefix")}
    ]
    assert [task.mixture or task.sizes for task in plain] == [None, None]


def test_too_many_pairs_for_the_vocabulary():
    with pytest.raises(ConfigError, match="legal: up to 31"):
        draw(Size(length=512, pairs=32), filler="blank")
