"""What the decode launchers take: groups of tensors, with their checks, and scratch memory.

Letters as in `ham.model.mixer`; R rows of the cache, one per sequence, or one per sequence and head
where every head decides for itself (`per_head`); G heads on a page, H or then 1; P pages a row may
have, S splits of the attention, W width of the short convolution, C = 2 H K + H V its channels,
M positions in the rotary table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ham.errors import ConfigError, unknown_choice

SCORES = ("cosine", "l2", "committed", "post_update", "given")
REDUCTIONS = ("min", "mean", "max", "per_head")
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 128
NAN_SCORES, NO_SLOT = 0, 1
"""Places in `faults_2`: decisions with a NaN for a score; tokens routed, but without a page."""


@dataclass(frozen=True)
class Recurrence:
    """Parameters and memory of the recurrent branch.

    Attributes:
        conv_weight_WC: Weights of the short convolution, the newest input last.
        log_rate_H, step_bias_H: Float32; of the decay, see `DecayAndWriteGates`.
        history_BWC: The last W - 1 inputs of the convolution; updated in place.
        state_BHKV: Float32; updated in place.
    """

    conv_weight_WC: Tensor
    log_rate_H: Tensor
    step_bias_H: Tensor
    history_BWC: Tensor
    state_BHKV: Tensor


@dataclass(frozen=True)
class Attention:
    """Parameters of the attention branch.

    Attributes:
        q_gain_K, k_gain_K: Gains of the norms of queries and keys.
        cos_MK, sin_MK: Float32 rotary tables with K / 2 columns, or None for no rotation.
    """

    q_gain_K: Tensor
    k_gain_K: Tensor
    cos_MK: Tensor | None = None
    sin_MK: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """Who enters the cache: a token whose score reaches the threshold.

    Attributes:
        score: One of `SCORES`; `post_update` is (1 - b) |v - p|, `given` reads `given_R`.
        reduction: One of `REDUCTIONS`: how heads agree, or that each decides alone.
        threshold_1: Float32, on the device; read at every step.
        given_R: Float32 scores made elsewhere, or None.
    """

    score: str
    reduction: str
    threshold_1: Tensor
    given_R: Tensor | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown_choice("score", self.score, SCORES)
        if self.reduction not in REDUCTIONS:
            raise unknown_choice("reduction", self.reduction, REDUCTIONS)
        if (self.score == "given") != (self.given_R is not None):
            got = "none" if self.given_R is None else "some"
            raise ConfigError(
                f"score {self.score!r} came with {got} in given_R; it is for score 'given' only, "
                "which needs it"
            )

    @property
    def per_head(self) -> bool:
        """Whether every head decides for itself."""
        return self.reduction == "per_head"


@dataclass(frozen=True)
class Pages:
    """The routed cache of one layer; `layout.py` says what a page looks like.

    Attributes:
        page_table_RP: Int64 byte addresses of the pages of each row in order, multiples of 16; 0
            where there is none.
        counts_R: Int32 tokens in each row's pages; the step kernel adds to it.
        page_tokens: Tokens on a page, a power of two from 8 on.
        dtype: Of keys and values.
    """

    page_table_RP: Tensor
    counts_R: Tensor
    page_tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        tokens = self.page_tokens
        if tokens < 8 or tokens & (tokens - 1):
            raise ConfigError(f"page_tokens is {tokens}; legal are powers of two from 8 on")
        if self.dtype not in ACTIVATIONS:
            raise unknown_choice("cache dtype", self.dtype, map(str, ACTIVATIONS))


@dataclass(frozen=True)
class AttentionTile:
    """How paged attention is cut.

    Attributes:
        tokens: Keys a program reads at a time, a power of two.
        splits: Programs that share one head of one sequence.
        warps: Warps per program.
        fused: Whether the last program of a head to finish also combines, which saves a launch.
    """

    tokens: int = 32
    splits: int = 16
    warps: int = 4
    fused: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens & (self.tokens - 1):
            raise ConfigError(f"tokens of a tile is {self.tokens}; legal are powers of two")
        if self.splits < 1:
            raise ConfigError(f"splits is {self.splits}; legal are numbers from 1 on")


@dataclass(frozen=True)
class DecodeScratch:
    """Memory between the launches of one step, and what a step reports; made once, then reused.

    Layers that run one after the other may share it. Counters must be 0 between steps, which the
    kernels see to.

    Attributes:
        q_BHK: Attention queries.
        o_BHV: Read-outs of the recurrence.
        head_scores_BH: Float32 scores before the heads agree.
        score_R, routed_R: Float32 score and int8 decision of the last step.
        partial_o_BHSV, partial_lm_BHS2: Float32 sums of weighted values, and sum of weights with
            largest score (log2), of each split.
        arrivals_B, arrivals_BH: Int32; programs that have finished.
        faults_2: Int32 counts, see `NAN_SCORES` and `NO_SLOT`; whoever reads them resets them.
    """

    q_BHK: Tensor
    o_BHV: Tensor
    head_scores_BH: Tensor
    score_R: Tensor
    routed_R: Tensor
    partial_o_BHSV: Tensor
    partial_lm_BHS2: Tensor
    arrivals_B: Tensor
    arrivals_BH: Tensor
    faults_2: Tensor

    @classmethod
    def make(
        cls,
        batch: int,
        heads: int,
        key_size: int,
        value_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        splits: int = 16,
        per_head: bool = False,
    ) -> DecodeScratch:
        """Allocate for activations in `dtype`."""

        def floats(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        rows = batch * heads if per_head else batch
        return cls(
            q_BHK=floats(batch, heads, key_size, of=dtype),
            o_BHV=floats(batch, heads, value_size, of=dtype),
            head_scores_BH=floats(batch, heads),
            score_R=floats(rows),
            routed_R=floats(rows, of=torch.int8),
            partial_o_BHSV=floats(batch, heads, splits, value_size),
            partial_lm_BHS2=floats(batch, heads, splits, 2),
            arrivals_B=floats(batch, of=torch.int32),
            arrivals_BH=floats(batch, heads, of=torch.int32),
            faults_2=floats(2, of=torch.int32),
        )


def check(name: str, tensor: Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """Raise `ConfigError` unless a tensor is contiguous, of this shape and of one of the dtypes."""
    if tuple(tensor.shape) != tuple(shape):
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; needed is {tuple(shape)}")
    if dtypes and tensor.dtype not in dtypes:
        legal = ", ".join(map(str, dtypes))
        raise ConfigError(f"{name} has dtype {tensor.dtype}; legal: {legal}")
    if not tensor.is_contiguous():
        raise ConfigError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def check_recurrence(qkv_BC: Tensor, raw_B2H: Tensor, parts: Recurrence) -> None:
    """Raise `ConfigError` for inputs of the recurrent step that do not fit together."""
    batch, heads, key_size, value_size = parts.state_BHKV.shape
    if max(key_size, value_size) > LARGEST_HEAD:
        raise ConfigError(
            f"head sizes are {key_size} and {value_size}; the decode kernels take 1 to "
            f"{LARGEST_HEAD}"
        )
    channels = heads * (2 * key_size + value_size)
    width = parts.conv_weight_WC.shape[0]
    check("qkv_BC", qkv_BC, (batch, channels), *ACTIVATIONS)
    check("raw_B2H", raw_B2H, (batch, 2 * heads), *ACTIVATIONS)
    check("conv_weight_WC", parts.conv_weight_WC, (width, channels), *ACTIVATIONS)
    check("history_BWC", parts.history_BWC, (batch, width - 1, channels), *ACTIVATIONS)
    check("state_BHKV", parts.state_BHKV, parts.state_BHKV.shape, torch.float32)
    check("log_rate_H", parts.log_rate_H, (heads,), torch.float32)
    check("step_bias_H", parts.step_bias_H, (heads,), torch.float32)


def check_pages(pages: Pages, rows: int) -> None:
    """Raise `ConfigError` for a page table or counts of another number of rows."""
    check("page_table_RP", pages.page_table_RP, (rows, pages.page_table_RP.shape[1]), torch.int64)
    check("counts_R", pages.counts_R, (rows,), torch.int32)
