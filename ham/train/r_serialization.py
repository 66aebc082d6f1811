"""Reads character vectors out of R's lazy-load data base without R.

A lazy-load data base is a pair of files. `NAME.rdx` is a compressed serialised list whose element
`variables` maps a name to the offset and length of its record in `NAME.rdb`. A record is the
uncompressed length (4 bytes, big-endian) followed by a zlib stream that holds one serialised value.
The serialisation is described in "R Internals", section 1.8 ("Serialization Formats"); this module
reads its XDR form (`X\\n`, versions 2 and 3) for the types that plain data sets use.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from typing import Any

from ham.errors import CorruptFileError

_SYMBOL, _PAIRLIST, _CHAR, _LOGICAL, _INTEGER, _STRINGS, _LIST = 1, 2, 9, 10, 13, 16, 19
_REFERENCE, _NIL = 255, 254
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10


def read_lazy_load(index: bytes, records: bytes) -> dict[str, Any]:
    """The variables of a lazy-load data base.

    Args:
        index: Content of the `.rdx` file.
        records: Content of the `.rdb` file.

    Raises:
        CorruptFileError: If either is not what the format says.
    """
    try:
        spans = read_value(gzip.decompress(index))["variables"]
        return {
            name: read_value(zlib.decompress(records[offset + 4 : offset + length]))
            for name, (offset, length) in spans.items()
        }
    except (OSError, EOFError, zlib.error, struct.error, LookupError, TypeError) as error:
        raise CorruptFileError(f"not an R lazy-load data base: {error}") from error


def read_value(stream: bytes) -> Any:
    """One serialised R value: named lists as dictionaries, vectors as Python lists."""
    if stream[:2] != b"X\n":
        raise CorruptFileError(f"not an XDR serialisation of R: starts with {stream[:2]!r}")
    reader = _Reader(stream)
    version, _, _ = reader.integers(3)
    if version == 3:
        reader.take(reader.integers(1)[0])
    elif version != 2:
        raise CorruptFileError(f"R serialisation version {version} is not 2 or 3")
    return reader.item()


class _Reader:
    def __init__(self, stream: bytes):
        self.stream = stream
        self.position = 2
        self.symbols: list[str] = []

    def take(self, count: int) -> bytes:
        piece = self.stream[self.position : self.position + count]
        if len(piece) != count:
            raise CorruptFileError("the R serialisation ends in the middle of a value")
        self.position += count
        return piece

    def integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self.take(4 * count)))

    def item(self) -> Any:
        (flags,) = self.integers(1)
        kind = flags & 0xFF
        if kind == _NIL:
            return None
        if kind == _REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == _CHAR:
            (length,) = self.integers(1)
            return None if length < 0 else self.take(length).decode("utf-8")
        if kind == _PAIRLIST:
            return self._pairlist(flags)
        values = self._vector(kind)
        attributes = self.item() if flags & _HAS_ATTRIBUTES else None
        names = (attributes or {}).get("names")
        return dict(zip(names, values, strict=True)) if names else values

    def _vector(self, kind: int) -> list:
        (length,) = self.integers(1)
        if kind in (_INTEGER, _LOGICAL):
            return self.integers(length)
        if kind in (_STRINGS, _LIST):
            return [self.item() for _ in range(length)]
        raise CorruptFileError(f"R value of type {kind} is not supported")

    def _pairlist(self, flags: int) -> dict[str, Any]:
        pairs = {}
        while flags & 0xFF == _PAIRLIST:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else ""
            pairs[tag] = self.item()
            (flags,) = self.integers(1)
        return pairs
