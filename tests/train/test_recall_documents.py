"""Recall documents: exact in tokens, answerable from their context, the same for the same seed."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from ham.errors import ConfigError
from ham.train.recall_documents import (
    MAX_PAIRS,
    RecallDocument,
    copies_document,
    pairs_document,
)
from ham.train.tokenizer import ByteTokenizer, Tokenizer, train_bpe


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["\nPairs\nkl7\nAsked\n", "The whale swam on — and the ship followed."], 290)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else bpe


@pytest.mark.parametrize(("pairs", "queries"), [(1, 1), (2, 2), (8, 8), (8, 3), (64, 64), (65, 65)])
def test_every_query_has_its_value_earlier(tokenizer, pairs, queries) -> None:
    document = pairs_document(np.random.default_rng(pairs), tokenizer, pairs, queries)
    text = tokenizer.decode(document.tokens)
    listed, asked = re.fullmatch(r"\nPairs\n(.*)Asked\n(.*)", text, re.DOTALL).groups()
    table = dict(re.findall(r"(\S+)(\S)\n", listed))
    assert len(table) == pairs
    assert {len(key) for key in table} == {1 if pairs <= 64 else 2}
    questions = re.findall(r"(\S+)(\S)\n", asked)
    assert len(questions) == len({key for key, _ in questions}) == queries
    assert all(table[key] == value for key, value in questions)
    answers = [tokenizer.decode(document.tokens[start:end]) for start, end in document.answers]
    assert answers == [value for _, value in questions]


def test_queries_come_in_another_order(tokenizer) -> None:
    document = pairs_document(np.random.default_rng(0), tokenizer, 64, 64)
    keys = re.findall(r"^(\S)\S$", tokenizer.decode(document.tokens), re.MULTILINE)
    assert sorted(keys[:64]) == sorted(keys[64:])
    assert keys[:64] != keys[64:]
    assert keys[:64] != sorted(keys[:64])


def test_keys_and_values_share_no_character(tokenizer) -> None:
    text = tokenizer.decode(pairs_document(np.random.default_rng(0), tokenizer, 64, 64).tokens)
    keys, values = (set(part) for part in zip(*re.findall(r"^(\S)(\S)$", text, re.M), strict=True))
    assert len(keys) == 64 and 20 <= len(values) <= 30
    assert not keys & values


def test_what_follows_the_first_copy_is_answered_by_it(tokenizer) -> None:
    sizes, numbers = set(), set()
    for seed in range(200):
        document = copies_document(np.random.default_rng(seed), tokenizer)
        head, first, *others = tokenizer.decode(document.tokens).strip().split("\n")
        assert head == "Copies" and set(others) == {first}
        ((start, end),) = document.answers
        assert tokenizer.decode(document.tokens[start:end]).split() == others
        sizes.add(len(first))
        numbers.add(len(others))
    assert 8 <= min(sizes) < 16 and 100 < max(sizes) <= 128
    assert numbers == {1, 2, 3}


def test_pairs_refuse_what_does_not_exist(tokenizer) -> None:
    rng = np.random.default_rng(0)
    for pairs in (0, MAX_PAIRS + 1):
        with pytest.raises(ConfigError, match=rf"pairs must be within 1\.\.4096, received {pairs}"):
            pairs_document(rng, tokenizer, pairs, 1)
    with pytest.raises(ConfigError, match=r"queries must be within 1\.\.4 .*received 5"):
        pairs_document(rng, tokenizer, 4, 5)
    assert len(pairs_document(rng, tokenizer, MAX_PAIRS, 1).answers) == 1


def test_documents_follow_from_the_generator(tokenizer) -> None:
    def make(seed: int) -> RecallDocument:
        return pairs_document(np.random.default_rng(seed), tokenizer, 6, 6)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_a_hundred_thousand_documents_a_minute(tokenizer) -> None:
    """Of 1,100 tokens; a third of the goal is the floor, so that a busy core passes."""
    seconds = []
    for seed in range(40):
        begin = time.process_time()
        pairs_document(np.random.default_rng(seed), tokenizer, 83, 83)
        seconds.append(time.process_time() - begin)
    assert 60 / np.median(seconds) > 33_000
