"""Documents of the offline tasks, made from the held-out test documents of the shipped corpus.

Named by the task files beside this module. Lengths are in characters, so that every tokenizer is
asked the same questions, and short enough for a context of 512 bytes. The same seed always gives
the same documents.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ham.errors import MissingDataError

if TYPE_CHECKING:
    from ham.train.corpus import Document

SEED = 0
LAST_WORD_COUNT = 150
LAST_WORD_PASSAGE = 280
CONTINUATION_COUNT = 80
CONTINUATION_CONTEXT = 128
CONTINUATION_LENGTH = 48
CONTINUATION_CHOICES = 4
PERPLEXITY_COUNT = 10
PERPLEXITY_PAGE = 1536

_ATTEMPTS_PER_DOCUMENT = 2000
# Words in capitals are left out: in the plays they are the names of speakers.
_LAST_WORD = re.compile(r"(?<= )([A-Za-z][a-z]{3,})(?=[.!?](?:\s|$))")
_SENTENCE_END = re.compile(r"[.!?]\s")


def last_word_documents(seed: int = SEED, **_: Any) -> dict[str, Any]:
    """Passages whose last word is to be predicted, as a data set with the split `test`.

    In the manner of LAMBADA (Paperno et al. 2016), with its human filter replaced by a mechanical
    one: the word occurs earlier in the passage but not in its last sentence.
    """
    return _data_set(last_words(_test_documents(), LAST_WORD_COUNT, seed))


def continuation_documents(seed: int = SEED, **_: Any) -> dict[str, Any]:
    """Contexts with four possible continuations, one of them true; split `test`."""
    return _data_set(continuations(_test_documents(), CONTINUATION_COUNT, seed))


def perplexity_documents(seed: int = SEED, **_: Any) -> dict[str, Any]:
    """Pages of held-out text, split `test`."""
    return _data_set(pages(_test_documents(), PERPLEXITY_COUNT, seed))


def last_words(documents: Sequence[Document], count: int, seed: int) -> list[dict[str, Any]]:
    """Records `{context, target, document}`; `target` is a space and one word.

    Raises:
        MissingDataError: If the documents do not hold that many such passages.
    """

    def draw(rng: random.Random) -> dict[str, Any] | None:
        document, position = _place(rng, documents, LAST_WORD_PASSAGE)
        match = _LAST_WORD.search(document.text, position, position + LAST_WORD_PASSAGE)
        if match is None or match.start() < LAST_WORD_PASSAGE:
            return None
        word = match.group(1)
        before = document.text[match.start() - LAST_WORD_PASSAGE : match.start() - 1]
        context = before[before.find(" ") + 1 :]
        ends = [end.end() for end in _SENTENCE_END.finditer(context)]
        if not ends:
            return None
        earlier, last_sentence = context[: ends[-1]], context[ends[-1] :]
        pattern = re.compile(rf"\b{word}\b")
        if not pattern.search(earlier) or pattern.search(last_sentence):
            return None
        return {"context": context, "target": f" {word}", "document": document.id}

    return _sample(draw, count, f"last_word {seed}", "context")


def continuations(documents: Sequence[Document], count: int, seed: int) -> list[dict[str, Any]]:
    """Records `{context, choices, gold, document}`.

    All choices have the same number of characters, begin with a space and end before one; the
    false ones come from other places of the same part of the corpus, so that neither length nor
    the author's style gives the answer away.

    Raises:
        MissingDataError: If the documents do not hold that many such places.
    """
    by_part: dict[str, list[Document]] = {}
    for document in documents:
        by_part.setdefault(document.part, []).append(document)

    def span(rng: random.Random, among: Sequence[Document]) -> tuple[Document, int] | None:
        document, position = _place(rng, among, CONTINUATION_CONTEXT + CONTINUATION_LENGTH + 1)
        start = document.text.find(" ", position + CONTINUATION_CONTEXT)
        end = start + CONTINUATION_LENGTH
        if start < 0 or document.text[end : end + 1] != " ":
            return None
        return document, start

    def draw(rng: random.Random) -> dict[str, Any] | None:
        true = span(rng, documents)
        if true is None:
            return None
        document, start = true
        texts = [document.text[start : start + CONTINUATION_LENGTH]]
        for _ in range(_ATTEMPTS_PER_DOCUMENT):
            other = span(rng, by_part[document.part])
            if other is None or _overlap(true, other):
                continue
            text = other[0].text[other[1] : other[1] + CONTINUATION_LENGTH]
            if text not in texts:
                texts.append(text)
            if len(texts) == CONTINUATION_CHOICES:
                break
        else:
            return None
        gold = rng.randrange(CONTINUATION_CHOICES)
        texts[0], texts[gold] = texts[gold], texts[0]
        context = document.text[start - CONTINUATION_CONTEXT : start]
        return {
            "context": context[context.find(" ") + 1 :],
            "choices": texts,
            "gold": gold,
            "document": document.id,
        }

    return _sample(draw, count, f"continuation {seed}", "context")


def pages(documents: Sequence[Document], count: int, seed: int) -> list[dict[str, Any]]:
    """Records `{page, document}`; a page starts after a blank or line break.

    Raises:
        MissingDataError: If the documents do not hold that many pages.
    """

    def draw(rng: random.Random) -> dict[str, Any] | None:
        document, position = _place(rng, documents, PERPLEXITY_PAGE + 100)
        match = re.compile(r"\s+").search(document.text, position, position + 100)
        if match is None:
            return None
        page = document.text[match.end() : match.end() + PERPLEXITY_PAGE]
        return {"page": page, "document": document.id}

    return _sample(draw, count, f"perplexity {seed}", "page")


def _overlap(a: tuple[Document, int], b: tuple[Document, int]) -> bool:
    reach = CONTINUATION_CONTEXT + 2 * CONTINUATION_LENGTH
    return a[0].id == b[0].id and abs(a[1] - b[1]) < reach


def _place(rng: random.Random, documents: Sequence[Document], room: int) -> tuple[Document, int]:
    """A document and a position with `room` characters after it, uniform over the text."""
    sizes = [max(0, len(document.text) - room) for document in documents]
    if not any(sizes):
        raise MissingDataError(f"no held-out document has more than {room} characters")
    document = rng.choices(documents, weights=sizes)[0]
    return document, rng.randrange(len(document.text) - room)


def _sample(
    draw: Callable[[random.Random], dict[str, Any] | None], count: int, seed: str, key: str
) -> list[dict[str, Any]]:
    """`count` records that differ in `key`, drawn until they are found."""
    rng = random.Random(seed)
    records: dict[str, dict[str, Any]] = {}
    for _ in range(_ATTEMPTS_PER_DOCUMENT * count):
        record = draw(rng)
        if record is not None:
            records.setdefault(record[key], record)
        if len(records) == count:
            return list(records.values())
    raise MissingDataError(
        f"the held-out documents hold only {len(records)} of {count} records for {seed!r}"
    )


@lru_cache(maxsize=1)
def _test_documents() -> tuple[Document, ...]:
    from ham.train.corpus import load_documents

    return tuple(load_documents("test"))


def _data_set(records: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(records)}
