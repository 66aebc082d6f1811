"""Decoding sessions: one captured step of a whole model or of one mixer.

A session is prepared (memory allocated and filled), captured (one step, in a CUDA graph where there
is a GPU) and replayed. `MODEL_SESSIONS` and `MIXER_SESSIONS` name decoders of an architecture that
replace the general ones; the rest of the sweep sees `DecodeSession` alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.kernels.speed.clock import Graph, Task, capture
from ham.measure.sweep.layer_choice import make_layer
from ham.measure.sweep.layers import DecodeLayer, LayerSettings, Occupancy, Pieces, Traffic
from ham.measure.sweep.models import parameter_bytes, release
from ham.measure.sweep.ops import StepOps, step_ops
from ham.model.decoder import Block, DecoderLM
from ham.model.mixer import SequenceMixer


class DecodeSession(Protocol):
    """What the sweep asks of a decoder, at a frozen position or a running one.

    Attributes:
        provider: What computes, e.g. `triton` or `sdpa_cudnn`.
        launch_mode: `cuda_graph` or `eager`, known after `capture`.
        operations: Form of the operations between matrix products, as `step_ops` names it.
    """

    provider: str
    launch_mode: str
    operations: str

    def prepare(self) -> None:
        """Allocate caches and fill them to the cell's context."""

    def capture(self) -> None:
        """Record one step: logits and greedy next token, or a mixer's output."""

    def replay(self) -> None:
        """Decode one token per sequence, without waiting for the device."""

    def kv_bytes(self) -> int:
        """Allocated bytes of keys, values, positions and page tables of all layers."""

    def state_bytes(self) -> int:
        """Allocated bytes of recurrent and convolution states of all layers."""

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""

    def traffic(self) -> Traffic:
        """Bytes of caches, states and weights that a step of the batch must move."""

    def occupancy(self) -> list[Occupancy]:
        """Use of the routed cache, layer by layer; empty where nothing is routed."""

    def parts(self, operations: str | None = None) -> Mapping[str, Callable[[], object]]:
        """Pieces of the step that can be timed alone, by name; callable after `prepare`.

        `operations` replaces the session's own.
        """

    def fused_parts(self) -> Mapping[str, str]:
        """What the launches of some parts do besides, by name."""

    def free(self) -> None:
        """Give all memory back."""


class CapturedSession:
    """What sessions of this module share: layers, capture, accounting."""

    def __init__(self, settings: LayerSettings):
        self.settings = settings
        self.layers: list[DecodeLayer] = []
        self.launch_mode = "eager"
        self._graph: Graph | None = None

    @property
    def provider(self) -> str:
        """The distinct providers of the layers."""
        return "+".join(dict.fromkeys(layer.provider for layer in self.layers))

    @property
    def operations(self) -> str:
        """Those of the settings."""
        return self.settings.ops.name

    def step(self) -> Tensor:
        """One step, launched eagerly."""
        raise NotImplementedError

    def capture(self) -> None:
        """Record one step; on a CPU steps stay eager.

        Raises:
            ValueError: If the step gives anything but finite numbers.
        """
        if self.settings.device.type == "cuda":
            # Compiles kernels and builds plans, which may wait for the device.
            with torch.inference_mode():
                self.step()
            self._graph = capture(Task(self.step, torch.inference_mode))
            self.launch_mode = "cuda_graph"
            self._graph.replay()
            result = self._graph.result
        else:
            with torch.inference_mode():
                result = self.step()
        if not bool(result.isfinite().all()):
            raise ValueError("a decode step gave numbers that are not finite")

    def replay(self) -> None:
        """One step."""
        if self._graph is not None:
            self._graph.replay()
            return
        with torch.inference_mode():
            self.step()

    def kv_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.kv_bytes() for layer in self.layers)

    def state_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.state_bytes() for layer in self.layers)

    def weight_bytes(self) -> int:
        """A mixer without its projections reads next to none."""
        return 0

    def traffic(self) -> Traffic:
        """Of all layers, and the weights once."""
        moved = [layer.traffic() for layer in self.layers]
        return Traffic(
            self.weight_bytes() + sum(one.read for one in moved), sum(one.written for one in moved)
        )

    def occupancy(self) -> list[Occupancy]:
        """Of the layers that route."""
        found = (layer.occupancy() for layer in self.layers)
        return [one for one in found if one is not None]

    def parts(self, operations: str | None = None) -> Pieces:
        """None that are timed alone."""
        return {}

    def fused_parts(self) -> Mapping[str, str]:
        """Those of the layers."""
        return {name: words for layer in self.layers for name, words in layer.fused_pieces.items()}

    def free(self) -> None:
        """Drop the graph and the layers."""
        self._graph = None
        self.layers = []
        release()


class MixerSession(CapturedSession):
    """One step of one mixer between its projections and its output projection."""

    def __init__(self, mixer: SequenceMixer, settings: LayerSettings):
        super().__init__(settings)
        self.mixer = mixer

    def prepare(self) -> None:
        """The layer, and projections of random inputs in place of the matrices."""
        settings = self.settings
        with torch.inference_mode():
            core = without_projections(self.mixer, settings)
            self.layers = [make_layer(core, 0, settings)]
            self.layers[0].prepare()
            self.x_BD = torch.randn(
                settings.cell.batch,
                self.mixer.shape.width,
                device=settings.device,
                dtype=settings.dtype,
            )

    def step(self) -> Tensor:
        """The mixer's output before the output projection."""
        return self.layers[0].step(self.x_BD)


class ModelSession(CapturedSession):
    """One step of a whole model: embedding, blocks, logits, greedy next token."""

    def __init__(self, model: DecoderLM, settings: LayerSettings):
        super().__init__(settings)
        self.model = model

    def prepare(self) -> None:
        """All layers and a first token for each sequence."""
        settings = self.settings
        with torch.inference_mode():
            self.layers = [
                make_layer(block.mixer, index, settings)
                for index, block in enumerate(self.model.blocks)
            ]
            for layer in self.layers:
                layer.prepare()
            self.tokens_B = torch.zeros(
                settings.cell.batch, dtype=torch.int64, device=settings.device
            )

    def step(self) -> Tensor:
        """The logits; the next tokens replace those that were read."""
        ops, blocks = self.settings.ops, list(self.model.blocks)
        following = [*(block.mixer_norm for block in blocks[1:]), self.model.final_norm]
        x_BD = self.model.embedding(self.tokens_B)
        normed_BD = blocks[0].mixer_norm(x_BD)
        for block, layer, norm in zip(blocks, self.layers, following, strict=True):
            x_BD, normed_BD = ops.add_norm(x_BD, layer.step(normed_BD), block.mlp_norm.weight)
            x_BD, normed_BD = ops.add_norm(x_BD, self._mlp(block, normed_BD, ops), norm.weight)
        return self._head(normed_BD)

    def weight_bytes(self) -> int:
        """Every parameter once; the embedding is the head."""
        return parameter_bytes(self.model)

    @torch.inference_mode()
    def parts(self, operations: str | None = None) -> Pieces:
        """The same work cut up: every part runs for all layers in turn, on inputs made before."""
        settings = self.settings
        if operations not in (None, settings.ops.name):
            settings = replace(settings, ops=step_ops(operations))
        x_BD, branch_BD = self._random(), self._random()
        blocks = list(self.model.blocks)
        return {
            **self._core_parts(settings, x_BD),
            "projections": _all_of(
                [
                    functools.partial(linear, _input_of(linear, settings))
                    for block in blocks
                    for linear in _linears(block.mixer)
                ]
            ),
            "mlp": _all_of(
                [functools.partial(self._mlp, block, x_BD, settings.ops) for block in blocks]
            ),
            # Two tensors, as in the step: one given twice would be another graph to compile.
            "norms": _all_of(
                [
                    functools.partial(settings.ops.add_norm, x_BD, branch_BD, norm.weight)
                    for block in blocks
                    for norm in (block.mixer_norm, block.mlp_norm)
                ]
            ),
            "head": functools.partial(self._head, x_BD),
        }

    def _core_parts(self, settings: LayerSettings, x_BD: Tensor) -> Pieces:
        """The layers without their projections, by piece where they have any."""
        cores = []
        for layer in self.layers:
            core = copy.copy(layer)
            core.settings = settings
            core.mixer = without_projections(layer.mixer, settings)
            core.step(x_BD)
            cores.append(core)
        return {
            name: _all_of(
                [core.pieces().get(name) or functools.partial(core.step, x_BD) for core in cores]
            )
            for name in cores[0].pieces() or ("core",)
        }

    def _random(self) -> Tensor:
        settings = self.settings
        shape = (settings.cell.batch, self.model.config.width)
        return torch.randn(shape, device=settings.device, dtype=settings.dtype)

    def _mlp(self, block: Block, normed_BD: Tensor, ops: StepOps) -> Tensor:
        return block.mlp.down(ops.gated_unit(block.mlp.up(normed_BD)))

    def _head(self, normed_BD: Tensor) -> Tensor:
        logits_BV = F.linear(normed_BD, self.model.embedding.weight)
        logits_BV = logits_BV[:, : self.model.config.vocabulary_size]
        self.tokens_B.copy_(logits_BV.argmax(dim=-1))
        return logits_BV


class Given(nn.Module):
    """Stands in for a projection: its output was made before."""

    def __init__(self, output_B1C: Tensor):
        super().__init__()
        self.output_B1C = output_B1C

    def forward(self, x_B1D: Tensor) -> Tensor:
        """The output, whatever the input."""
        return self.output_B1C


def without_projections(module: nn.Module, settings: LayerSettings) -> nn.Module:
    """A mixer whose projections are `Given` and whose output projection does nothing.

    The copy shares every other part with `module`, which stays as it is.
    """
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            shape = (settings.cell.batch, 1, child.out_features)
            output_B1C = torch.randn(shape, device=settings.device, dtype=settings.dtype)
            clone._modules[name] = nn.Identity() if name == "out" else Given(output_B1C)
        elif _linears(child):
            clone._modules[name] = without_projections(child, settings)
    return clone


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _input_of(linear: nn.Linear, settings: LayerSettings) -> Tensor:
    shape = (settings.cell.batch, linear.in_features)
    return torch.randn(shape, device=settings.device, dtype=settings.dtype)


def _all_of(functions: list[Callable[[], object]]) -> Callable[[], object]:
    """Run all, give back what the last one made."""

    def run() -> object:
        made = None
        for function in functions:
            made = function()
        return made

    return run


MODEL_SESSIONS: dict[str, Callable[[DecoderLM, LayerSettings], DecodeSession]] = {}
"""Sessions of whole models by mixer; `ModelSession` for one that is not listed."""

MIXER_SESSIONS: dict[str, Callable[[SequenceMixer, LayerSettings], DecodeSession]] = {}
"""Sessions of single mixers by mixer; `MixerSession` for one that is not listed."""


def make_session(subject: DecoderLM | SequenceMixer, settings: LayerSettings) -> DecodeSession:
    """The session of a model or a mixer."""
    name = settings.cell.model
    if isinstance(subject, DecoderLM):
        return MODEL_SESSIONS.get(name, ModelSession)(subject, settings)
    return MIXER_SESSIONS.get(name, MixerSession)(subject, settings)
