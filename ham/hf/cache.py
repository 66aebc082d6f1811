"""The decoding memory of a padded batch: one `DecoderState` per real length.

Padding must never reach a recurrent state. So the rows of a batch are grouped by the number of
real tokens that they have read; each group has its own memory and is advanced by itself. A batch
without padding is one group; one of G different lengths costs G steps per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from ham.errors import ConfigError
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState
from ham.paging.budget import CacheBudget

Span = tuple[int, int]
"""First column of a row's real tokens, and their number."""


@dataclass
class RowGroup:
    """Rows of the batch that have read equally many tokens.

    Attributes:
        rows: Their numbers in the batch, in the order of the memory.
        state: Their decoding memory.
    """

    rows: list[int]
    state: DecoderState

    def split(self, parts: list[list[int]], model: DecoderLM) -> list[RowGroup]:
        """Groups of these rows, as long as nothing was read.

        Raises:
            ConfigError: If there is more than one part of a memory that is not empty.
        """
        if len(parts) == 1:
            return [self]
        if self.state.position:
            raise ConfigError(
                f"rows {self.rows} have read {self.state.position} tokens each and now get "
                "different numbers of tokens; legal: equally many, or a cache per row"
            )
        return [RowGroup(rows, model.init_state(len(rows))) for rows in parts]

    def keep(self, local: list[int], rows: list[int]) -> None:
        """Keep the members `local` (repeats allowed), which become the rows `rows`."""
        self.state.select(torch.tensor(local, dtype=torch.long, device=_device(self.state)))
        self.rows = rows


class HamCache(Cache):
    """What `generate` of transformers carries from step to step.

    Args:
        cache_bytes: Most bytes for the routed tokens of all layers and rows; by default what the
            device has. Reading more raises `CachePoolFullError`.

    Attributes:
        groups: The rows by real length; empty before the first token.
        columns: Columns of the batch read so far, padding included.
    """

    def __init__(self, cache_bytes: int | None = None) -> None:
        super().__init__(layers=[])
        self.budget = CacheBudget(cache_bytes)
        self.groups: list[RowGroup] = []
        self.columns = 0

    @torch.no_grad()
    def advance(self, model: DecoderLM, tokens_BT: Tensor, spans: list[Span]) -> Tensor:
        """Read the real tokens of the next T columns; `logits_BTV`, zero at padding.

        Raises:
            ConfigError: If the number of rows changed, rows that went together part, or a row
                exceeds the position range.
        """
        self._regroup(model, spans)
        for group in self.groups:
            self.budget.cover(group.state)
        self.columns += tokens_BT.shape[1]
        scattered = Scattered(tokens_BT)
        for group in self.groups:
            length = spans[group.rows[0]][1]
            if length:
                read_RT = scattered.gather(group.rows, spans)
                scattered.put(_read(model, read_RT, group.state))
        return scattered.logits(model)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, the same for every layer."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit of its own; the model has one."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `beam_idx[i]` become row i."""
        chosen = beam_idx.tolist()
        kept = []
        for group in self.groups:
            place = {row: index for index, row in enumerate(group.rows)}
            rows = [new for new, old in enumerate(chosen) if old in place]
            if rows:
                group.keep([place[chosen[row]] for row in rows], rows)
                kept.append(group)
        self.groups = kept

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens: a recurrent state cannot be rolled back.

        Raises:
            ConfigError: Unless nothing is to be removed.
        """
        if tokens_to_remove != 0:
            raise ConfigError(
                f"{tokens_to_remove} tokens cannot be removed from this decoding memory: "
                "a recurrent state does not roll back"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.groups = []
        self.columns = 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return sum(len(group.rows) for group in self.groups) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a batch has been read."""
        return bool(self.groups)

    @property
    def is_compileable(self) -> bool:
        """The memory grows, so no."""
        return False

    @property
    def is_croppable(self) -> bool:
        """A recurrent state does not roll back."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Not a constant-size memory only: `generate` must cut off what was read already."""
        return [False]

    def _regroup(self, model: DecoderLM, spans: list[Span]) -> None:
        """Split the groups so that in each all rows have equally many new tokens."""
        if not self.groups:
            self.groups = [
                RowGroup(rows, model.init_state(len(rows)))
                for rows in rows_by_length(range(len(spans)), spans)
            ]
            return
        if self.batch_size != len(spans):
            raise ConfigError(
                f"the cache holds {self.batch_size} sequences, input_ids has {len(spans)}"
            )
        self.groups = [
            part
            for group in self.groups
            for part in group.split(rows_by_length(group.rows, spans), model)
        ]


class Scattered:
    """Gathers the real tokens of some rows, and puts logits back to where the tokens stood."""

    def __init__(self, tokens_BT: Tensor) -> None:
        self.tokens_BT = tokens_BT
        self._where: tuple[Tensor, Tensor] | None = None
        self._logits_BTV: Tensor | None = None

    def gather(self, rows: list[int], spans: list[Span]) -> Tensor:
        """The real tokens of rows of equal length, `tokens_RT`."""
        device = self.tokens_BT.device
        first_R1 = torch.tensor([[spans[row][0]] for row in rows], device=device)
        columns_RT = first_R1 + torch.arange(spans[rows[0]][1], device=device)
        self._where = (torch.tensor(rows, device=device)[:, None], columns_RT)
        return self.tokens_BT[self._where]

    def put(self, logits_RTV: Tensor) -> None:
        """Store the logits of the tokens gathered last."""
        if self._logits_BTV is None:
            sizes = (*self.tokens_BT.shape, logits_RTV.shape[-1])
            self._logits_BTV = logits_RTV.new_zeros(sizes)
        self._logits_BTV[self._where] = logits_RTV

    def logits(self, model: DecoderLM) -> Tensor:
        """All logits, zero where no token stood."""
        if self._logits_BTV is None:
            sizes = (*self.tokens_BT.shape, model.config.vocabulary_size)
            return torch.zeros(sizes, device=model.device, dtype=model.embedding.weight.dtype)
        return self._logits_BTV


def rows_by_length(rows: Iterable[int], spans: list[Span]) -> list[list[int]]:
    """The rows in groups of equally many real tokens."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(spans[row][1], []).append(row)
    return list(groups.values())


def real_spans(mask_BT: Tensor) -> list[Span]:
    """Where the real tokens of each row stand, from an attention mask of ones and zeros.

    Raises:
        ConfigError: If a row has padding between real tokens.
    """
    real_BT = mask_BT != 0
    counts_B = real_BT.sum(dim=1)
    first_B = real_BT.int().argmax(dim=1)
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    end_B = first_B + counts_B
    inside_BT = (columns_T >= first_B[:, None]) & (columns_T < end_B[:, None])
    gaps = (inside_BT != real_BT).any(dim=1).nonzero().flatten().tolist()
    if gaps:
        raise ConfigError(
            f"attention_mask has padding between the tokens of row {gaps[0]}; "
            "legal: padding before or after them"
        )
    return list(zip(first_B.tolist(), counts_B.tolist(), strict=True))


def _read(model: DecoderLM, tokens_RT: Tensor, state: DecoderState) -> Tensor:
    if tokens_RT.shape[1] == 1:
        return model.step(tokens_RT[:, 0], state)[:, None]
    return model.prefill(tokens_RT, state).logits_BTV


def _device(state: DecoderState) -> torch.device:
    tensors = state.layers[0].tensors().values()
    return next(tensor.device for kind in tensors for tensor in kind)
