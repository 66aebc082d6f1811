"""Rules about sequences of different lengths in one batch: each goes on as it would alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState

LENGTHS = (1, 5, 5, 23, 64, 90)
"""Shorter and longer than a window of 24, within and beyond a block of the dense cache (64)."""
NEW = 30
LIMIT = 1e-4
"""In float32; |found - expected| / (1 + |expected|)."""


@torch.no_grad()
def join(subject: Subject) -> Finding:
    """Sequences of different lengths, joined, go on token by token as each alone."""
    judge, model, texts = Judge(LIMIT), subject.model(torch.float32), _texts(subject, LENGTHS)
    state = _joined(model, texts, LENGTHS)
    found = [model.step(_next(texts, LENGTHS, step), state) for step in range(NEW)]
    _same_as_alone(judge, model, torch.stack(found, dim=1), texts, LENGTHS)
    if state.positions_B.tolist() != [length + NEW for length in LENGTHS]:
        judge.fail(f"the joined batch stands at {state.positions_B.tolist()}")
    return judge.finding()


@torch.no_grad()
def join_pieces(subject: Subject) -> Finding:
    """The same when the joined sequences read several tokens at once."""
    judge, model, texts = Judge(LIMIT), subject.model(torch.float32), _texts(subject, LENGTHS)
    state = _joined(model, texts, LENGTHS)
    parts = []
    for first, end in ((0, 3), (3, 4), (4, NEW)):
        pieces = [text[n + first : n + end] for text, n in zip(texts, LENGTHS, strict=True)]
        parts.append(model.prefill(torch.stack(pieces), state).logits_BTV)
    _same_as_alone(judge, model, torch.cat(parts, dim=1), texts, LENGTHS)
    return judge.finding()


@torch.no_grad()
def join_again(subject: Subject) -> Finding:
    """Joined batches can be joined, cut down and reordered once more."""
    judge, model, texts = Judge(LIMIT), subject.model(torch.float32), _texts(subject, LENGTHS)
    halves = []
    for part in (slice(None, 4), slice(4, None)):
        state = _joined(model, texts[part], LENGTHS[part])
        for step in range(2):
            model.step(_next(texts[part], LENGTHS[part], step), state)
        halves.append(state)
    state = DecoderState.join(halves[::-1])
    order = [5, 0, 3, 1]
    state.select(torch.tensor(order, device=texts[0].device))
    rows = [[4, 5, 0, 1, 2, 3][row] for row in order]
    kept, lengths = [texts[row] for row in rows], [LENGTHS[row] for row in rows]
    found = [model.step(_next(kept, lengths, step), state) for step in range(2, NEW)]
    _same_as_alone(judge, model, torch.stack(found, dim=1), kept, [n + 2 for n in lengths])
    return judge.finding()


@torch.no_grad()
def join_copies(subject: Subject) -> Finding:
    """Joining leaves the memories that were joined as they were."""
    judge, model, texts = Judge(LIMIT), subject.model(torch.float32), _texts(subject, (9, 40))
    parts = [_read(model, text[None, :n]) for text, n in zip(texts, (9, 40), strict=True)]
    whole = DecoderState.join(parts)
    model.step(torch.tensor([1, 2], device=texts[0].device), whole)
    logits_BV = model.step(texts[0][9:10], parts[0])
    expected_BTV = model(texts[0][None, :10]).logits_BTV[:, 9:]
    judge.same("logits of a part", logits_BV[:, None], expected_BTV, "BTV", first_token=9)
    if parts[0].position != 10 or whole.positions_B.tolist() != [10, 41]:
        judge.fail(f"part and whole stand at {parts[0].position}, {whole.positions_B.tolist()}")
    return judge.finding()


@torch.no_grad()
def join_equal(subject: Subject) -> Finding:
    """Sequences of one length, left after a selection, hold no more than if read together."""
    judge, model = Judge(unit="bytes"), subject.model(torch.float32)
    texts = _texts(subject, (7, 7, 12))
    state = _joined(model, texts, (7, 7, 12))
    state.select(torch.tensor([1, 0], device=texts[0].device))
    if state.position != 7 or state.longest != 7:
        judge.fail(f"two sequences of 7 tokens stand at {state.position}")
    together = _read(model, torch.stack([texts[1][:7], texts[0][:7]])).bytes_allocated()
    held = state.bytes_allocated()
    for kind in sorted(held | together):
        difference = abs(held.get(kind, 0) - together.get(kind, 0))
        what = f"memory {kind!r}: {held.get(kind, 0)} bytes, {together.get(kind, 0)} together"
        judge.figure(difference, what)
    return judge.finding()


def _texts(subject: Subject, lengths: Sequence[int]) -> list[Tensor]:
    return [subject.tokens(1, n + NEW, seed=5 + row)[0] for row, n in enumerate(lengths)]


def _read(model: DecoderLM, tokens_BT: Tensor) -> DecoderState:
    state = model.init_state(tokens_BT.shape[0])
    model.prefill(tokens_BT, state)
    return state


def _joined(model: DecoderLM, texts: list[Tensor], lengths: Sequence[int]) -> DecoderState:
    parts = zip(texts, lengths, strict=True)
    return DecoderState.join([_read(model, text[None, :n]) for text, n in parts])


def _next(texts: list[Tensor], lengths: Sequence[int], step: int) -> Tensor:
    return torch.stack([text[n + step] for text, n in zip(texts, lengths, strict=True)])


def _same_as_alone(
    judge: Judge, model: DecoderLM, found_BTV: Tensor, texts: list[Tensor], lengths: Sequence[int]
) -> None:
    """Logits of every sequence from its length on, and the token that each would choose."""
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        expected_BTV = model(text[None]).logits_BTV[:, n:]
        row_BTV, what = found_BTV[row : row + 1], f"sequence {row} of the joined batch"
        judge.same(f"logits of {what}", row_BTV, expected_BTV, "BTV", first_token=n)
        different = (row_BTV.argmax(-1) != expected_BTV.argmax(-1)).nonzero()
        if len(different):
            judge.fail(f"{what} would choose another token at {n + int(different[0, 1])}")
