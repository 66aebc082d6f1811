"""The Hybrid Associative Memory layer (arXiv 2603.22325).

Two memories read the same projections. A gated delta rule compresses every token into a state; a
KV cache keeps only the tokens whose value that state failed to predict. Two independent gates per
head add the read-outs. Letters as in `ham.model.mixer`.

The paper published no code. Choices that its readers do not report are ours: where the norms
stand, rotary positions on the attention branch, and that the current token is visible to itself
only if it was routed. `ham.stores` has what else the attention branch may be made to see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from ham.config import Positive, PositiveFloat
from ham.kernels.gated_delta_rule import (
    ScoredOutput,
    gated_delta_rule_scored,
    gated_delta_rule_step,
)
from ham.model.knob import Knob
from ham.model.mixer import (
    MixerAux,
    MixerOptions,
    MixerShape,
    MixerState,
    RoutingHints,
    StateBytes,
)
from ham.model.positions import Positions
from ham.model.two_memories import Projected, TwoMemories
from ham.routing import ThresholdController, head_scores
from ham.routing.controls import positions
from ham.routing.options import RoutingOptions
from ham.routing.router import Router, Routing
from ham.stores import StoreCache, StoreOptions, make_store


class HamOptions(StoreOptions, RoutingOptions):
    """Options of the HAM layer, beside those of its routing and of what it keeps.

    Attributes:
        rope: Rotary positions on the attention branch.
        rope_base: Base of their frequencies.
        conv_size: Width of the short convolution on q, k and v.
    """

    rope: bool = True
    rope_base: PositiveFloat = 10_000.0
    conv_size: Positive = 4

    @model_validator(mode="after")
    def _score_fits_the_budget(self) -> HamOptions:
        if self.score == "recency" and self.budget != "bounded":
            raise ValueError(
                "score 'recency' grows with the position, so no threshold holds a share of it; it "
                f"is legal with budget 'bounded' only, not {self.budget!r}"
            )
        return self


@dataclass
class HamState(MixerState):
    """Recurrent state of every token, convolution inputs, and the cache of the tokens kept."""

    recurrent_BHKV: Tensor
    history_BWC: Tensor
    cache: StoreCache
    positions: Positions

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`."""
        return cls(
            torch.cat([state.recurrent_BHKV for state in states]),
            torch.cat([state.history_BWC for state in states]),
            type(states[0].cache).join([state.cache for state in states]),
            Positions.join([state.positions for state in states]),
        )

    @property
    def position(self) -> int | Tensor:
        """Tokens read: an int while all sequences agree, else an int64 tensor `[B]`."""
        return self.positions.value

    def kept_B(self) -> Tensor:
        """Tokens in the cache of each sequence."""
        return self.cache.kept_B()

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind."""
        return {
            **self.cache.tensors(),
            "recurrent": [self.recurrent_BHKV],
            "conv": [self.history_BWC],
        }

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.recurrent_BHKV = self.recurrent_BHKV[index_B]
        self.history_BWC = self.history_BWC[index_B]
        self.cache.select(index_B)
        self.positions.select(index_B)


class HamMixer(TwoMemories):
    """One HAM layer: recurrent memory of everything, cache of the unpredicted."""

    Options: ClassVar[type[MixerOptions]] = HamOptions
    title: ClassVar[str] = "HAM"
    paper: ClassVar[str] = "Lufkin et al. 2026, arXiv 2603.22325"
    routes: ClassVar[bool] = True
    uses_hints: ClassVar[bool] = True
    # Provider `torch` packs the routed tokens, however many there are.
    one_graph: ClassVar[bool] = False
    operations: ClassVar[tuple[str, ...]] = ("gated_delta_rule", "routed_attention")
    small_options: ClassVar[dict[str, Any]] = {"target": 0.3}
    memory_knobs: ClassVar[tuple[Knob, ...]] = (
        # What a fixed threshold keeps is known only once a model is trained.
        Knob("target", share=True, where={"budget": "threshold", "control": "loop"}),
        Knob("slots", where={"budget": "bounded"}),
        Knob("top_k", where={"budget": "chunk_topk"}),
    )

    def __init__(self, shape: MixerShape, options: HamOptions):
        super().__init__(shape, options)
        self.router = Router(shape, options)
        self.store = make_store(
            options, shape.heads, shape.head_dim, self.router.per_head, shape.kernels
        )

    @property
    def controller(self) -> ThresholdController:
        """The threshold of this layer."""
        return self.router.controller

    def forward(self, x_BTD: Tensor, hints: RoutingHints | None = None) -> tuple[Tensor, MixerAux]:
        """Mix a whole sequence from an empty memory."""
        projected = self._project(x_BTD)
        memory = self._recur(projected)
        routing = self.router(x_BTD, self._state_score(memory, projected), 0, hints)
        attended_BTHV, kept = self.store.attend(
            *projected.attention,
            routing.score,
            routing.routed,
            routing.graded_BT,
        )
        y_BTD = self._combine(x_BTD, memory.o_BTHV, attended_BTHV)
        return y_BTD, routing.aux(kept)

    def score(self, x_BTD: Tensor, hints: RoutingHints | None = None) -> Tensor:
        """Routing score of every token of a sequence read from an empty memory.

        Returns:
            `score_BT`, or `score_BTH` where every head decides alone; detached.
        """
        projected = self._project(x_BTD)
        score = self._state_score(self._recur(projected), projected)
        position_BT = positions(0, x_BTD.shape[1], x_BTD.device)
        return self.router.score(x_BTD, score, position_BT, hints).detach()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> HamState:
        """Empty memories for a batch."""
        heads, head_dim = self.shape.heads, self.shape.head_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return HamState(
            torch.zeros(batch_size, heads, head_dim, head_dim, device=device, dtype=wide),
            self.conv.init_history(batch_size, device, dtype),
            self.store.init_cache(batch_size, device, dtype),
            Positions.zeros(batch_size, device),
        )

    def prefill(
        self, x_BTD: Tensor, state: HamState, hints: RoutingHints | None = None
    ) -> tuple[Tensor, MixerAux]:
        """Continue from `state` with T tokens at once and update it."""
        projected = self._project(x_BTD, state.history_BWC, state.position)
        memory = self._recur(projected, state.recurrent_BHKV)
        score_BTH = self._state_score(memory, projected)
        routing = self.router(x_BTD, score_BTH, state.position, hints)
        attended_BTHV, kept = self._attend_cached(projected, routing, state)
        state.recurrent_BHKV = memory.final_state_BHKV
        state.history_BWC = projected.history_BWC
        state.positions.advance(x_BTD.shape[1])
        y_BTD = self._combine(x_BTD, memory.o_BTHV, attended_BTHV)
        return y_BTD, routing.aux(kept)

    def step(self, x_BD: Tensor, state: HamState, hints: RoutingHints | None = None) -> Tensor:
        """Continue from `state` with one token and update it."""
        x_BTD = x_BD[:, None]
        projected = self._project(x_BTD, state.history_BWC, state.position)
        o_BHV, state.recurrent_BHKV, prediction_BHV = gated_delta_rule_step(
            *(part[:, 0] for part in projected.recurrent), state.recurrent_BHKV
        )
        score_BTH = self._score_of_prediction(prediction_BHV[:, None], projected)
        routing = self.router(x_BTD, score_BTH, state.position, hints)
        attended_BTHV, _ = self._attend_cached(projected, routing, state)
        state.history_BWC = projected.history_BWC
        state.positions.advance(1)
        return self._combine(x_BTD, o_BHV[:, None], attended_BTHV)[:, 0]

    def end_step(self) -> None:
        """Let the threshold follow what the optimiser step observed, for a layer used alone."""
        self.controller.end_step()

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one forward pass; every query attends, only keys are thinned."""
        return self._token_flops(context) + self.store.forward_flops(context, kv_fraction)

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one decode step with `position` tokens already read."""
        return self._token_flops(1) + self.store.decode_flops(position, kv_fraction)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Declared bytes of one sequence's memories after `position` tokens."""
        recurrent, conv = self._recurrent_and_conv_bytes(element_size)
        cache = self.store.state_bytes(position, kv_fraction, element_size)
        return dataclasses.replace(
            cache,
            recurrent=recurrent,
            conv=conv,
            allocated=cache.allocated + recurrent + conv,
        )

    def _recur(self, projected: Projected, state_BHKV: Tensor | None = None) -> ScoredOutput:
        return gated_delta_rule_scored(
            *projected.recurrent,
            score=self.router.kernel_score,
            initial_state_BHKV=state_BHKV,
            provider=self.shape.kernels,
        )

    def _state_score(self, memory: ScoredOutput, projected: Projected) -> Tensor | None:
        """`score_BTH` from what the recurrence gave; None where routing needs none of it."""
        if memory.score_BTH is None:
            return None
        return self.router.state_score(memory.score_BTH, projected.v_BTHV, projected.beta_BTH)

    def _score_of_prediction(self, prediction_BTHV: Tensor, projected: Projected) -> Tensor | None:
        """The same from the predictions themselves."""
        if self.router.kernel_score is None:
            return None
        name = self.options.score
        return head_scores(name, prediction_BTHV, projected.v_BTHV, projected.beta_BTH)

    def _attend_cached(
        self, projected: Projected, routing: Routing, state: HamState
    ) -> tuple[Tensor, Tensor]:
        return self.store.attend_cached(
            *projected.attention,
            routing.score,
            routing.routed,
            state.cache,
            state.position,
        )

    def _attention_values(self, v_BTHV: Tensor) -> Tensor:
        return self.attention_norm(v_BTHV) if self._has_sink else v_BTHV

    @property
    def _norms_attended(self) -> bool:
        return not self._has_sink

    @property
    def _has_sink(self) -> bool:
        """With a sink the attention norm stands on the values: norm(c o) = norm(o) undoes it."""
        return self.options.sink != "none"
