"""What an experiment's models read: the `data` part of its configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ham.config_types import Fraction, Positive, Strict


class HubDataConfig(Strict):
    """A data set of the Hugging Face hub, read as a stream."""

    dataset: str = Field(description="Name on the hub, e.g. HuggingFaceFW/fineweb-edu.")
    subset: str | None = Field(default=None, description="Configuration of the data set.")
    split: str = "train"
    text_field: str = "text"
    train_tokens: Positive = Field(description="Tokens to write to the training shard.")
    held_out_tokens: Positive = Field(
        default=1_000_000, description="Tokens for each of calibration, validation and test."
    )


class DataConfig(Strict):
    """What the models read."""

    source: Literal["public_domain", "hub"] = "public_domain"
    hub: HubDataConfig | None = None
    tokenizer: str = Field(
        default="byte",
        description="'byte', 'bpe-4096' (trained locally) or 'hub:NAME' (a tokenizer of the hub).",
    )
    context: Annotated[int, Field(ge=16)] = Field(
        default=512, description="Training context in tokens."
    )
    recall_fraction: Fraction = Field(
        default=0.1, description="Share of training rows that are synthetic recall documents."
    )

    @model_validator(mode="after")
    def _hub_is_described(self) -> DataConfig:
        if (self.source == "hub") != (self.hub is not None):
            raise ValueError("data.hub must be given exactly when data.source is 'hub'")
        if self.tokenizer not in ("byte", "bpe-4096") and not self.tokenizer.startswith("hub:"):
            raise ValueError(
                f"unknown tokenizer {self.tokenizer!r}; known: byte, bpe-4096, hub:NAME"
            )
        return self
