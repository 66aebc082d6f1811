"""Tokenizers: lossless, deterministic, and honest about bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.train.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    VocabularyTokenizer,
    load_tokenizer,
    train_bpe,
)

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money",
    "In the beginning God created the heaven and the earth.\n\nAnd the earth was without form.",
] * 4
HARD_TEXTS = ["", " ", "\n\n  a\tb ", "æther—“naïve” ϰητος 鯨 🐋", f"a {END_OF_TEXT} b", "4829173"]


@pytest.fixture(scope="module")
def bpe() -> VocabularyTokenizer:
    return train_bpe(TEXTS, vocabulary_size=300)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else bpe


@pytest.mark.parametrize("text", [*HARD_TEXTS, *TEXTS[:3]])
def test_encoding_is_lossless_and_counts_bytes(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert tokenizer.count_bytes(np.array(ids, dtype=np.uint16)) == len(text.encode())
    assert tokenizer.end_of_text not in ids
    assert all(0 <= token < tokenizer.vocabulary_size for token in ids)


def test_bytes_of_parts_add_up(tokenizer) -> None:
    ids = tokenizer.encode("naïve 鯨—whale")
    for cut in range(len(ids) + 1):
        parts = tokenizer.count_bytes(ids[:cut]) + tokenizer.count_bytes(ids[cut:])
        assert parts == len("naïve 鯨—whale".encode())


def test_the_end_of_a_text_stands_for_nothing(tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.end_of_text, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"
    assert tokenizer.count_bytes(ids) == 6


def test_documents_are_encoded_as_one_by_one(tokenizer) -> None:
    arrays = tokenizer.encode_documents(HARD_TEXTS)
    assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in HARD_TEXTS]


def test_byte_tokenizer_numbers() -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.vocabulary_size == 257
    assert tokenizer.end_of_text == 256
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    with pytest.raises(ValueError, match=r"0\.\.256, received \[300\]"):
        tokenizer.decode([300])


def test_bpe_training_is_deterministic_and_merges(bpe) -> None:
    again = train_bpe(reversed(TEXTS), vocabulary_size=300)
    assert again.definition == bpe.definition
    assert bpe.vocabulary_size == 300
    assert len(bpe.encode(TEXTS[0])) < 0.9 * len(TEXTS[0])


def test_saved_tokenizer_loads(bpe, tmp_path) -> None:
    bpe.save(tmp_path)
    for name in ("bpe-4096", "hub:any/name"):
        loaded = load_tokenizer(name, tmp_path)
        assert loaded.name == name
        assert loaded.encode(TEXTS[1]) == bpe.encode(TEXTS[1])
        assert loaded.end_of_text == bpe.end_of_text
    ByteTokenizer().save(tmp_path / "none")
    assert load_tokenizer("byte", tmp_path / "none").name == "byte"


def test_truncation_of_a_hub_tokenizer_is_ignored(bpe) -> None:
    definition = json.loads(bpe.definition)
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    cut = VocabularyTokenizer("hub:cut", json.dumps(definition))
    assert cut.encode(TEXTS[0]) == bpe.encode(TEXTS[0])


def test_unknown_and_missing_tokenizers(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"'words'; known: bpe-4096, byte, hub:NAME"):
        load_tokenizer("words")
    with pytest.raises(MissingDataError, match=r"trained by `ham prepare`.*tokenizer\.json"):
        load_tokenizer("bpe-4096", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingDataError, match="cannot get tokenizer 'no/such'"):
        load_tokenizer("hub:no/such", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 1}'])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content) -> None:
    (tmp_path / TOKENIZER_FILE).write_text(content)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer("bpe-4096", tmp_path)


def test_a_tokenizer_without_an_end_is_refused(bpe) -> None:
    definition = bpe.definition.replace(END_OF_TEXT, "<|other|>")
    with pytest.raises(ConfigError, match=r"no end-of-text token; looked for <\|endoftext\|>"):
        VocabularyTokenizer("hub:no-end", definition)
