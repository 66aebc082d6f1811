"""What a configuration may say about eviction; loads no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ham.config_types import NonNegative, Positive, Strict

OWN_OPTIONS: dict[str, dict[str, int | None]] = {
    "random": {"seed": None},
    "streaming": {"sinks": 4},
    "norm": {},
    "snapkv": {"observation": 16, "kernel": 7},
}
"""The options that each policy takes and no other one, with their defaults."""


class EvictionConfig(Strict):
    """Which tokens leave the cache of a trained transformer, and when."""

    policy: Literal["random", "streaming", "norm", "snapkv"] = Field(
        description="random: by a hash of the position; streaming: the first and the last tokens "
        "stay (arXiv 2309.17453); norm: keys of small norm stay (arXiv 2406.11430); snapkv: keys "
        "that the last queries attended to stay (arXiv 2404.14469)."
    )
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="Share of the tokens read that stays; or give `tokens`."
    )
    tokens: Positive | None = Field(default=None, description="Tokens that stay, in every layer.")
    interval: Positive = Field(
        default=16, description="Tokens from one eviction to the next; all of them have a slot."
    )
    skip_layers: NonNegative = Field(
        default=0, description="First layers that keep everything (2 in arXiv 2406.11430)."
    )
    seed: NonNegative | None = Field(
        default=None,
        description="random: seed of the hash; that of the checkpoint's training when null.",
    )
    sinks: NonNegative | None = Field(
        default=None, description="streaming: first tokens of the text that stay."
    )
    observation: Positive | None = Field(
        default=None, description="snapkv: last queries before an eviction, whose attention counts."
    )
    kernel: Positive | None = Field(
        default=None, description="snapkv: width of the max-pooling over positions; odd."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_policy(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = OWN_OPTIONS.get(str(values.get("policy")), {})
        return {**own, **{name: value for name, value in values.items() if value is not None}}

    @model_validator(mode="after")
    def _options_fit(self) -> EvictionConfig:
        if (self.fraction is None) == (self.tokens is None):
            raise ValueError(
                f"give either fraction or tokens; received fraction {self.fraction}, "
                f"tokens {self.tokens}"
            )
        for policy, names in OWN_OPTIONS.items():
            for name in names:
                value = getattr(self, name)
                if policy != self.policy and value is not None:
                    raise ValueError(
                        f"{name} {value} is an option of policy {policy!r}, not of {self.policy!r}"
                    )
        if self.observation is not None and self.observation > self.interval:
            raise ValueError(
                f"observation {self.observation} is more than the interval; "
                f"legal: 1..{self.interval} (interval)"
            )
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even; legal: 1, 3, 5, ...")
        if self.tokens is not None and self.tokens <= self.always_kept:
            raise ValueError(
                f"tokens {self.tokens} leaves no room beside the {self.always_kept} that policy "
                f"{self.policy!r} always keeps; legal: at least {self.always_kept + 1}"
            )
        return self

    @property
    def always_kept(self) -> int:
        """Tokens that no eviction removes: the sinks, or the observed ones."""
        return self.sinks or self.observation or 0
