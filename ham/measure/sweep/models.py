"""The models and mixers that the sweep times: random weights, one of each, reused by every cell."""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import Any

import torch
from torch import nn

from ham.config_files import parse_config
from ham.measure.sweep.grid import EVICTED, MODELS, RULE_WINDOW, WINDOW, Scale
from ham.model.blocks import RMSNorm, ShortConvolution
from ham.model.decoder import DecoderLM
from ham.model.mixer import MixerShape, SequenceMixer
from ham.model.model_config import ModelConfig
from ham.model.registry import mixer_class, parse_options
from ham.model.sizing import model_config, parameter_count

SEED = 0


class ModelShelf:
    """Builds each model once and keeps it until told otherwise.

    For decoding and prefill, matrices, embeddings, norms and convolutions are cast to `dtype`
    once, as is usual for inference; rates of the recurrences and rotary tables stay float32. For
    training, weights are float32 under autocast, as in `ham train`.

    Args:
        scale: Sizes.
        device: Where weights live.
        dtype: Of the inference weights, of activations and of caches.
    """

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype):
        self.scale = scale
        self.device = device
        self.dtype = dtype
        self._decoders: dict[tuple[str, bool], DecoderLM] = {}
        self._mixers: dict[tuple[str, int], SequenceMixer] = {}
        self._parameters: dict[str, int] = {}

    def decoder(self, mixer: str) -> DecoderLM:
        """The whole model for inference."""
        if (mixer, False) not in self._decoders:
            model = self._build(mixer)
            cast_for_inference(model, self.dtype)
            self._decoders[mixer, False] = model.eval().requires_grad_(False)
        return self._decoders[mixer, False]

    def trained(self, mixer: str) -> DecoderLM:
        """The whole model for training steps; models of other mixers for training are dropped."""
        if (mixer, True) not in self._decoders:
            self.drop_trained()
            self._decoders[mixer, True] = self._build(mixer).train()
        return self._decoders[mixer, True]

    def drop_trained(self) -> None:
        """Forget models for training, whose weights and gradients are large."""
        trained = [key for key in self._decoders if key[1]]
        for key in trained:
            del self._decoders[key]
        if trained:
            release()

    def mixer(self, name: str, head_dim: int) -> SequenceMixer:
        """One mixer of the scale's heads with this head size, for inference."""
        if (name, head_dim) not in self._mixers:
            shape = MixerShape(
                self.scale.heads * head_dim, self.scale.heads, max_positions=self.scale.longest
            )
            options = parse_options(name, mixer_options(name, self.scale), self.scale.longest)
            torch.manual_seed(SEED)
            with self.device:
                mixer = mixer_class(name)(shape, options)
            cast_for_inference(mixer, self.dtype)
            self._mixers[name, head_dim] = mixer.eval().requires_grad_(False)
        return self._mixers[name, head_dim]

    def parameters(self, mixer: str) -> int:
        """Parameters of the whole model, without building it."""
        if mixer not in self._parameters:
            self._parameters[mixer] = parameter_count(sweep_config(self.scale, mixer))
        return self._parameters[mixer]

    def _build(self, mixer: str) -> DecoderLM:
        torch.manual_seed(SEED)
        with self.device:
            return DecoderLM(sweep_config(self.scale, mixer))


def mixer_options(mixer: str, scale: Scale) -> dict[str, Any]:
    """Options that differ from a mixer's defaults."""
    if mixer in (WINDOW, RULE_WINDOW):
        return {"window": scale.window}
    if mixer == EVICTED:
        return {"eviction": {"policy": "streaming", "fraction": scale.main_fraction}}
    return {}


@functools.cache
def sweep_config(scale: Scale, mixer: str) -> ModelConfig:
    """One architecture at this scale, its parameters matched to the transformer's within 1 %."""
    # The transformer comes first: the others are sized like it.
    order = sorted(MODELS, key=lambda name: name != "transformer")
    config = parse_config(
        {
            "name": "sweep",
            "arms": [
                {"name": arm_name(name), "mixer": name, "options": mixer_options(name, scale)}
                for name in order
            ],
            "data": {"context": scale.longest},
            "model": {
                "layers": scale.layers,
                "width": scale.width,
                "heads": scale.heads,
                "max_positions": scale.longest,
            },
            "measure": None,
            "evaluate": {"language_modelling": None, "needle": None},
        },
        "the sweep's models",
    )
    sized = model_config(config, config.arm(arm_name(mixer)), scale.vocabulary)
    return dataclasses.replace(sized, max_positions=scale.longest)


def arm_name(mixer: str) -> str:
    """The name that rows, tables and figures carry."""
    return mixer.replace("_", "-")


def cast_for_inference(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what inference keeps in low precision; other parameters and all buffers stay."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | RMSNorm | ShortConvolution):
            part.to(dtype)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, shared ones once: what one decode step of a model reads."""
    return sum(one.numel() * one.element_size() for one in module.parameters())


def release() -> None:
    """Give memory of dropped tensors back to the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
