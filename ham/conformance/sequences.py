"""Rules about which outputs depend on which tokens, and about the ways to compute them."""

from __future__ import annotations

import torch

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject

LIMIT = 1e-9
"""In float64; |found - expected| / (1 + |expected|)."""


@torch.no_grad()
def causality(subject: Subject) -> Finding:
    """Changing a token moves its own output and no earlier one."""
    judge, model, tokens_BT = Judge(subject.exact), subject.model(), subject.tokens(1, 99)
    before_BTV = model(tokens_BT).logits_BTV
    for changed in (0, 1, 40, 63, 64, 98):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] = (other_BT[0, changed] + 7) % 256
        after_BTV = model(other_BT).logits_BTV
        what = f"logits when token {changed} changes"
        judge.same(what, after_BTV[:, :changed], before_BTV[:, :changed], "BTV")
        if torch.equal(before_BTV[:, changed], after_BTV[:, changed]):
            judge.fail(f"{what}: those of token {changed} itself do not move")
    return judge.finding()


@torch.no_grad()
def batch(subject: Subject) -> Finding:
    """A sequence gives the same alone as among others."""
    judge, model, tokens_BT = Judge(1e-10), subject.model(), subject.tokens(4, 50)
    together_BTV = model(tokens_BT).logits_BTV
    for row in range(4):
        alone_BTV = model(tokens_BT[row : row + 1]).logits_BTV
        what = f"logits of sequence {row} among others"
        judge.same(what, together_BTV[row : row + 1], alone_BTV, "BTV")
    return judge.finding()


@torch.no_grad()
def pieces(subject: Subject) -> Finding:
    """Prefill in pieces of any size gives the parallel form, and routes the same tokens."""
    judge, model, tokens_BT = Judge(LIMIT), subject.model(), subject.tokens(2, 101)
    expected = model(tokens_BT)
    for cuts in ((1,), (70,), (64, 65), (1, 2, 3, 90)):
        state = model.init_state(2)
        parts = [model.prefill(part, state) for part in tokens_BT.tensor_split(cuts, dim=1)]
        found_BTV = torch.cat([part.logits_BTV for part in parts], dim=1)
        judge.same(f"logits of prefill cut at {cuts}", found_BTV, expected.logits_BTV, "BTV")
        for layer, aux in enumerate(expected.aux):
            if aux.routed_BT is not None:
                routed_BT = torch.cat([part.aux[layer].routed_BT for part in parts], dim=1)
                what = f"tokens routed in layer {layer} by prefill cut at {cuts}"
                judge.same(what, routed_BT, aux.routed_BT, "BT")
    return judge.finding()


@torch.no_grad()
def steps(subject: Subject) -> Finding:
    """Token by token gives the parallel form."""
    judge, model, tokens_BT = Judge(LIMIT), subject.model(), subject.tokens(3, 80)
    state = model.init_state(3)
    found = [model.step(tokens_B, state) for tokens_B in tokens_BT.unbind(1)]
    expected_BTV = model(tokens_BT).logits_BTV
    judge.same("logits step by step", torch.stack(found, dim=1), expected_BTV, "BTV")
    return judge.finding()


@torch.no_grad()
def reorder(subject: Subject) -> Finding:
    """Selecting and repeating sequences of a batch takes their memories along."""
    judge, model, tokens_BT = Judge(LIMIT), subject.model(), subject.tokens(3, 70)
    # Not a palindrome: a memory in reverse order must not pass.
    order_B = torch.tensor([2, 0, 2, 1], device=tokens_BT.device)
    state = model.init_state(3)
    model.prefill(tokens_BT[:, :60], state)
    state.select(order_B)
    found = [model.step(tokens_B, state) for tokens_B in tokens_BT[order_B, 60:].unbind(1)]
    expected_BTV = model(tokens_BT[order_B]).logits_BTV[:, 60:]
    judge.same("logits after select", torch.stack(found, 1), expected_BTV, "BTV", first_token=60)
    return judge.finding()
