"""Rules about what a mixer declares and returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject
from ham.errors import ConfigError
from ham.model.capabilities import class_faults
from ham.model.mixer import MixerAux, MixerState

KINDS = frozenset({"kv", "positions", "page_table", "free_pages", "recurrent", "conv"})
"""The kinds of memory that `MixerState.tensors` may list."""


def interface(subject: Subject) -> Finding:
    """Every method is there, it has what it says it has, and a small model can be built."""
    judge, mixer = Judge(unit="faults"), subject.mixer
    for fault in class_faults(mixer):
        judge.fault(fault)
    for attribute in ("title", "paper"):
        if not getattr(mixer, attribute):
            judge.fault(f"{mixer.__name__}.{attribute} is empty")
    if not judge.measured:
        try:
            subject.model()
        except ConfigError as error:
            judge.fault(str(error))
    return judge.finding()


def shapes(subject: Subject) -> Finding:
    """Outputs have the inputs' shape, dtype and device; memories have the dtypes they should."""
    judge = Judge(unit="faults")
    for dtype in (torch.float32, torch.float64):
        mixer = subject.model(dtype).blocks[0].mixer
        x_BTD = subject.vectors(2, 9, dtype)
        y_BTD, aux = mixer(x_BTD, **subject.told(2, 9))
        _like(judge, "forward", y_BTD, x_BTD)
        _report(judge, "forward", aux)
        state = mixer.init_state(2, x_BTD.device, dtype)
        y_BTD, aux = mixer.prefill(x_BTD[:, :8], state, **subject.told(2, 9, 0, 8))
        _like(judge, "prefill", y_BTD, x_BTD[:, :8])
        _report(judge, "prefill", aux)
        _like(judge, "step", mixer.step(x_BTD[:, 8], state, **subject.told(2, 9, 8)), x_BTD[:, 8])
        _memory(judge, state, dtype)
    _memory(judge, mixer.init_state(2, x_BTD.device, torch.bfloat16), torch.bfloat16)
    return judge.finding()


def _like(judge: Judge, method: str, found: Tensor, x: Tensor) -> None:
    received = (tuple(found.shape), found.dtype, found.device)
    expected = (tuple(x.shape), x.dtype, x.device)
    if received != expected:
        judge.fault(f"{method} returns {received} for an input of {expected}")


def _report(judge: Judge, method: str, aux: object) -> None:
    if not isinstance(aux, MixerAux):
        judge.fault(f"{method} returns {type(aux).__name__} in the place of MixerAux")


def _memory(judge: Judge, state: object, dtype: torch.dtype) -> None:
    if not isinstance(state, MixerState):
        judge.fault(f"init_state returns {type(state).__name__} in the place of a MixerState")
        return
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    legal = {"kv": dtype, "conv": dtype, "recurrent": wide}
    for kind, tensors in state.tensors().items():
        if kind not in KINDS:
            judge.fault(f"unknown kind of memory {kind!r}; known: {', '.join(sorted(KINDS))}")
        for tensor in tensors:
            if kind in legal and tensor.dtype != legal[kind]:
                judge.fault(
                    f"memory {kind!r} is {tensor.dtype} where init_state(dtype={dtype}) "
                    f"asks for {legal[kind]}"
                )
