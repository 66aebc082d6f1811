"""Token shards: what was written is what is read, or a clear error."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from ham.errors import CorruptFileError, DiskFullError, MissingDataError
from ham.files import read_json, write_json
from ham.train.shards import ShardWriter, TokenShard, header_path, offsets_path, token_dtype
from ham.train.tokenizer import ByteTokenizer

TEXTS = ["first document", "", "žluťoučký kůň", "last"]


@pytest.fixture
def shard_path(tmp_path):
    path = tmp_path / "train.tokens"
    write(path, TEXTS)
    return path


def write(path, texts) -> None:
    tokenizer = ByteTokenizer()
    with ShardWriter(path, tokenizer) as writer:
        for text, tokens in zip(texts, tokenizer.encode_documents(texts), strict=True):
            writer.add(tokens, len(text.encode()))


def test_round_trip(shard_path) -> None:
    shard = TokenShard.open(shard_path)
    tokenizer = ByteTokenizer()
    assert isinstance(shard.tokens, np.memmap)
    assert shard.tokens.dtype == np.uint16
    assert [tokenizer.decode(tokens) for tokens in shard.documents()] == TEXTS
    assert shard.byte_count == sum(len(text.encode()) for text in TEXTS)
    assert shard.document_offsets.tolist() == [0, 15, 16, 36, 41]
    assert shard.tokens[shard.document_offsets[1:] - 1].tolist() == [256] * 4
    assert (shard.tokenizer_name, shard.vocabulary_size, shard.end_of_text) == ("byte", 257, 256)
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 1


def test_empty_shard(tmp_path) -> None:
    write(tmp_path / "empty.tokens", [])
    shard = TokenShard.open(tmp_path / "empty.tokens")
    assert len(shard.tokens) == 0
    assert list(shard.documents()) == []


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(257) == np.uint16
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["tokens", "offsets"])
def test_truncation_is_always_detected(shard_path, name, verify) -> None:
    path = shard_path.with_suffix(f".{name}")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptFileError, match=rf"train\.{name} is truncated: \d+ bytes, .* \d+"):
        TokenShard.open(shard_path, verify=verify)


def test_a_longer_file_is_refused(shard_path) -> None:
    shard_path.write_bytes(shard_path.read_bytes() + b"\0\0")
    with pytest.raises(CorruptFileError, match=r"train\.tokens is too long"):
        TokenShard.open(shard_path, verify=False)


@pytest.mark.parametrize("name", ["tokens", "offsets"])
def test_changed_content_is_detected_on_verification(shard_path, name) -> None:
    path = shard_path.with_suffix(f".{name}")
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    TokenShard.open(shard_path, verify=False)
    with pytest.raises(CorruptFileError, match=rf"train\.{name} was changed"):
        TokenShard.open(shard_path)


@pytest.mark.parametrize("missing", [".tokens", ".offsets", ".json"])
def test_missing_files_are_named(shard_path, missing) -> None:
    shard_path.with_suffix(missing).unlink()
    with pytest.raises(MissingDataError, match=rf"train\{missing} does not exist"):
        TokenShard.open(shard_path)


def test_a_damaged_header_is_refused(shard_path) -> None:
    header = read_json(header_path(shard_path))
    del header["documents"]
    write_json(header_path(shard_path), header)
    with pytest.raises(CorruptFileError, match=r"train\.json is not a shard header: 'documents'"):
        TokenShard.open(shard_path)
    header_path(shard_path).write_text("{")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        TokenShard.open(shard_path)


def test_a_failure_while_writing_leaves_the_old_shard(shard_path) -> None:
    def fail() -> None:
        with ShardWriter(shard_path, ByteTokenizer()) as writer:
            writer.add(np.arange(10, dtype=np.uint8), 10)
            raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(DiskFullError, match=r"no space left .*train\.tokens"):
        fail()
    assert len(list(TokenShard.open(shard_path).documents())) == len(TEXTS)
    names = {path.name for path in shard_path.parent.iterdir()}
    assert names == {shard_path.name, offsets_path(shard_path).name, header_path(shard_path).name}
