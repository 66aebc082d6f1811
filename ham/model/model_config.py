"""What is needed to build a model, as it is stored beside the weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ham.errors import ConfigError

if TYPE_CHECKING:
    from ham.model.decoder import DecoderLM


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a model; stored beside its weights.

    Attributes:
        arm: Name of the arm in the comparison.
        mixer: Registered mixer class; `options` are its options.
        placement: `{"layers": [...], "mixer": name, "options": {...}}`: the layers that `mixer`
            takes, and the mixer of the others; None where every layer takes `mixer`.
        vocabulary_size: Number of token ids.
        mlp_width: Hidden width of the SwiGLU.
        max_positions: Longest sequence the model may read.
        context: Training context.
        tokenizer: Name of the tokenizer.
        kernels: Provider of the operations in `kernels/`, or `auto`.
        seed: Of the training. Rules that choose tokens by a hash take it where their options name
            no seed, so that seeds of an arm differ in what chance picks. Models stored without it
            were trained with 0 in its place.
    """

    arm: str
    mixer: str
    vocabulary_size: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    options: dict[str, Any] = field(default_factory=dict)
    max_positions: int = 8192
    context: int = 512
    tokenizer: str = "byte"
    kernels: str = "auto"
    placement: dict[str, Any] | None = None
    seed: int = 0

    def layer_mixer(self, layer: int) -> tuple[str, dict[str, Any]]:
        """Name and options of the mixer in one layer."""
        if self.placement is None or layer in self.placement["layers"]:
            return self.mixer, self.options
        return self.placement["mixer"], self.placement["options"]

    def build(self) -> DecoderLM:
        """A decoder with new weights, drawn from torch's random numbers.

        Raises:
            ConfigError: For an unknown mixer or options it refuses.
        """
        from ham.model.decoder import DecoderLM

        return DecoderLM(self)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: For missing or unknown fields.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"not a model configuration: {error}") from error
