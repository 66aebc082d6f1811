from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.inspect.classes import NEEDLE
from ham.inspect.sample import sample_text
from ham.inspect.text import read_text, shown, tokenise
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.tasks import needle_spans
from ham.train.shards import ShardWriter
from ham.train.tokenizer import ByteTokenizer, VocabularyTokenizer, train_bpe

BYTES = ByteTokenizer()
MIXED = "a é\t€\n🙂\x00\u200b."


@pytest.fixture(scope="module")
def bpe() -> VocabularyTokenizer:
    return train_bpe(["the whale and the ship and the sea " * 20], vocabulary_size=280)


def test_bytes_of_one_character_are_one_piece():
    tokens = tokenise(MIXED, BYTES, 100)
    assert "".join(piece.text for piece in tokens.pieces) == MIXED
    assert [piece.end - piece.start for piece in tokens.pieces] == [1, 1, 2, 1, 3, 1, 4, 1, 3, 1]
    assert tokens.pieces[0].start == 0
    assert tokens.pieces[-1].end == len(tokens.ids) == len(tokens.classes_T)
    assert tokens.note == ""


@pytest.mark.parametrize("text", [MIXED, "the whale 🙂 and\r\n\r\nthe seé"])
def test_pieces_of_a_vocabulary_hold_every_token_and_character(bpe: VocabularyTokenizer, text: str):
    tokens = tokenise(text, bpe, 100)
    assert tokens.ids == bpe.encode(text)
    assert "".join(piece.text for piece in tokens.pieces) == text
    bounds = [0, *(piece.end for piece in tokens.pieces)]
    assert bounds[:-1] == [piece.start for piece in tokens.pieces]
    assert bounds[-1] == len(tokens.ids)


@pytest.mark.parametrize(("limit", "kept"), [(1, "a"), (3, "a "), (4, "a é"), (7, "a é\t")])
def test_a_cut_never_splits_a_character(limit: int, kept: str):
    tokens = tokenise(MIXED, BYTES, limit)
    assert tokens.text == kept
    assert tokens.note == f"cut after the first {len(kept.encode())} tokens of 18"


def test_a_first_character_longer_than_the_limit_stays_whole():
    assert tokenise("🙂 ok", BYTES, 1).text == "🙂"


def test_invisible_characters_are_shown():
    assert shown(MIXED) == "a é⇥\t€↵\n🙂␀⟨U+200B⟩."
    assert shown("e\u0301") == "e◌\u0301"


def test_needles_are_found_by_name_and_by_form():
    essays = Essays(np.frombuffer(b"hay " * 100, dtype=np.uint8))
    sample = RulerGenerator(BYTES, essays).sample("niah_single_2", np.random.default_rng(0), 600)
    text = BYTES.decode(sample.tokens)
    # The sentence without the space before it.
    ((start, end),) = sample.needles
    assert needle_spans(text) == [(start + 1, end)]
    tokens = tokenise(text, BYTES, 600, needles=["quiz you"])
    named = {at + shift for at in _all(text, "quiz you") for shift in range(8)}
    expected = set(range(start + 1, end)) | named
    assert set(np.flatnonzero(tokens.classes_T == NEEDLE)) == expected


def _all(text: str, part: str) -> list[int]:
    return [at for at in range(len(text)) if text.startswith(part, at)]


@pytest.mark.parametrize("needle", ["absent", ""])
def test_a_needle_that_is_not_there(needle: str):
    with pytest.raises(ConfigError, match=f"--needle '{needle}' does not occur"):
        tokenise("some text", BYTES, 100, needles=[needle])


def test_reading_a_file(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo")
    assert read_text(path, 100) == ("one\r\ntwo", "")
    path.write_bytes("é".encode() * 100)
    text, of_what = read_text(path, 10)
    assert text == "é" * 80
    assert of_what == "of 200 bytes of the file"
    # 160 bytes are read: 53 whole characters and a byte of the next.
    path.write_bytes("€".encode() * 100)
    assert read_text(path, 10) == ("€" * 53, "of 300 bytes of the file")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, MissingDataError, "is not a file"),
        (b"", ConfigError, "holds no text"),
        (b"ok \xff no", ConfigError, "is not UTF-8 text: byte 3 is 0xff"),
        (b"ok \xe2\x82", ConfigError, "is not UTF-8 text: byte 3 is 0xe2"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, error: type, message: str):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_text(path, 100)


def write_test_shard(path: Path, text: str) -> None:
    with ShardWriter(path, BYTES) as writer:
        writer.add(np.frombuffer(text.encode(), dtype=np.uint8), len(text.encode()))


def test_the_sample_is_whole_sentences_and_one_needle(tmp_path: Path):
    shard = tmp_path / "test.tokens"
    write_test_shard(shard, "Title\n\n" + "A sentence, naïve and long. \n\n" * 200)
    text = sample_text(shard, BYTES)
    assert text == sample_text(shard, BYTES)
    assert text.startswith("A sentence")
    assert "\ufffd" not in text
    assert len(needle_spans(text)) == 1
    stretch = text[: needle_spans(text)[0][0]]
    assert 1200 <= len(stretch) < 2000


def test_a_shard_of_another_tokenizer(tmp_path: Path, bpe: VocabularyTokenizer):
    shard = tmp_path / "test.tokens"
    write_test_shard(shard, "text")
    with pytest.raises(ConfigError, match=r"was made with tokenizer 'byte' \(257 tokens\)"):
        sample_text(shard, bpe)
    shard.write_bytes(b"")
    with pytest.raises(CorruptFileError):
        sample_text(shard, BYTES)
