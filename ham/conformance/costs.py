"""Rules about declared costs."""

from __future__ import annotations

import torch

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject

LENGTHS = (1, 31, 32, 33, 64, 100)


@torch.no_grad()
def bytes_held(subject: Subject) -> Finding:
    """`state_bytes` declares what the memory holds, byte by byte."""
    judge = Judge(unit="bytes")
    for dtype in (torch.float32, torch.float64):
        model = subject.model(dtype)
        for length in LENGTHS:
            state = model.init_state(1)
            output = model.prefill(subject.tokens(1, length), state)
            held = state.bytes_allocated()
            size = torch.finfo(dtype).bits // 8
            declared = model.state_bytes(length, output.cache_fractions() or 1.0, size)
            for kind, found, expected in (
                ("in all", declared.allocated, sum(held.values())),
                ("of recurrent state", declared.recurrent, held.get("recurrent", 0)),
                ("of convolution inputs", declared.conv, held.get("conv", 0)),
                # Slots allocated ahead belong to no token.
                ("of keys and values", max(declared.kv, held.get("kv", 0)), held.get("kv", 0)),
                ("in use", max(declared.used, declared.allocated), declared.allocated),
            ):
                where = f"after {length} tokens in {dtype}, two layers"
                what = f"{found} bytes {kind} declared, {expected} held {where}"
                judge.figure(abs(found - expected), what)
    return judge.finding()


def flops(subject: Subject) -> Finding:
    """Declared FLOPs are positive, grow with the context and cover every weight."""
    judge, model = Judge(unit="faults"), subject.model(torch.float32)
    short, long = model.forward_flops(64), model.forward_flops(128)
    if not 0 < short < long:
        judge.fault(f"forward_flops is {short:g} at 64 tokens and {long:g} at 128")
    first, late = model.decode_flops(1), model.decode_flops(512)
    if not 0 < first <= late:
        judge.fault(f"decode_flops is {first:g} at position 1 and {late:g} at 512")
    # The projections alone cost two FLOPs per weight and token.
    least = 1.5 * model.count_parameters() * 128
    if long < least:
        judge.fault(f"forward_flops of 128 tokens is {long:g}, below 1.5 per weight ({least:g})")
    return judge.finding()
