"""The arms of an experiment: what each may be, and which layers get its mixer.

Part of `ham.config`, which has these names as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ham.config_types import NonNegative, Positive, Strict
from ham.eviction.options import EvictionConfig

EVICTED_MIXER, EVICTABLE_MIXER = "transformer_evicted", "transformer"
"""What stands in the layers of an arm with `eviction`, and what they were trained as."""


class BetweenConfig(Strict):
    """The mixer of the layers that an arm's own mixer leaves out."""

    mixer: str = Field(description="A registered baseline; `ham baselines list` names them.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of that mixer; checked by the mixer itself."
    )


class PlacementConfig(Strict):
    """The arm's mixer in chosen layers only, another one in the others."""

    layers: Annotated[list[NonNegative], Field(min_length=1)] | None = Field(
        default=None, description="Layers of the arm's own mixer, counted from 0."
    )
    every: Positive | None = Field(
        default=None,
        description="Instead of `layers`: every n-th layer, so layers n - 1, 2 n - 1, ...",
    )
    between: BetweenConfig

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> PlacementConfig:
        if (self.layers is None) == (self.every is None):
            raise ValueError(
                "give either layers or every, not both or neither; received layers "
                f"{self.layers}, every {self.every}"
            )
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must differ; received {self.layers}")
        return self

    def chosen(self, layers: int) -> list[int]:
        """The layers that the arm's own mixer takes, out of `layers`.

        Raises:
            ValueError: If one is out of range, or none is left.
        """
        if self.layers is not None:
            outside = [layer for layer in self.layers if layer >= layers]
            if outside:
                raise ValueError(
                    f"layers {outside} are out of range; the model has layers 0..{layers - 1}"
                )
            return sorted(self.layers)
        if self.every > layers:
            raise ValueError(f"every {self.every} chooses none of {layers} layers")
        return list(range(self.every - 1, layers, self.every))


class ExternalConfig(Strict):
    """A causal language model of another library, built from its configuration."""

    library: Literal["transformers", "fla"] = Field(
        default="transformers", description="fla: flash-linear-attention."
    )
    model_type: str = Field(description="What the library calls it, e.g. llama or gated_deltanet.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Values of the model's own configuration; sizes default to those of `model`.",
    )


class ArmConfig(Strict):
    """One arm of the comparison, under a name of its own.

    A registered mixer with its options in the common decoder; the weights of such an arm with
    eviction; a model of another library, trained like the others; or a model that was trained
    elsewhere. The second and the last are only evaluated and measured.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.@-]*$")]
    mixer: str = Field(
        default="",
        description="A registered baseline; `ham baselines list` names them. Left out with "
        "`checkpoint_of`, `external` and `checkpoint`.",
    )
    external: ExternalConfig | None = Field(
        default=None, description="Instead of a mixer: a model of another library."
    )
    checkpoint: str | None = Field(
        default=None,
        description="Instead of a mixer: a Hugging Face folder, for evaluation and measurement.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of that mixer; checked by the mixer itself."
    )
    placement: PlacementConfig | None = Field(
        default=None, description="Which layers get it; null: all of them."
    )
    steps: Positive | None = Field(
        default=None,
        description="Training steps in place of train.steps, for arms at equal FLOPs.",
    )
    seeds: Annotated[list[NonNegative], Field(min_length=1)] | None = Field(
        default=None,
        description="In place of the experiment's seeds, e.g. more where a main claim rests on it.",
    )
    tuned_like: str | None = Field(
        default=None,
        description="With `tuning`: take the learning rate chosen for this earlier arm, one of the "
        "same architecture, instead of trying the rates again.",
    )
    checkpoint_of: str | None = Field(
        default=None,
        description="Instead of training, take the weights of this arm, a plain transformer.",
    )
    eviction: EvictionConfig | None = Field(
        default=None, description="With `checkpoint_of`: which tokens leave its cache."
    )

    @model_validator(mode="before")
    @classmethod
    def _mixer_of_eviction(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("eviction") and not values.get("mixer"):
            return {**values, "mixer": EVICTED_MIXER}
        return values

    @model_validator(mode="after")
    def _trained_or_evicted(self) -> ArmConfig:
        if (self.checkpoint_of is None) != (self.eviction is None):
            raise ValueError(
                f"arm {self.name!r}: checkpoint_of and eviction go together; received "
                f"checkpoint_of {self.checkpoint_of!r} and "
                f"{'no ' if self.eviction is None else ''}eviction"
            )
        if self.checkpoint_of is None:
            return self
        if self.mixer != EVICTED_MIXER or self.options or self.placement or self.steps:
            raise ValueError(
                f"arm {self.name!r}: mixer, options, placement and steps are those of arm "
                f"{self.checkpoint_of!r}; legal beside checkpoint_of: name and eviction"
            )
        return self

    @model_validator(mode="after")
    def _one_kind(self) -> ArmConfig:
        kinds = ("mixer", "external", "checkpoint")
        given = [kind for kind in kinds if getattr(self, kind)]
        if len(given) != 1:
            received = " and ".join(given) or "none"
            raise ValueError(
                f"arm {self.name!r}: mixer is missing or not alone; give one of "
                f"{', '.join(kinds)}; received {received}"
            )
        if not self.mixer and (self.options or self.placement):
            raise ValueError(
                f"arm {self.name!r}: options and placement go with a mixer, not with {given[0]}"
            )
        if self.checkpoint and self.steps:
            raise ValueError(f"arm {self.name!r}: steps go with training, not with a checkpoint")
        return self

    @property
    def trained(self) -> bool:
        """Whether the experiment trains it; if not, its weights are another arm's or a folder's."""
        return self.checkpoint_of is None and self.checkpoint is None

    @property
    def architecture(self) -> str:
        """The registered mixer, `LIBRARY:MODEL_TYPE`, or `checkpoint`; the `mixer` of its rows."""
        if self.external is not None:
            return f"{self.external.library}:{self.external.model_type}"
        return self.mixer or "checkpoint"

    @property
    def mixers(self) -> list[str]:
        """The registered mixers that its layers use, its own first."""
        between = [] if self.placement is None else [self.placement.between.mixer]
        own = [self.mixer] if self.mixer else []
        return list(dict.fromkeys([*own, *between]))

    @property
    def code(self) -> list[str]:
        """What its own code is: registered mixers, and packages by their dotted names."""
        return self.mixers or ["ham.external"]
