"""Recall documents: exact in tokens, answerable from their context, the same for the same seed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ham.errors import ConfigError
from ham.train.recall_documents import (
    MAX_PAIRS,
    needle_document,
    needle_minimum_length,
    pairs_document,
)
from ham.train.tokenizer import ByteTokenizer, Tokenizer, train_bpe

HAYSTACK_TEXT = "The whale swam on — and the ship — followed it for many days. " * 60


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([HAYSTACK_TEXT, "the number that opens the door is one"], 320)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else bpe


@pytest.fixture
def haystack(tokenizer) -> list[int]:
    return tokenizer.encode(HAYSTACK_TEXT)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("extra", [0, 1, 137])
def test_needle_is_where_it_should_be(tokenizer, haystack, depth, extra) -> None:
    length = needle_minimum_length(tokenizer) + extra
    for seed in range(20):
        rng = np.random.default_rng(seed)
        document = needle_document(rng, tokenizer, haystack, length, depth)
        assert len(document.tokens) == length
        ((start, end),) = document.answers
        assert end == length
        number = tokenizer.decode(document.tokens[start:end])
        assert re.fullmatch(r"[1-9]\d{6}", number)

        needle_start, needle_end = document.needle
        needle = tokenizer.decode(document.tokens[needle_start:needle_end])
        match = re.fullmatch(
            r"\nKeep in mind: the number that opens the (\w+) is (\d+)\.\n", needle
        )
        assert match and match[2] == number
        rest = tokenizer.decode(document.tokens[needle_end:start])
        question = f"\nWhich number opens the {match[1]}? The number that opens the {match[1]} is "
        assert rest.endswith(question)

        hay_after = start - needle_end - len(tokenizer.encode(question))
        if depth == 0.0:
            assert needle_start == 0
        if depth == 1.0:
            assert rest == question
        if tokenizer.name == "byte":
            assert needle_start == round(depth * (needle_start + hay_after))


def test_haystack_around_the_needle_is_one_stretch(haystack, tokenizer) -> None:
    starts = set()
    for seed in range(10):
        document = needle_document(np.random.default_rng(seed), tokenizer, haystack, 300, 0.5)
        before, after = document.needle
        # The question's first piece is the last thing that differs from the haystack.
        question = document.tokens[after:].index(tokenizer.encode("\nWhich")[0]) + after
        stretch = document.tokens[:before] + document.tokens[after:question]
        found = [
            start
            for start in range(len(haystack) - len(stretch) + 1)
            if haystack[start : start + len(stretch)] == stretch
        ]
        assert found
        starts.add(tuple(stretch))
    assert len(starts) > 1


def test_needle_reads_a_memory_map_as_a_list(tokenizer, haystack) -> None:
    array = np.array(haystack, dtype=np.uint16)
    documents = [
        needle_document(np.random.default_rng(3), tokenizer, hay, 256, 0.3)
        for hay in (haystack, array)
    ]
    assert documents[0] == documents[1]
    assert all(type(token) is int for token in documents[1].tokens)


def test_digits_can_be_fewer(tokenizer, haystack) -> None:
    assert needle_minimum_length(tokenizer, 2) < needle_minimum_length(tokenizer, 7)
    document = needle_document(np.random.default_rng(0), tokenizer, haystack, 200, 0.5, digits=2)
    ((start, end),) = document.answers
    assert re.fullmatch(r"[1-9]\d", tokenizer.decode(document.tokens[start:end]))


def test_needle_refuses_what_does_not_fit(tokenizer, haystack) -> None:
    rng = np.random.default_rng(0)
    minimum = needle_minimum_length(tokenizer)
    with pytest.raises(ConfigError, match=f"of {minimum - 1} tokens .* the minimum is {minimum}"):
        needle_document(rng, tokenizer, haystack, minimum - 1, 0.5)
    with pytest.raises(ConfigError, match=r"depth must be within 0\.\.1, received 1.5"):
        needle_document(rng, tokenizer, haystack, 400, 1.5)
    with pytest.raises(ConfigError, match="tokens of haystack, received 10"):
        needle_document(rng, tokenizer, haystack[:10], 400, 0.5)


@pytest.mark.parametrize(("pairs", "queries"), [(1, 1), (2, 2), (8, 8), (8, 3), (64, 64), (65, 65)])
def test_every_query_has_its_value_earlier(tokenizer, pairs, queries) -> None:
    document = pairs_document(np.random.default_rng(pairs), tokenizer, pairs, queries)
    text = tokenizer.decode(document.tokens)
    listed, asked = re.fullmatch(r"\nPairs\n(.*)Asked\n(.*)", text, re.DOTALL).groups()
    table = dict(re.findall(r"(\S+): (\d\d)\n", listed))
    assert len(table) == pairs
    assert {len(key) for key in table} == {1 if pairs <= 64 else 2}
    questions = re.findall(r"(\S+): (\d\d)\n", asked)
    assert len(questions) == len({key for key, _ in questions}) == queries
    assert all(table[key] == value for key, value in questions)
    answers = [tokenizer.decode(document.tokens[start:end]) for start, end in document.answers]
    assert answers == [value for _, value in questions]
    assert document.needle is None


def test_queries_come_in_another_order(tokenizer) -> None:
    document = pairs_document(np.random.default_rng(0), tokenizer, 64, 64)
    keys = re.findall(r"(\S+): ", tokenizer.decode(document.tokens))
    assert sorted(keys[:64]) == sorted(keys[64:])
    assert keys[:64] != keys[64:]
    assert keys[:64] != sorted(keys[:64])


def test_pairs_refuse_what_does_not_exist(tokenizer) -> None:
    rng = np.random.default_rng(0)
    for pairs in (0, MAX_PAIRS + 1):
        with pytest.raises(ConfigError, match=rf"pairs must be within 1\.\.4096, received {pairs}"):
            pairs_document(rng, tokenizer, pairs, 1)
    with pytest.raises(ConfigError, match=r"queries must be within 1\.\.4 .*received 5"):
        pairs_document(rng, tokenizer, 4, 5)
    assert len(pairs_document(rng, tokenizer, MAX_PAIRS, 1).answers) == 1


def test_documents_follow_from_the_generator(tokenizer, haystack) -> None:
    def both(seed: int) -> tuple:
        rng = np.random.default_rng(seed)
        return (
            needle_document(rng, tokenizer, haystack, 256, 0.5),
            pairs_document(rng, tokenizer, 6, 6),
        )

    assert both(1) == both(1)
    assert both(1) != both(2)
