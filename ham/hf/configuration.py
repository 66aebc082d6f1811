"""`HamConfig`: the configuration of a model in `config.json`, as transformers reads it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ham.errors import ConfigError
from ham.model.checkpoint import HF_CONFIG_KEY, HF_MODEL_TYPE
from ham.model.model_config import ModelConfig


class HamConfig(PretrainedConfig):
    """A `ModelConfig` under the key `ham`, and the special tokens.

    The names that other tools look for (`vocab_size`, `hidden_size`, `max_position_embeddings`
    and the like) are read from it, so `config.json` says nothing twice.

    Attributes:
        ham: The model configuration as `ModelConfig.to_dict` gives it.
        facts: What the checkpoint says of its training.
        bos_token_id, eos_token_id, pad_token_id: The end-of-text token, in all three roles.

    Raises:
        ConfigError: If the file asks for weights in another file than `model.safetensors`.
    """

    model_type = HF_MODEL_TYPE
    keys_to_ignore_at_inference = ("cache",)

    ham: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if "transformers_weights" in kwargs:
            # Through this key transformers would read a file that is a pickle.
            raise ConfigError(
                f"config.json sets transformers_weights to {kwargs['transformers_weights']!r}; "
                "weights of this model are read from model.safetensors only"
            )
        super().__post_init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The configuration of the decoder.

        Raises:
            ConfigError: If there is none, or if it is not valid.
        """
        if self.ham is None:
            raise ConfigError(
                f"config.json has no model configuration under the key {HF_CONFIG_KEY!r}"
            )
        return ModelConfig.from_dict(self.ham)

    @classmethod
    def from_model_config(
        cls, config: ModelConfig, end_of_text: int | None = None, facts: dict | None = None
    ) -> HamConfig:
        """Wrap a decoder's configuration; `end_of_text` becomes all three special tokens."""
        return cls(
            ham=config.to_dict(),
            facts=facts,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids."""
        return self._of_decoder("vocabulary_size")

    @property
    def hidden_size(self) -> int | None:
        """Model width."""
        return self._of_decoder("width")

    @property
    def intermediate_size(self) -> int | None:
        """Hidden width of the SwiGLU."""
        return self._of_decoder("mlp_width")

    @property
    def num_hidden_layers(self) -> int | None:
        """Number of layers."""
        return self._of_decoder("layers")

    @property
    def num_attention_heads(self) -> int | None:
        """Number of heads."""
        return self._of_decoder("heads")

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest sequence that the model may read, in tokens."""
        return self._of_decoder("max_positions")

    def _of_decoder(self, name: str) -> int | None:
        return None if self.ham is None else self.model_config().to_dict()[name]
