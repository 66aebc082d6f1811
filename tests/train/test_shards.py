"""Token shards: what was written is what is read, or a clear error."""

from __future__ import annotations

import errno
import itertools

import numpy as np
import pytest

from ham.errors import ConfigError, CorruptFileError, DiskFullError, MissingDataError
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


def numbered(path, count: int) -> TokenShard:
    """A shard whose tokens are 0, 1, 2, ... modulo 251, its end-of-text token last."""
    with ShardWriter(path, ByteTokenizer()) as writer:
        writer.add(np.arange(count - 1) % 251, count - 1)
    return TokenShard.open(path)


def starts(shard: TokenShard, length: int, count: int) -> list[int]:
    windows_NT = shard.even_windows(length, count)
    assert windows_NT.dtype == np.int64 and windows_NT.shape[1] == length
    everywhere = np.lib.stride_tricks.sliding_window_view(np.asarray(shard.tokens), length)
    return [
        int(np.flatnonzero((everywhere == window).all(axis=1))[0]) for window in windows_NT.tolist()
    ]


def test_even_windows_stand_in_the_middle_of_equal_parts(tmp_path) -> None:
    shard = numbered(tmp_path / "text.tokens", 240)
    assert starts(shard, 20, 4) == [20, 80, 140, 200]
    assert starts(shard, 20, 1) == [110]


@pytest.mark.parametrize("total", [200, 209, 219, 239])
def test_even_windows_never_overlap_and_stay_inside(tmp_path, total) -> None:
    shard = numbered(tmp_path / "text.tokens", total)
    for count in (7, 10, 1000):
        found = starts(shard, 20, count)
        assert len(found) == min(count, total // 20)
        assert found[0] >= 0 and found[-1] + 20 <= total
        assert all(second - first >= 20 for first, second in itertools.pairwise(found))


def test_each_document_gives_its_share_of_even_windows(tmp_path) -> None:
    sizes = [4_000, 1_000, 3_000, 2_000]
    with ShardWriter(tmp_path / "text.tokens", ByteTokenizer()) as writer:
        for number, size in enumerate(sizes):
            writer.add(np.full(size - 1, number), size - 1)
    windows_NT = TokenShard.open(tmp_path / "text.tokens").even_windows(10, 100)
    found = [int((windows_NT[:, 5] == number).sum()) for number in range(len(sizes))]
    assert found == [40, 10, 30, 20]


def test_even_windows_longer_than_the_text_are_refused(tmp_path) -> None:
    shard = numbered(tmp_path / "text.tokens", 30)
    with pytest.raises(ConfigError, match=r"a window of 31 tokens needs .* it has 30"):
        shard.even_windows(31, 1)
