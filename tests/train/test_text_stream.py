"""Text that comes token by token is the text of all tokens, and never half a character."""

from __future__ import annotations

import random

import pytest

from ham.train.text_stream import REPLACEMENT, TextStream
from ham.train.tokenizer import ByteTokenizer, train_bpe

TEXT = "naïve — “quoted” 漢字 and 🙂🏽‍🚀, the end\n"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "bpe": train_bpe(["the whale — “and” the sea 漢字 🙂 " * 20], vocabulary_size=290),
}


def pieces_of(tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_whole_characters(name) -> None:
    tokenizer = TOKENIZERS[name]
    pieces = pieces_of(tokenizer, [*tokenizer.encode(TEXT), tokenizer.end_of_text])
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[0] == "n", "a token that is whole is shown at once"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokens_give_the_text_of_all(name) -> None:
    tokenizer = TOKENIZERS[name]
    numbers = random.Random(0)
    # Bytes that begin, continue or break characters, and everything else now and then.
    candidates = [*range(0xC0, 0x100), *range(0x80, 0xC0), 65, 66, tokenizer.end_of_text]
    for _ in range(300):
        pool = candidates if numbers.random() < 0.7 else range(tokenizer.vocabulary_size)
        tokens = [numbers.choice(list(pool)) for _ in range(12)]
        assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)
