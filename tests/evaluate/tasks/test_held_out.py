"""The offline tasks ask answerable, reproducible questions about held-out text."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

from ham.errors import MissingDataError
from ham.evaluate.tasks import held_out
from ham.train.corpus import Document, load_documents


@lru_cache(maxsize=1)
def documents() -> dict[str, Document]:
    return {document.id: document for document in load_documents("test")}


def test_last_words_occur_earlier_but_not_in_the_last_sentence() -> None:
    records = held_out.last_words(list(documents().values()), 60, seed=0)
    assert len({record["context"] for record in records}) == 60
    for record in records:
        text, word = documents()[record["document"]].text, record["target"][1:]
        assert record["target"] == f" {word}" and re.fullmatch("[A-Za-z][a-z]{3,}", word)
        end = text.index(record["context"] + record["target"]) + len(record["context"])
        assert text[end + 1 + len(word)] in ".!?"
        assert re.search(rf"\b{word}\b", record["context"])
        last_sentence = re.split(r"[.!?]\s", record["context"])[-1]
        assert not re.search(rf"\b{word}\b", last_sentence)
        assert len(record["context"].encode()) < 500


def test_choices_are_equally_long_and_only_the_true_one_continues() -> None:
    records = held_out.continuations(list(documents().values()), 40, seed=0)
    for record in records:
        text = documents()[record["document"]].text
        assert {len(choice) for choice in record["choices"]} == {held_out.CONTINUATION_LENGTH}
        assert len(set(record["choices"])) == held_out.CONTINUATION_CHOICES
        continues = [record["context"] + choice in text for choice in record["choices"]]
        assert continues.index(True) == record["gold"] and sum(continues) == 1
    golds = [record["gold"] for record in records]
    assert set(golds) == {0, 1, 2, 3}


def test_false_choices_come_from_the_same_part() -> None:
    part_texts: dict[str, str] = {}
    for document in documents().values():
        part_texts[document.part] = part_texts.get(document.part, "") + "\n" + document.text
    for record in held_out.continuations(list(documents().values()), 10, seed=3):
        text = part_texts[documents()[record["document"]].part]
        assert all(choice in text for choice in record["choices"])


def test_pages_are_whole_excerpts() -> None:
    for record in held_out.pages(list(documents().values()), 5, seed=0):
        assert record["page"] in documents()[record["document"]].text
        assert len(record["page"]) == held_out.PERPLEXITY_PAGE


@pytest.mark.parametrize("make", [held_out.last_words, held_out.continuations, held_out.pages])
def test_the_seed_decides(make) -> None:
    texts = list(documents().values())
    assert make(texts, 5, 7) == make(texts, 5, 7)
    assert make(texts, 5, 7) != make(texts, 5, 8)


def test_data_sets_have_their_declared_size() -> None:
    data = held_out.perplexity_documents(seed=0, version=1.0)
    assert list(data) == ["test"] and len(data["test"]) == held_out.PERPLEXITY_COUNT


def test_too_little_text_is_said() -> None:
    short = Document("a/b", "a", "b", "No word twice here. " * 3)
    with pytest.raises(MissingDataError, match="no held-out document has more than"):
        held_out.pages([short], 1, 0)
    digits = Document("a/c", "a", "c", "1 2 3. " * 500)
    with pytest.raises(MissingDataError, match="only 0 of 1 records"):
        held_out.last_words([digits], 1, 0)
