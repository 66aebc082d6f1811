"""Decode kernels and their reference side by side, for the tests of `ham.kernels.decode`.

Without a GPU the kernels run in Triton's interpreter, on a GPU as compiled. Which of them is
settled when they are imported, so they are imported within the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from triton_device import CUDA, DEVICE, interpreter, needs_gpu

from ham.kernels.decode import reference
from ham.kernels.decode.arguments import (
    Attention,
    AttentionTile,
    DecodeScratch,
    Pages,
    Recurrence,
    Routing,
)
from ham.kernels.decode.layout import page_bytes, position_offset, value_offset
from ham.model.blocks import RotaryPositions

__all__ = ["CUDA", "DEVICE", "interpreter", "needs_gpu"]
POSITIONS = 256
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of |x - truth| / |truth|. The truth of float32 is in float64; otherwise it rounds where the
kernels do, and differs where a sum in another order falls on the other side of a rounding."""
BAND = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Scores that lie this close to the threshold may be decided either way."""


def relative_error(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth|, and |x| where the truth is 0; NaN counts as infinite."""
    x, truth = x.detach().cpu().double(), truth.detach().cpu().double()
    error, size = (x - truth).norm().item(), truth.norm().item()
    if error != error:
        return float("inf")
    return error / size if size else error


Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """Sizes and switches of a layer under test."""

    batch: int = 2
    heads: int = 2
    key_size: int = 16
    value_size: int = 16
    page_tokens: int = 16
    conv_size: int = 4
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    score: str = "cosine"
    reduction: str = "min"
    threshold: float = 0.9
    rope: bool = True
    tile: AttentionTile = field(default_factory=partial(AttentionTile, 16, 2, 1))
    warps: int | None = None

    @property
    def per_head(self) -> bool:
        return self.reduction == "per_head"

    @property
    def rows(self) -> int:
        return self.batch * self.heads if self.per_head else self.batch

    @property
    def page_heads(self) -> int:
        return 1 if self.per_head else self.heads

    @property
    def stored(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    @property
    def exact(self) -> torch.dtype:
        """What the reference computes in."""
        return torch.float64 if self.dtype == torch.float32 else self.dtype

    @property
    def page_sizes(self) -> tuple[int, int, int, int, int]:
        return (
            self.page_tokens,
            self.page_heads,
            self.key_size,
            self.value_size,
            self.stored.itemsize,
        )

    def __str__(self) -> str:
        plain = Layer()
        changed = [
            f"{name}={getattr(value, '__dict__', value)}"
            for name, value in vars(self).items()
            if value != getattr(plain, name)
        ]
        return " ".join(changed).replace("torch.", "") or "plain"


class PagePool:
    """Pages in random places, filled with NaN."""

    def __init__(self, layer: Layer, pages_per_row: int):
        self.layer = layer
        count = layer.rows * pages_per_row
        size = page_bytes(*layer.page_sizes)
        self.bytes_NX = torch.full((count, size), 255, dtype=torch.uint8, device=DEVICE)
        generator = torch.Generator().manual_seed(3)
        order = torch.randperm(count, generator=generator).view(layer.rows, pages_per_row)
        self.order_RP = order
        self.table_RP = (order * size + self.bytes_NX.data_ptr()).to(DEVICE)

    def row(self, row: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[G, N, K]`, values `[G, N, V]` and positions `[N]` of the first tokens of a row."""
        layer, sizes = self.layer, self.layer.page_sizes
        parts = []
        for start, width in ((0, layer.key_size), (value_offset(*sizes), layer.value_size)):
            length = layer.page_heads * layer.page_tokens * width * layer.stored.itemsize
            pages_PX = self.bytes_NX[self.order_RP[row].to(DEVICE), start : start + length]
            heads_PGSD = pages_PX.view(layer.stored).view(
                -1, layer.page_heads, layer.page_tokens, width
            )
            parts.append(heads_PGSD.transpose(0, 1).flatten(1, 2)[:, :count])
        start = position_offset(*sizes)
        pages_PX = self.bytes_NX[
            self.order_RP[row].to(DEVICE), start : start + 4 * layer.page_tokens
        ]
        return (*parts, pages_PX.view(torch.int32).flatten()[:count])

    def write(self, row: int, k_GNK: Tensor, v_GNV: Tensor) -> None:
        """Fill the first N slots of a row."""
        layer, sizes = self.layer, self.layer.page_sizes
        for start, x_GND in ((0, k_GNK), (value_offset(*sizes), v_GNV)):
            for token in range(x_GND.shape[1]):
                page, slot = divmod(token, layer.page_tokens)
                bytes_X = self.bytes_NX[self.order_RP[row, page]]
                length = layer.page_heads * layer.page_tokens * x_GND.shape[2]
                run_D = bytes_X[start : start + length * layer.stored.itemsize].view(layer.stored)
                run_D.view(layer.page_heads, layer.page_tokens, -1)[:, slot] = x_GND[:, token]


def random_numbers(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


class SideBySide:
    """One layer decoded by the kernels and by the reference.

    Args:
        layer: Sizes and switches.
        pages_per_row: Room for so many pages a row.
    """

    def __init__(self, layer: Layer, pages_per_row: int = 4):
        self.layer = layer
        sizes = layer.batch, layer.heads, layer.key_size, layer.value_size
        batch, heads, key_size, value_size = sizes
        self.channels = heads * (2 * key_size + value_size)
        self.recurrence = Recurrence(
            random_numbers(1, layer.conv_size, self.channels, scale=0.5),
            random_numbers(2, heads, scale=0.5),
            random_numbers(3, heads) - 3,
            random_numbers(4, batch, layer.conv_size - 1, self.channels, dtype=layer.dtype),
            random_numbers(5, batch, heads, key_size, value_size, scale=0.1),
        )
        rotary = RotaryPositions(key_size, POSITIONS).to(DEVICE)
        self.attention = Attention(
            random_numbers(6, key_size, scale=0.1) + 1,
            random_numbers(7, key_size, scale=0.1) + 1,
            rotary.cos if layer.rope else None,
            rotary.sin if layer.rope else None,
        )
        self.branch_gains = [random_numbers(seed, value_size, scale=0.1) + 1 for seed in (8, 9)]
        self.threshold_1 = torch.full((1,), layer.threshold, device=DEVICE)
        self.pool = PagePool(layer, pages_per_row)
        counts_R = torch.zeros(layer.rows, dtype=torch.int32, device=DEVICE)
        self.pages = Pages(self.pool.table_RP, counts_R, layer.page_tokens, layer.stored)
        self.scratch = DecodeScratch.make(
            *sizes, layer.dtype, DEVICE, splits=layer.tile.splits, per_head=layer.per_head
        )
        self.history_BWC = self.recurrence.history_BWC.to(layer.exact).clone()
        self.state_BHKV = self.recurrence.state_BHKV.clone()
        self.cache = reference.ListCache(layer.rows)
        self.positions_B = torch.arange(batch, device=DEVICE) * 3
        self.decided = 0
        self.nearest = float("inf")

    def routing(self, token: int) -> Routing:
        """What the kernel is told about routing."""
        layer = self.layer
        given_R = random_numbers(token, layer.rows) if layer.score == "given" else None
        return Routing(layer.score, layer.reduction, self.threshold_1, given_R)

    def inputs(self, token: int) -> Inputs:
        """Projections of a token: `qkv_BC`, decay and write `raw_B2H`, branch `gates_B2H`."""
        batch, heads, dtype = self.layer.batch, self.layer.heads, self.layer.dtype
        shapes = (self.channels,), (2 * heads,), (2 * heads,)
        return tuple(
            random_numbers(1000 + 10 * token + place, batch, *shape, dtype=dtype)
            for place, shape in enumerate(shapes)
        )

    def step(self, token: int, *, output: bool = True) -> dict[str, float]:
        """Decode a token both ways; returns relative errors by name."""
        qkv_BC, raw_B2H, gates_B2H = self.inputs(token)
        self.launch_step((qkv_BC, raw_B2H, gates_B2H), token)
        o_BHV, projected = self._reference_step(qkv_BC, raw_B2H, self.routing(token))
        errors = {
            "state": relative_error(self.recurrence.state_BHKV, self.state_BHKV),
            "history": relative_error(self.recurrence.history_BWC, self.history_BWC),
            "o": relative_error(self.scratch.o_BHV, o_BHV),
            "q": relative_error(self.scratch.q_BHK, projected.attention_q_BHK),
        }
        if output:
            y_BHV = self.attend(gates_B2H)
            truth_BHV = self._reference_output(o_BHV, projected, gates_B2H)
            errors["y"] = relative_error(y_BHV, truth_BHV)
        self.positions_B += 1
        return errors

    def launch(self, inputs: Inputs, y_BHV: Tensor | None = None) -> Tensor:
        """All launches of a token; returns the output."""
        self.launch_step(inputs)
        return self.attend(inputs[2], y_BHV)

    def launch_step(self, inputs: Inputs, token: int = 0, active_B: Tensor | None = None) -> None:
        """The first launch of a token."""
        from ham.kernels.decode.launch import step

        step(
            *inputs[:2],
            self.recurrence,
            self.attention,
            self.routing(token),
            self.pages,
            self.positions_B,
            self.scratch,
            active_B=active_B,
            warps=self.layer.warps,
        )

    def attend(self, gates_B2H: Tensor, y_BHV: Tensor | None = None) -> Tensor:
        """The launches after `step`; returns the output."""
        from ham.kernels.decode.launch import combine, paged_attention

        layer = self.layer
        if y_BHV is None:
            y_BHV = torch.full_like(self.scratch.o_BHV, torch.nan)
        arguments = self.scratch, gates_B2H, *self.branch_gains, y_BHV
        paged_attention(self.pages, *arguments, tile=layer.tile, per_head=layer.per_head)
        if not layer.tile.fused:
            combine(*arguments, tile=layer.tile)
        return y_BHV

    def cached_errors(self) -> dict[str, float]:
        """Errors of what is on the pages; positions must be equal."""
        layer, worst = self.layer, {"keys": 0.0, "values": 0.0}
        for row in range(layer.rows):
            positions = self.cache.positions[row]
            keys_GNK, values_GNV, positions_N = self.pool.row(row, len(positions))
            assert positions_N.tolist() == positions
            if positions:
                key_error = relative_error(keys_GNK, torch.stack(self.cache.keys[row], 1))
                value_error = relative_error(values_GNV, torch.stack(self.cache.values[row], 1))
                worst["keys"] = max(worst["keys"], key_error)
                worst["values"] = max(worst["values"], value_error)
        assert self.pages.counts_R.tolist() == [len(each) for each in self.cache.positions]
        return worst

    def _reference_step(
        self, qkv_BC: Tensor, raw_B2H: Tensor, routing: Routing
    ) -> tuple[Tensor, reference.Projected]:
        layer, exact, parts = self.layer, self.layer.exact, self.recurrence
        wide = torch.float64 if exact == torch.float64 else torch.float32
        mixed_BC, self.history_BWC = reference.convolve(
            qkv_BC.to(exact), parts.conv_weight_WC.to(wide), self.history_BWC
        )
        projected = reference.project(
            mixed_BC,
            raw_B2H.to(exact),
            parts.log_rate_H.to(wide),
            parts.step_bias_H.to(wide),
            layer.key_size,
            q_gain_K=self.attention.q_gain_K.to(wide),
            k_gain_K=self.attention.k_gain_K.to(wide),
            cos_MK=self.attention.cos_MK,
            sin_MK=self.attention.sin_MK,
            positions_B=self.positions_B,
        )
        o_BHV, self.state_BHKV, prediction_BHV = reference.recur(
            projected, self.state_BHKV.to(wide)
        )
        score_R = routing.given_R
        if layer.score != "given":
            score_BH = reference.head_scores(
                layer.score, prediction_BHV, projected.v_BHV, projected.beta_BH
            )
            score_R = reference.row_scores(score_BH, layer.reduction)
        self._compare_decisions(score_R)
        groups = (layer.rows, layer.page_heads, -1)
        positions_R = self.positions_B.repeat_interleave(layer.rows // layer.batch)
        self.cache.append(
            projected.attention_k_BHK.to(layer.stored).to(exact).view(groups),
            projected.v_BHV.to(layer.stored).to(exact).view(groups),
            self.scratch.routed_R.tolist(),
            positions_R.tolist(),
        )
        return o_BHV, projected

    def _compare_decisions(self, score_R: Tensor) -> None:
        """Scores agree, and decisions where the score is not at the threshold."""
        band = BAND[self.layer.dtype]
        assert (self.scratch.score_R - score_R).abs().max() < band
        distance_R = (score_R - self.layer.threshold).abs()
        clear_R = distance_R > band
        right_R = (score_R >= self.layer.threshold) == self.scratch.routed_R.bool()
        assert right_R[clear_R].all()
        self.decided += int(clear_R.sum())
        self.nearest = min(self.nearest, distance_R.min().item())

    def _reference_output(
        self, o_BHV: Tensor, projected: reference.Projected, gates_B2H: Tensor
    ) -> Tensor:
        layer, exact = self.layer, self.layer.exact
        wide = torch.float64 if exact == torch.float64 else torch.float32
        groups = (layer.rows, layer.page_heads, -1)
        attended_BHV = self.cache.attend(
            projected.attention_q_BHK.reshape(groups),
            projected.v_BHV.reshape(groups),
            layer.key_size**-0.5,
        ).view(o_BHV.shape)
        gains = [gain.to(wide) for gain in self.branch_gains]
        return reference.combine(o_BHV, attended_BHV, gates_B2H.to(exact), *gains)


def on_gpu(layers: Sequence[Layer], every_dtype: int) -> list[Layer]:
    """All layers in bfloat16, and so many of them in the other dtypes too."""
    others = [
        replace(layer, dtype=dtype)
        for layer in layers[:every_dtype]
        for dtype in (torch.float32, torch.float16)
    ]
    return [replace(layer, dtype=torch.bfloat16) for layer in layers] + others
