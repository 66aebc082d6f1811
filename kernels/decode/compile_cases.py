"""Launches of the decode kernels that the static gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.kernels.compile_cases import CompileCase
from ham.kernels.decode.arguments import (
    Attention,
    AttentionTile,
    DecodeScratch,
    Pages,
    Recurrence,
    Routing,
)
from ham.kernels.decode.blocks import add_rms_norm, gated_rms_norm, rope_append, silu_multiply
from ham.kernels.decode.launch import combine, paged_attention, recurrent_step, step
from ham.kernels.decode.prompt import PromptTokens, fill_pages

HEADS, CONV_SIZE, POSITIONS, PAGES, WIDTH = 2, 4, 16, 4, 1024
PROMPT = 100
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """One layer of two heads, and how its launches are cut.

    Attributes:
        warps: Warps of the step, None for the usual number.
    """

    key_size: int
    value_size: int
    dtype: torch.dtype = torch.bfloat16
    page_tokens: int = 32
    score: str = "cosine"
    reduction: str = "min"
    tile: AttentionTile = field(default_factory=AttentionTile)
    warps: int | None = None

    @property
    def name(self) -> str:
        """Readable and unique."""
        name = f"K{self.key_size} V{self.value_size} {SHORT_NAMES[self.dtype]}"
        if (self.score, self.reduction) != ("cosine", "min"):
            name += f" {self.score} {self.reduction}"
        return name

    @property
    def tile_name(self) -> str:
        """Page and tile, readable."""
        tile = self.tile
        name = f"page{self.page_tokens} BN{tile.tokens} S{tile.splits} w{tile.warps}"
        return name + (" fused" if tile.fused else "")

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this problem."""
        return torch.zeros(*shape, dtype=dtype or self.dtype)

    def recurrence(self) -> Recurrence:
        """Parameters and memory of one sequence."""
        wide = torch.float32
        return Recurrence(
            self.zeros(CONV_SIZE, self.channels, dtype=wide),
            self.zeros(HEADS, dtype=wide),
            self.zeros(HEADS, dtype=wide),
            self.zeros(1, CONV_SIZE - 1, self.channels),
            self.zeros(1, HEADS, self.key_size, self.value_size, dtype=wide),
        )

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return HEADS * (2 * self.key_size + self.value_size)

    @property
    def per_head(self) -> bool:
        """Whether every head decides for itself."""
        return self.reduction == "per_head"

    def pages(self) -> Pages:
        """An empty cache."""
        rows = HEADS if self.per_head else 1
        table_RP = self.zeros(rows, PAGES, dtype=torch.int64)
        counts_R = self.zeros(rows, dtype=torch.int32)
        return Pages(table_RP, counts_R, self.page_tokens, self.dtype)

    def scratch(self) -> DecodeScratch:
        """Scratch memory of one sequence."""
        return DecodeScratch.make(
            1,
            HEADS,
            self.key_size,
            self.value_size,
            self.dtype,
            torch.get_default_device(),
            splits=self.tile.splits,
            per_head=self.per_head,
        )

    def launch_recurrent_step(self) -> None:
        """The recurrent layer."""
        o_BHV = self.zeros(1, HEADS, self.value_size)
        qkv_BC, raw_B2H = self.zeros(1, self.channels), self.zeros(1, 2 * HEADS)
        recurrent_step(qkv_BC, raw_B2H, self.recurrence(), o_BHV, warps=self.warps)

    def launch_step(self) -> None:
        """The first launch of a HAM layer."""
        wide = torch.float32
        gain_K = self.zeros(self.key_size, dtype=wide)
        table_MK = self.zeros(POSITIONS, self.key_size // 2, dtype=wide)
        rows = HEADS if self.per_head else 1
        given_R = self.zeros(rows, dtype=wide) if self.score == "given" else None
        step(
            self.zeros(1, self.channels),
            self.zeros(1, 2 * HEADS),
            self.recurrence(),
            Attention(gain_K, gain_K, table_MK, table_MK),
            Routing(self.score, self.reduction, self.zeros(1, dtype=wide), given_R),
            self.pages(),
            self.zeros(1, dtype=torch.int64),
            self.scratch(),
            warps=self.warps,
        )

    def launch_attention(self) -> None:
        """The launches after the first."""
        gain_V = self.zeros(self.value_size, dtype=torch.float32)
        y_BHV = self.zeros(1, HEADS, self.value_size)
        scratch, gates_B2H = self.scratch(), self.zeros(1, 2 * HEADS)
        arguments = scratch, gates_B2H, gain_V, gain_V, y_BHV
        paged_attention(self.pages(), *arguments, tile=self.tile, per_head=self.per_head)
        if not self.tile.fused:
            combine(*arguments, tile=self.tile)

    def launch_fill(self) -> None:
        """Routed tokens of a prompt to their pages."""
        wide = torch.int64
        tokens = PromptTokens(
            1,
            PROMPT,
            HEADS,
            self.key_size,
            self.value_size,
            self.dtype,
            self.zeros(2, 2, dtype=wide),
            True,
            self.zeros(2, PROMPT, dtype=wide),
            self.zeros(2, dtype=wide),
        )
        fill_pages(tokens, self.zeros(3, PAGES, dtype=wide), self.page_tokens)

    def launch_blocks(self) -> None:
        """The small kernels."""
        row_BD, wide = self.zeros(1, WIDTH), torch.float32
        add_rms_norm(row_BD, row_BD, self.zeros(WIDTH, dtype=wide), row_BD, row_BD)
        silu_multiply(self.zeros(1, 2 * WIDTH), row_BD)
        heads = WIDTH // self.key_size
        o_BHV = row_BD.view(1, heads, self.key_size)
        gated_rms_norm(o_BHV, row_BD, self.zeros(self.key_size, dtype=wide), row_BD)
        table_MK = self.zeros(POSITIONS, self.key_size // 2, dtype=wide)
        cache_BNHK = self.zeros(1, POSITIONS, heads, self.key_size)
        positions_B = self.zeros(1, dtype=torch.int64)
        qkv_BC = self.zeros(1, 3 * WIDTH)
        rope_append(qkv_BC, table_MK, table_MK, positions_B, o_BHV, cache_BNHK, cache_BNHK)


USUAL = (Problem(128, 128), Problem(64, 64))
LAYERS = (
    *USUAL,
    Problem(32, 32),
    Problem(16, 16),
    Problem(64, 128),
    Problem(72, 40),
    Problem(128, 128, torch.float16),
    Problem(128, 128, torch.float32),
    Problem(64, 64, torch.float32),
    Problem(128, 128, score="committed", reduction="mean"),
    Problem(128, 128, score="post_update", reduction="per_head"),
    Problem(64, 64, score="given", reduction="max"),
    Problem(64, 64, score="l2", reduction="per_head"),
)
TILES = (
    (32, AttentionTile()),
    (32, AttentionTile(fused=True)),
    (16, AttentionTile(tokens=64)),
    (32, AttentionTile(tokens=64)),
    (32, AttentionTile(tokens=64, warps=8)),
    (64, AttentionTile(tokens=64)),
    (64, AttentionTile()),
    (16, AttentionTile(tokens=16, warps=2)),
)


def _cases() -> Iterator[CompileCase]:
    yield CompileCase(f"blocks {USUAL[1].name}", USUAL[1].launch_blocks)
    for problem in LAYERS:
        default = problem in USUAL
        yield CompileCase(f"step {problem.name}", problem.launch_step, default=default)
        if (problem.score, problem.reduction) == ("cosine", "min"):
            yield CompileCase(
                f"recurrent step {problem.name}",
                problem.launch_recurrent_step,
                default=problem == USUAL[0],
            )
    for problem in LAYERS:
        if (problem.score, problem.reduction) != ("cosine", "min"):
            continue
        default = problem == USUAL[1]
        yield CompileCase(f"fill {problem.name}", problem.launch_fill, default=default)
        for page, tile in TILES:
            cut = Problem(
                problem.key_size, problem.value_size, problem.dtype, page_tokens=page, tile=tile
            )
            name = f"attention {cut.name} {cut.tile_name}"
            default = problem in USUAL and tile == AttentionTile() and page == 32
            yield CompileCase(name, cut.launch_attention, default=default)


COMPILE_CASES: tuple[CompileCase, ...] = tuple(_cases())
