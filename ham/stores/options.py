"""Options of what the attention branch may read: the budget of the cache, and what else is visible.

Their own module, because the options are checked before any layer is built.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ham.config import NonNegative, Positive
from ham.errors import ConfigError
from ham.model.mixer import MixerOptions

BudgetName = Literal["threshold", "bounded", "chunk_topk"]
SinkName = Literal["none", "zero", "learned"]

SIZES = {"threshold": (), "bounded": ("slots",), "chunk_topk": ("chunk", "top_k")}
"""The options that each budget needs and no other one takes."""


class StoreOptions(MixerOptions):
    """Which tokens a query of the attention branch sees.

    Attributes:
        budget: `threshold`, every token whose score reaches the threshold (HAM, arXiv 2603.22325);
            `bounded`, the `slots` largest scores so far (HOLA, arXiv 2607.02303); `chunk_topk`,
            the `top_k` largest scores of every finished chunk of `chunk` tokens (B'MOJO,
            arXiv 2407.06324).
        slots: Size of the bounded cache in tokens.
        chunk: Tokens of one chunk.
        top_k: Tokens of one chunk that enter the cache.
        window: The most recent tokens that are always visible, the query's own included.
        self_visible: The query's own token is always visible: a window of 1. A `window` of 1 or
            more includes it already.
        sink: A null key per head, whose value is zero: `zero` has the logit 0, `learned` a trained
            key. With a sink the norm of the attention branch stands on the values that enter the
            memory, not on the read-out, because a norm of the read-out would undo what the
            sink takes away.
    """

    budget: BudgetName = "threshold"
    slots: Positive | None = None
    chunk: Positive | None = None
    top_k: Positive | None = None
    window: NonNegative = 0
    self_visible: bool = False
    sink: SinkName = "none"

    @property
    def visible_window(self) -> int:
        """Tokens that are visible whatever the cache holds, the query's own first."""
        return max(self.window, int(self.self_visible))

    @model_validator(mode="after")
    def _sizes_fit_the_budget(self) -> StoreOptions:
        for budget, names in SIZES.items():
            for name in names:
                value = getattr(self, name)
                if budget == self.budget and value is None:
                    raise ValueError(f"budget {budget!r} needs {' and '.join(names)}: no {name}")
                if budget != self.budget and value is not None:
                    raise ValueError(
                        f"{name} {value} is an option of budget {budget!r}, not of {self.budget!r}"
                    )
        if self.budget == "chunk_topk" and self.top_k > self.chunk:
            raise ValueError(
                f"top_k {self.top_k} is more than a chunk has: legal: 1..{self.chunk} (chunk)"
            )
        return self

    def check_context(self, context: int) -> None:
        """Refuse sizes that the training context never fills: they would train something else."""
        for name in ("slots", "chunk", "window"):
            value = getattr(self, name)
            if value is not None and value > context:
                raise ConfigError(
                    f"{name} {value} is larger than the training context {context}; "
                    f"legal: at most {context}"
                )
