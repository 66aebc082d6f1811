"""Log-likelihoods of continuations: what multiple-choice and cloze questions ask.

The options of one question share its context, so it is read once: contexts of similar length are
prefilled together as far as the shortest of them reaches, their memories are copied for every
option, and each option is read from its copy, the rest of its own context before it. Four options
of 48 tokens behind 256 take 0.31 to 0.40 of the time on a CPU core, whatever the mixer.
Prefill in pieces is the same arithmetic as reading a row at once; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ham.evaluate.scoring import (
    BATCH_TOKENS,
    OnBatch,
    RoutingCount,
    RowScore,
    padded_rows,
    score_rows,
    token_scores,
)

if TYPE_CHECKING:
    from ham.model.language_model import LanguageModel

Pair = tuple[Sequence[int], Sequence[int]]
Answer = tuple[float, bool]

_SHORTEST_OF_LONGEST = 0.8
# Copied memories are what sharing costs: rows times their whole length, in batches.
_MEMORY_BATCHES = 4


def score_continuations(
    model: LanguageModel,
    pairs: Sequence[Pair],
    batch_size: int,
    max_length: int | None = None,
    routing: RoutingCount | None = None,
    on_batch: OnBatch | None = None,
    share_contexts: bool = True,
) -> list[Answer]:
    """Log-likelihood of each continuation given its context.

    Args:
        model: Put into evaluation mode for the call.
        pairs: `(context_ids, continuation_ids)`; neither is empty.
        batch_size: Rows of `max_length` tokens per forward pass, at most; shorter rows are packed
            into as many tokens, and a CPU takes `BATCH_TOKENS`.
        max_length: Longest input; the training context when None. Of a longer pair the last
            `max_length + 1` tokens are kept (`overflows` tells which).
        routing: Counts routed tokens here, a shared context once for each of its continuations.
        on_batch: See `score_rows`.
        share_contexts: Whether equal contexts are read once, by a model of this project.

    Returns:
        `(log-likelihood in nats, greedy decoding gives exactly the continuation)` per pair.

    Raises:
        ConfigError, RoutingError: As `score_rows`.
    """
    length = max_length or model.config.context
    batch_tokens = batch_size * length
    if model.device.type == "cpu":
        batch_tokens = min(batch_tokens, BATCH_TOKENS)
    # A model of another library may have no cache that can be copied or read in pieces.
    shares = share_contexts and model.library is None
    groups = _equal_contexts(pairs, length) if shares else []
    shared = {index for group in groups for index in group}
    alone = [index for index in range(len(pairs)) if index not in shared]
    answers: list[Answer | None] = [None] * len(pairs)

    def progress(before: int) -> OnBatch | None:
        return on_batch and (lambda done, _: on_batch(before + done, len(pairs)))

    rows = [[*pairs[index][0], *pairs[index][1]][-(length + 1) :] for index in alone]
    scores = score_rows(model, rows, batch_tokens, routing, on_batch=progress(0))
    for index, score in zip(alone, scores, strict=True):
        answers[index] = _answer(score, len(pairs[index][1]))
    _score_groups(model, pairs, groups, batch_tokens, routing, answers, progress(len(alone)))
    return answers  # type: ignore[return-value]


def overflows(context: Sequence[int], continuation: Sequence[int], max_length: int) -> bool:
    """Whether `score_continuations` cuts this pair from the left."""
    return len(context) + len(continuation) > max_length + 1


def _answer(score: RowScore, continuation: int) -> Answer:
    """The last `continuation` tokens of a row, or what is left of them."""
    end = len(score.nats) + 1
    return score.span(end - min(continuation, len(score.nats)), end)


def _equal_contexts(pairs: Sequence[Pair], length: int) -> list[list[int]]:
    """Indices of pairs with the same context, two at least; none that is cut."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if len(context) > 1 and not overflows(context, continuation, length):
            by_context.setdefault(tuple(context), []).append(index)
    return [group for group in by_context.values() if len(group) > 1]


def _score_groups(
    model: LanguageModel,
    pairs: Sequence[Pair],
    groups: Sequence[list[int]],
    batch_tokens: int,
    routing: RoutingCount | None,
    answers: list[Answer | None],
    on_batch: OnBatch | None,
) -> None:
    done = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _group_batches(pairs, groups, batch_tokens):
                scores = _score_shared(model, pairs, batch, routing)
                indices = [index for group in batch for index in group]
                for index, score in zip(indices, scores, strict=True):
                    answers[index] = _answer(score, len(pairs[index][1]))
                done += len(indices)
                if on_batch is not None:
                    on_batch(done, 0)
    finally:
        model.train(was_training)


def _group_batches(
    pairs: Sequence[Pair], groups: Sequence[list[int]], batch_tokens: int
) -> Iterator[list[list[int]]]:
    """Groups to read together: as many options each, contexts of similar length, in the budget."""

    def context(group: list[int]) -> int:
        return len(pairs[group[0]][0])

    def longest(group: list[int]) -> int:
        return max(len(pairs[index][1]) for index in group)

    order = sorted(groups, key=lambda group: (len(group), -context(group), longest(group)))
    batch: list[list[int]] = []
    for group in order:
        together = [*batch, group]
        shared = context(group) - 1
        rest = max(context(one) + longest(one) for one in together) - shared
        rows = sum(map(len, together))
        full = len(together) * shared > batch_tokens or rows * rest > batch_tokens
        full = full or rows * (shared + rest) > _MEMORY_BATCHES * batch_tokens
        unlike = len(group) != len(together[0])
        unlike = unlike or context(group) < _SHORTEST_OF_LONGEST * context(together[0])
        if batch and (full or unlike):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _score_shared(
    model: LanguageModel,
    pairs: Sequence[Pair],
    groups: list[list[int]],
    routing: RoutingCount | None,
) -> list[RowScore]:
    """Scores of the tokens behind the shared part, in the order of `groups`."""
    options = len(groups[0])
    contexts = [pairs[group[0]][0] for group in groups]
    shared = min(map(len, contexts)) - 1
    read = torch.tensor([list(context[:shared]) for context in contexts], device=model.device)
    state = model.init_state(len(groups))
    output = model.prefill(read, state, last_only=True)
    if routing is not None:
        routing.add(output, torch.full_like(read, options))
    # Copies come one whole batch after the other.
    order = [group[option] for option in range(options) for group in groups]
    rows = [[*pairs[index][0][shared:], *pairs[index][1]] for index in order]
    tokens, valid = padded_rows(rows, model.device)
    output = model.prefill(tokens[:, :-1], type(state).join([state] * options))
    nats, greedy = token_scores(output.logits_BTV, tokens[:, 1:])
    model.check_scores()
    if routing is not None:
        routing.add(output, valid[:, 1:])
    found = {
        index: RowScore(nats[row, : len(rows[row]) - 1], greedy[row, : len(rows[row]) - 1])
        for row, index in enumerate(order)
    }
    return [found[index] for group in groups for index in group]
