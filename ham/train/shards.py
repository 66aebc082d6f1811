"""Token shards: one split of the data as a memory-mapped stream of token numbers.

Three files a split, all little-endian and without padding:

- `NAME.tokens`: the token numbers of all documents, each closed by the end-of-text token; uint16,
  or uint32 where the vocabulary has more than 65,536 tokens;
- `NAME.offsets`: int64, where each document begins, and the number of tokens as the last entry;
- `NAME.json`: the header with counts, sizes and SHA-256 of the other two. It is written last, so a
  shard whose header is there was written to its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import atomic_writer, read_json, sha256_file, write_json
from ham.train.tokenizer import Tokenizer

FORMAT = 1
_COUNTED_AT_ONCE = 1 << 24


def header_path(path: Path) -> Path:
    """The header of a shard."""
    return path.with_suffix(".json")


def offsets_path(path: Path) -> Path:
    """The document offsets of a shard."""
    return path.with_suffix(".offsets")


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest dtype of a shard that holds every token of a vocabulary."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, eq=False)
class TokenShard:
    """An opened shard.

    Attributes:
        tokens: Read-only memory map of the whole stream, uint16 or uint32.
        document_offsets: Int64, D + 1 entries; document i is
            `tokens[document_offsets[i] : document_offsets[i + 1]]`, its end-of-text token included.
        byte_count: UTF-8 bytes of all documents.
        tokenizer_name: Tokenizer that made it.
        vocabulary_size: Of that tokenizer.
        end_of_text: Token that closes every document.
        sha256: Of the `.tokens` file.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    byte_count: int
    tokenizer_name: str
    vocabulary_size: int
    end_of_text: int
    sha256: str

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = True) -> TokenShard:
        """Open `NAME.tokens`.

        Args:
            path: The `.tokens` file.
            verify: Also compare the SHA-256 (reads the whole file). Sizes are always compared.

        Raises:
            MissingDataError: If a file of the shard is missing.
            CorruptFileError: If one is truncated or changed.
        """
        path = Path(path)
        header = read_json(header_path(path))
        try:
            dtype = np.dtype(header["dtype"])
            token_bytes = header["tokens"] * dtype.itemsize
            offset_bytes = (header["documents"] + 1) * 8
            _check_file(path, token_bytes, header["sha256"], verify)
            _check_file(offsets_path(path), offset_bytes, header["offsets_sha256"], verify)
            return cls(
                tokens=_memory_map(path, dtype),
                document_offsets=_memory_map(offsets_path(path), np.dtype("<i8")),
                byte_count=header["bytes"],
                tokenizer_name=header["tokenizer"],
                vocabulary_size=header["vocabulary_size"],
                end_of_text=header["end_of_text"],
                sha256=header["sha256"],
            )
        except (KeyError, TypeError) as error:
            raise CorruptFileError(f"{header_path(path)} is not a shard header: {error}") from error

    def count_tokens(self) -> np.ndarray:
        """How often each token id occurs: int64, `vocabulary_size` entries."""
        counts = np.zeros(self.vocabulary_size, dtype=np.int64)
        for start in range(0, len(self.tokens), _COUNTED_AT_ONCE):
            part = self.tokens[start : start + _COUNTED_AT_ONCE]
            counts += np.bincount(part, minlength=self.vocabulary_size)
        return counts

    def even_windows(self, length: int, count: int) -> np.ndarray:
        """Windows at equal distances over the stream: each document gives its share of tokens.

        Windows drawn at random leave the share of every kind of text to chance, and with it the
        thresholds that are set on them.

        Args:
            length: Tokens T of a window.
            count: Windows N; fewer come where so many would overlap.

        Returns:
            Int64 `[N, T]`, in the order of the stream.

        Raises:
            ConfigError: If the stream is shorter than one window.
        """
        total = len(self.tokens)
        if total < length:
            raise ConfigError(
                f"a window of {length} tokens needs a shard of at least as many, it has {total}"
            )
        count = min(count, total // length)
        # In the middle of each of `count` equal parts.
        starts = ((2 * np.arange(count) + 1) * total // count - length) // 2
        windows = [self.tokens[start : start + length] for start in starts.tolist()]
        return np.stack(windows).astype(np.int64)

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document, a view without the end-of-text token."""
        for start, end in zip(self.document_offsets[:-1], self.document_offsets[1:], strict=True):
            yield self.tokens[start : end - 1]


class ShardWriter:
    """Writes a shard document by document; use as a context manager.

    Nothing appears under the final names until the block ends without an error; then tokens and
    offsets are renamed into place and the header follows.

    Args:
        path: The `.tokens` file.
        tokenizer: The tokenizer that the documents were encoded with.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer):
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocabulary_size)
        self.offsets = array("q", [0])
        self.byte_count = 0
        self._hash = hashlib.sha256()
        self._stack = contextlib.ExitStack()

    @property
    def token_count(self) -> int:
        """Tokens written so far."""
        return self.offsets[-1]

    def __enter__(self) -> ShardWriter:
        self._handle = self._stack.enter_context(atomic_writer(self.path, "wb"))
        return self

    def add(self, tokens: np.ndarray, byte_count: int) -> None:
        """Append one document of `byte_count` UTF-8 bytes; the end-of-text token is added here."""
        stream = np.empty(len(tokens) + 1, dtype=self.dtype)
        stream[:-1] = tokens
        stream[-1] = self.tokenizer.end_of_text
        data = stream.tobytes()
        self._handle.write(data)
        self._hash.update(data)
        self.offsets.append(self.offsets[-1] + len(stream))
        self.byte_count += byte_count

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            self._finish()

    def header(self) -> dict[str, Any]:
        """What the header file says."""
        offsets = np.asarray(self.offsets, dtype="<i8").tobytes()
        return {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "tokens": self.token_count,
            "documents": len(self.offsets) - 1,
            "bytes": self.byte_count,
            "sha256": self._hash.hexdigest(),
            "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
            "tokenizer": self.tokenizer.name,
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "end_of_text": self.tokenizer.end_of_text,
        }

    def _finish(self) -> None:
        with atomic_writer(offsets_path(self.path), "wb") as handle:
            handle.write(np.asarray(self.offsets, dtype="<i8").tobytes())
        write_json(header_path(self.path), self.header())


def _check_file(path: Path, size: int, sha256: str, verify: bool) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise MissingDataError(f"{path} does not exist; run `ham prepare`") from error
    if found != size:
        state = "truncated" if found < size else "too long"
        raise CorruptFileError(
            f"{path} is {state}: {found} bytes, its header says {size}; run `ham prepare` again"
        )
    if verify and sha256_file(path) != sha256:
        raise CorruptFileError(
            f"{path} was changed: its sha256 is not the one in its header; run `ham prepare` again"
        )


def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
