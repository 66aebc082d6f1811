"""Teacher-forced scores of token sequences: the one forward loop behind every evaluation.

Rows are sorted by length and right-padded within a batch. All models are causal and every row
starts from an empty memory, so what follows a token cannot change its score; padding comes last
and is left out of every statistic. A test compares rows scored alone with rows scored in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ham.model.decoder import DecoderOutput
    from ham.model.language_model import LanguageModel

PADDING = 0
BATCH_TOKENS = 2048
"""Tokens per forward pass on a CPU, where larger batches only leave its caches (measured)."""

_LONGEST_TO_SHORTEST = 1.25
_LOGITS_AT_ONCE = 1 << 26

OnBatch = Callable[[int, int], None]


@dataclass
class RoutingCount:
    """How many of the tokens read were routed to the KV cache, padding excluded.

    Attributes:
        tokens: Tokens read.
        routed: Routed tokens by layer; only layers that route by choice. Where every head decides
            alone, a token counts by the share of heads that keep it.
    """

    tokens: int = 0
    routed: dict[int, float] = field(default_factory=dict)

    def add(self, output: DecoderOutput, times_BT: torch.Tensor) -> None:
        """Count one batch.

        Args:
            output: What the model gave.
            times_BT: How often each token counts, integer or boolean: 0 on padding, more than 1
                where several rows share what was read once.
        """
        self.tokens += int(times_BT.sum())
        for layer, aux in enumerate(output.aux):
            share_BT = aux.kept_share_BT()
            if share_BT is not None:
                count = float((share_BT * times_BT).double().sum())
                self.routed[layer] = self.routed.get(layer, 0.0) + count

    def per_layer(self) -> dict[int, float]:
        """Realised share of routed tokens by layer; empty where nothing is routed by choice."""
        return {layer: count / self.tokens for layer, count in self.routed.items()}

    def fraction(self) -> float | None:
        """Mean over the layers that route; None if none does."""
        if not self.routed:
            return None
        return sum(self.per_layer().values()) / len(self.routed)


@dataclass(frozen=True)
class RowScore:
    """Scores of one row of n tokens; entry i is about token i + 1, given tokens 0..i.

    Attributes:
        nats: Float64 negative log-likelihoods, length n - 1.
        greedy: Whether that token has the highest logit, length n - 1.
        routed: Float64 `(layers that route, n - 1)`: the share of the layer's caches that keep
            token i (0 or 1 where heads share one), or None when not asked for or nothing routes.
    """

    nats: np.ndarray
    greedy: np.ndarray
    routed: np.ndarray | None = None

    def span(self, start: int, end: int) -> tuple[float, bool]:
        """Log-likelihood of tokens `[start, end)` and whether greedy decoding gives all of them."""
        part = slice(start - 1, end - 1)
        return -float(self.nats[part].sum()), bool(self.greedy[part].all())


def score_rows(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    batch_tokens: int = BATCH_TOKENS,
    routing: RoutingCount | None = None,
    keep_routed: bool = False,
    on_batch: OnBatch | None = None,
) -> list[RowScore]:
    """Score every token of every row but its first.

    Args:
        model: Put into evaluation mode for the call.
        rows: Token ids; at least two, at most `max_positions + 1` in a row.
        batch_tokens: Upper bound of tokens per forward pass, padding included; a longer row
            is read alone.
        routing: Counts routed tokens here.
        keep_routed: Whether to return which tokens were routed.
        on_batch: Called after each forward pass with the rows done and the rows in all.

    Returns:
        One score per row, in the order of `rows`.

    Raises:
        ConfigError: If a row is longer than the model's position range.
        RoutingError: If a routing score is not finite.
        ValueError: If a row has fewer than two tokens.
    """
    if any(len(row) < 2 for row in rows):
        raise ValueError("a row needs at least two tokens: one to read and one to predict")
    scores: list[RowScore | None] = [None] * len(rows)
    done = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for indices in length_batches([len(row) - 1 for row in rows], batch_tokens):
                batch = [rows[index] for index in indices]
                for index, score in zip(
                    indices, _score_batch(model, batch, routing, keep_routed), strict=True
                ):
                    scores[index] = score
                done += len(indices)
                if on_batch is not None:
                    on_batch(done, len(rows))
    finally:
        model.train(was_training)
    return scores  # type: ignore[return-value]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows to read together: longest first, of similar length, within the budget."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch:
            longest = lengths[batch[0]]
            full = (len(batch) + 1) * longest > batch_tokens
            if full or lengths[index] * _LONGEST_TO_SHORTEST < longest:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    routing: RoutingCount | None,
    keep_routed: bool,
) -> Iterator[RowScore]:
    tokens, valid = padded_rows(rows, model.device)
    output = model(tokens[:, :-1])
    nats_BT, greedy_BT = token_scores(output.logits_BTV, tokens[:, 1:])
    model.check_scores()
    if routing is not None:
        routing.add(output, valid[:, 1:])
    routed = _routed(output) if keep_routed else None
    for index, length in enumerate(len(row) - 1 for row in rows):
        yield RowScore(
            nats_BT[index, :length],
            greedy_BT[index, :length],
            None if routed is None else routed[:, index, :length],
        )


def padded_rows(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int64 `[rows, longest]` padded on the right, and a boolean that is False on padding."""
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), lengths.max()), PADDING, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    valid = np.arange(lengths.max()) < lengths[:, None]
    return torch.from_numpy(padded).to(device), torch.from_numpy(valid).to(device)


def token_scores(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihoods (float64) and greedy hits, a bounded number of logits at once."""
    vocabulary = logits_BTV.shape[-1]
    logits_NV, targets_N = logits_BTV.flatten(0, 1), targets_BT.flatten()
    step = max(1, _LOGITS_AT_ONCE // vocabulary)
    nats, greedy = [], []
    for start in range(0, len(targets_N), step):
        part_NV = logits_NV[start : start + step]
        part_NV = part_NV.float() if part_NV.element_size() < 4 else part_NV
        part_N = targets_N[start : start + step]
        nats.append(torch.nn.functional.cross_entropy(part_NV, part_N, reduction="none"))
        greedy.append(part_NV.argmax(dim=-1) == part_N)
    shape = tuple(targets_BT.shape)
    return (
        torch.cat(nats).double().cpu().numpy().reshape(shape),
        torch.cat(greedy).cpu().numpy().reshape(shape),
    )


def _routed(output: DecoderOutput) -> np.ndarray | None:
    """Float64 `(layers that route, B, T)`."""
    shares = [aux.kept_share_BT() for aux in output.aux]
    kept = [share_BT for share_BT in shares if share_BT is not None]
    return torch.stack(kept).double().cpu().numpy() if kept else None
