"""The fast tokenizers give the token numbers and texts of ours, before and after saving."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")

from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ham.hf import fast_tokenizer
from ham.hf.tokenization import byte_characters
from ham.train.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    ByteTokenizer,
    VocabularyTokenizer,
    load_tokenizer,
    train_bpe,
)

TEXTS = [
    "",
    " ",
    "The whale,  the\tsea\n\nand  the ship .",
    "naïve café — “quoted” … e\u0301",
    "汉字とかな 한국어 العربية עברית हिन्दी",
    "🐋👩‍👩‍👧‍👦 \u200b\ufeff\x00\x7f\xa0\xad",
    f"{END_OF_TEXT} inside {END_OF_TEXT}",
]


def with_begin_of_text() -> VocabularyTokenizer:
    """Like many tokenizers of the hub: encoding adds a special token unless told not to."""
    trained = train_bpe(TEXTS * 20, vocabulary_size=300)
    definition = Library.from_str(trained.definition)
    definition.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, trained.end_of_text)]
    )
    definition.enable_truncation(5)
    return VocabularyTokenizer("hub:example", definition.to_str())


@pytest.fixture(params=["byte", "bpe", "hub"])
def tokenizer(request):
    return {
        "byte": ByteTokenizer,
        "bpe": lambda: train_bpe(TEXTS * 20, vocabulary_size=300),
        "hub": with_begin_of_text,
    }[request.param]()


def test_same_numbers_and_same_text(tokenizer, tmp_path: Path) -> None:
    made = fast_tokenizer(tokenizer, 64)
    made.save_pretrained(tmp_path)
    for fast in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(fast) == tokenizer.vocabulary_size
        assert fast.eos_token_id == fast.pad_token_id == tokenizer.end_of_text
        assert fast.padding_side == "left" and fast.model_max_length == 64
        for text in TEXTS:
            numbers = tokenizer.encode(text)
            assert fast.encode(text) == fast(text)["input_ids"] == numbers, text
            assert fast.decode(numbers) == tokenizer.decode(numbers) == text
        ended = [*tokenizer.encode("a b"), tokenizer.end_of_text]
        assert fast.decode(ended) == f"a b{END_OF_TEXT}"
        assert fast.decode(ended, skip_special_tokens=True) == tokenizer.decode(ended) == "a b"


def test_our_loader_reads_the_saved_file(tokenizer, tmp_path: Path) -> None:
    fast_tokenizer(tokenizer, 64).save_pretrained(tmp_path)
    loaded = load_tokenizer(tokenizer.name, tmp_path)
    assert json.loads((tmp_path / TOKENIZER_FILE).read_text("utf-8"))["truncation"] is None
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert loaded.end_of_text == tokenizer.end_of_text


def test_bytes_that_are_no_text_decode_alike() -> None:
    fast, ours = fast_tokenizer(ByteTokenizer(), 64), ByteTokenizer()
    generator = random.Random(0)
    for _ in range(300):
        numbers = [generator.randrange(256) for _ in range(generator.randrange(1, 12))]
        assert fast.decode(numbers) == ours.decode(numbers), numbers


def test_every_byte_has_its_own_character() -> None:
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert characters[ord("A")] == "A" and characters[ord(" ")] == "Ġ" and characters[10] == "Ċ"
