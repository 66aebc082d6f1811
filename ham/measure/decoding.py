"""How `ham measure` decodes: by the strongest path that a model has on its device.

On a GPU an eager step is hundreds of launches, whose time the device waits for. So HAM and the
gated delta rule decode by fused kernels in one CUDA graph (`ham.decoding`), on the memory that the
text left. The other baselines have no such decoder; their step is captured at a fixed position by
the sessions of the sweep, fused and with the fastest attention, on caches of the same size whose
content does not change the time. What can do neither takes the model's own steps and says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ham.errors import UnusableModelError
from ham.measure.sweep.causes import whole_cause
from ham.model.decoder import DecoderLM
from ham.model.language_model import LanguageModel, Memory
from ham.model.mixer import SequenceMixer
from ham.model.precision import cache_dtype
from ham.routing.options import STATE_SCORES

if TYPE_CHECKING:
    from ham.decoding.graph import GraphDecoder
    from ham.measure.sweep.sessions import ModelSession

GRAPH, EAGER = "cuda_graph", "eager"


@dataclass(frozen=True)
class Reading:
    """A context that was read, as a decoder finds it.

    Attributes:
        state: Its memory.
        context: Tokens of each sequence.
        batch: Sequences.
        fractions: Share of the tokens that each routing layer kept.
    """

    state: Memory
    context: int
    batch: int
    fractions: Sequence[float]


@dataclass(frozen=True)
class TimedDecoder:
    """One way to decode.

    Attributes:
        step: Reads one token per sequence, `tokens_B`.
        launch_mode: As in rows.
        provider: What computes; None for what the model itself names.
        note: Why it is not a stronger one; None if it is the strongest.
        finish: Checks what was decoded and gives memory back.
    """

    step: Callable[[Tensor], object]
    launch_mode: str = EAGER
    provider: str | None = None
    note: str | None = None
    finish: Callable[[], None] = lambda: None

    def labels(self) -> dict[str, str]:
        """Labels of its rows."""
        return {} if self.note is None else {"note": self.note}

    def fields(self) -> dict[str, str]:
        """Fields of its rows; a CPU has one path, which is what rows say anyway."""
        provider = {} if self.provider is None else {"provider": self.provider}
        return {} if self.launch_mode == EAGER else {"launch_mode": self.launch_mode, **provider}


Path = Callable[[LanguageModel, Reading], TimedDecoder]


def timed_decoder(
    model: LanguageModel, read: Callable[[], Reading], paths: Sequence[Path] | None = None
) -> TimedDecoder:
    """The first of `paths` that can be had, else the model's own steps.

    Args:
        model: In evaluation mode.
        read: Reads the context; called again for each path, which may use the memory up.
        paths: By default those of the model's device.
    """
    reasons = []
    for path in decoder_paths(model.device.type) if paths is None else paths:
        try:
            return path(model, read())
        except Exception as error:
            # Whatever a compiler or a capture raises: the model's own steps may do without it.
            known = isinstance(error, UnusableModelError)
            reasons.append(str(error) if known else whole_cause(error))
        # Outside of the handler, whose exception holds the frames and with them the tensors.
        _release()
    state = read().state
    return TimedDecoder(
        lambda tokens_B: model.step(tokens_B, state), note="; ".join(reasons) or None
    )


def decoder_paths(device_type: str) -> tuple[Path, ...]:
    """What is tried on a device, the strongest first; on a CPU launches cost next to nothing."""
    return (fused_decoder, captured_decoder) if device_type == "cuda" else ()


def fused_decoder(model: LanguageModel, reading: Reading) -> TimedDecoder:
    """Fused kernels on the memory of the text.

    Raises:
        UnusableModelError: If they cannot do this model.
    """
    # Loads Triton.
    from ham.decoding.graph import GraphDecoder, unsupported

    reason = unsupported(model)
    if reason is not None:
        raise UnusableModelError(f"no fused decoder: {reason}")
    decoder: GraphDecoder = GraphDecoder(model, reading.state)
    mode = GRAPH if model.device.type == "cuda" else EAGER
    return TimedDecoder(decoder.step, mode, "triton", finish=decoder.check)


def captured_decoder(model: LanguageModel, reading: Reading) -> TimedDecoder:
    """A step captured at the position of the text; on a CPU the same step, launched eagerly.

    Raises:
        UnusableModelError: If a layer has no such step.
    """
    reason = not_captured(model)
    if reason is not None:
        raise UnusableModelError(f"no captured step: {reason}")
    session = _session(model, reading)
    with torch.autocast(model.device.type, enabled=False):
        session.prepare()
        session.capture()
    return TimedDecoder(
        lambda tokens_B: session.replay(),
        session.launch_mode,
        session.provider,
        finish=session.free,
    )


def not_captured(model: LanguageModel) -> str | None:
    """Why the sweep has no step of a model, in a few words, or None if it has one."""
    if not isinstance(model, DecoderLM):
        return "its layers are those of another library"
    reasons = (_layer_refusal(block.mixer) for block in model.blocks)
    found = ((index, reason) for index, reason in enumerate(reasons) if reason is not None)
    return next((f"layer {index}: {reason}" for index, reason in found), None)


def _layer_refusal(mixer: SequenceMixer) -> str | None:
    from ham.measure.sweep.grid import HAM, MODELS

    name = mixer.registered_name
    if name not in MODELS:
        return f"mixer {name!r} has none"
    if getattr(mixer, "kv_heads", mixer.shape.heads) != mixer.shape.heads:
        return f"{mixer.kv_heads} heads of keys for {mixer.shape.heads} of queries have none"
    if name != HAM:
        return None
    # Loads Triton.
    from ham.decoding.layers import refusal

    options = mixer.options
    if options.score not in STATE_SCORES or options.reduction == "per_head":
        return f"score {options.score!r} with reduction {options.reduction!r} has none"
    return refusal(mixer)


def _session(model: DecoderLM, reading: Reading) -> ModelSession:
    """The sweep's session of a copy of the model in the arithmetic of its caches."""
    from ham.kernels.speed.clock import make_clock
    from ham.measure.sweep.grid import MODEL_DECODE, Cell
    from ham.measure.sweep.layers import LayerSettings
    from ham.measure.sweep.models import cast_for_inference
    from ham.measure.sweep.ops import FUSED, PLAIN, step_ops
    from ham.measure.sweep.sessions import ModelSession

    dtype = cache_dtype(model.embedding.weight)
    twin = copy.deepcopy(model).requires_grad_(False)
    cast_for_inference(twin, dtype)
    shape = twin.blocks[0].mixer.shape
    fraction = sum(reading.fractions) / len(reading.fractions) if reading.fractions else None
    name = twin.blocks[0].mixer.registered_name
    cell = Cell(MODEL_DECODE, name, reading.context, reading.batch, fraction, shape.head_dim)
    ops = step_ops(FUSED if model.device.type == "cuda" else PLAIN)
    clock = make_clock(model.device)
    return ModelSession(twin, LayerSettings(cell, model.device, dtype, clock, {}, ops))


def _release() -> None:
    from ham.measure.sweep.models import release

    release()
