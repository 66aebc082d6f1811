"""The decoding memory of a model of another library: its own cache objects, and their real bytes.

A cache is one batch of sequences that have read equally many tokens, since that is the only
reading that every kind of model (positions, windows, recurrent states) agrees on. Sequences that
stand at different positions lie in different caches, and a step advances each cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from ham.model.positions import Positions

# Parts of attribute names by kind, the first that fits; fla keeps keys under `state.attn_state`.
_KINDS = (
    ("conv", ("conv",)),
    ("kv", ("attn", "key", "value")),
)
_REST = "recurrent"
UNUSED = "unused"
"""Bytes of buffers that a cache keeps alive and no longer reads, e.g. behind a window."""

Advance = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""`(tokens_BT, cache) -> (logits_BTV, cache)`."""


@dataclass(eq=False)
class CachePart:
    """One cache of the library.

    Attributes:
        rows: Sequences in it, whether they are still wanted or not.
        cache: The object; None before the first token.
    """

    rows: int
    cache: Any = None


@dataclass(eq=False)
class ExternalState:
    """The decoding memory of a batch of sequences.

    Attributes:
        places: Of each sequence, the cache that holds it and its row there.
        positions: How far each sequence has been read.
        layers: None of its layers can tell what it keeps.
    """

    places: list[tuple[CachePart, int]]
    positions: Positions
    layers: Sequence[Any] = field(default=())

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> Self:
        """Memory of sequences that nobody has read yet."""
        part = CachePart(batch_size)
        return cls([(part, row) for row in range(batch_size)], Positions.zeros(batch_size, device))

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`, which stay as they are."""
        copies = [copy.deepcopy(state.places) for state in states]
        positions = Positions.join([state.positions for state in states])
        return cls([place for places in copies for place in places], positions)

    @property
    def position(self) -> int | Tensor:
        """Tokens read: an int while all sequences agree, else int64 `[B]`."""
        return self.positions.value

    @property
    def longest(self) -> int:
        """Tokens read of the longest sequence."""
        return self.positions.longest

    @property
    def parts(self) -> list[CachePart]:
        """The caches, each once."""
        return list({id(part): part for part, _ in self.places}.values())

    def bytes_allocated(self) -> dict[str, int]:
        """Allocated bytes by kind, counted on the tensors of the caches.

        A cache keeps the rows of sequences that have left until the last of its sequences leaves.
        """
        total: dict[str, int] = {}
        for part in self.parts:
            for kind, count in cache_bytes(part.cache).items():
                total[kind] = total.get(kind, 0) + count
        return total

    def select(self, index_B: Tensor) -> None:
        """Keep only the sequences `index_B`, in that order.

        Raises:
            ValueError: If one is named twice: both would continue one memory.
        """
        index = index_B.tolist()
        if len(set(index)) != len(index):
            raise ValueError(f"sequences {index} are not different")
        self.places = [self.places[row] for row in index]
        self.positions.select(index_B)

    def advance(self, tokens_BT: Tensor, read: Advance) -> Tensor:
        """Read tokens of every sequence; returns what `read` makes of them, one row each."""
        part = self.places[0][0]
        if self.places == [(part, row) for row in range(part.rows)]:
            logits_BTV, part.cache = read(tokens_BT, part.cache)
        else:
            logits_BTV = self._advance_each(tokens_BT, read)
        self.positions.advance(tokens_BT.shape[1])
        return logits_BTV

    def _advance_each(self, tokens_BT: Tensor, read: Advance) -> Tensor:
        rows: list[Tensor | None] = [None] * len(self.places)
        for part in self.parts:
            members = [index for index, (owner, _) in enumerate(self.places) if owner is part]
            inside = [self.places[index][1] for index in members]
            # Rows that nobody wants any more read token 0.
            fed_BT = tokens_BT.new_zeros(part.rows, tokens_BT.shape[1])
            fed_BT[inside] = tokens_BT[members]
            logits_BTV, part.cache = read(fed_BT, part.cache)
            for index, row in zip(members, inside, strict=True):
                rows[index] = logits_BTV[row]
        return torch.stack(rows)


def cache_bytes(cache: Any) -> dict[str, int]:
    """Bytes of all tensors of a cache object by kind.

    Tensors of integers are `positions`. The kind of another one is told by the names of the
    attributes that lead to it: `conv`, `kv`, else `recurrent`. `unused` is what the buffers behind
    all of them take beyond them.
    """
    total: dict[str, int] = {}
    buffers: dict[int, int] = {}
    for kind, tensor in cache_tensors(cache):
        total[kind] = total.get(kind, 0) + tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        buffers[storage._cdata] = storage.nbytes()
    unused = sum(buffers.values()) - sum(total.values())
    return {**total, UNUSED: unused} if unused > 0 else total


def cache_tensors(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """Kind and tensor of everything that a cache object holds, each tensor once."""
    yield from _walk(cache, "", set())


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if value is None or isinstance(value, str | bytes | int | float | nn.Module | type):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield _kind(name) if value.is_floating_point() else "positions", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f"{name}.{key}", seen)
    elif isinstance(value, Sequence | set | frozenset):
        for inner in value:
            yield from _walk(inner, name, seen)
    else:
        for key, inner in getattr(value, "__dict__", {}).items():
            yield from _walk(inner, f"{name}.{key}", seen)


def _kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in _KINDS if any(one in lowered for one in parts)), _REST)
