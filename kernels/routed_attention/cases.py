"""Problem sizes and random inputs on which providers of routed attention are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ham.kernels.draws import normals
from ham.kernels.registry import Cost
from ham.kernels.routed_attention.cost import cost


@dataclass(frozen=True)
class RoutedAttentionCase:
    """One problem size.

    Attributes:
        fraction: Share of tokens routed, independently of one another.
        ragged: The first sequence has no routed token, the last one has all, and the tokens of
            the first quarter of the others are unrouted.
    """

    batch: int
    time: int
    heads: int
    key_size: int
    value_size: int
    fraction: float = 0.25
    ragged: bool = False
    key_heads: int = 0
    window: int = 0
    sink: bool = False
    score: bool = False

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""
        name = f"B{self.batch} T{self.time} H{self.heads} K{self.key_size} V{self.value_size}"
        name += f" f{self.fraction:g}" + (" ragged" if self.ragged else "")
        name += f" G{self.key_heads}" if self.key_heads else ""
        name += f" w{self.window}" if self.window else ""
        return name + (" sink" if self.sink else "") + (" score" if self.score else "")

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass at the nominal fraction."""
        return cost(
            batch=self.batch,
            time=self.time,
            heads=self.heads,
            key_size=self.key_size,
            value_size=self.value_size,
            dtype=dtype,
            routed_fraction=self.fraction,
            key_heads=self.key_heads or None,
            window=self.window,
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of `routed_attention`."""
        generator = torch.Generator().manual_seed(seed)
        normal = normals(generator, device, dtype)
        rows = (self.batch, self.time)
        key_heads = self.key_heads or self.heads
        inputs: dict[str, Any] = {
            "q_BTHK": normal(*rows, self.heads, self.key_size),
            "k_BTGK": normal(*rows, key_heads, self.key_size),
            "v_BTGV": normal(*rows, key_heads, self.value_size),
        }
        routed_BT = torch.rand(*rows, generator=generator) < self.fraction
        if self.ragged:
            routed_BT[:, : self.time // 4] = False
            routed_BT[-1] = True
            routed_BT[0] = False
        inputs["routed_BT"] = routed_BT.to(device)
        if self.window:
            inputs["window"] = self.window
        if self.sink:
            inputs["sink_HK"] = normal(self.heads, self.key_size)
        if self.score:
            inputs["router_score_BT"] = normal(*rows)
        return inputs


VERIFY_CASES = (
    RoutedAttentionCase(3, 1, 3, 16, 24, fraction=0.0),
    RoutedAttentionCase(3, 1, 3, 16, 16, fraction=1.0),
    RoutedAttentionCase(3, 63, 1, 16, 24, ragged=True),
    RoutedAttentionCase(3, 65, 3, 32, 32, ragged=True),
    RoutedAttentionCase(1, 200, 3, 32, 32, fraction=1.0),
    RoutedAttentionCase(2, 520, 2, 64, 64),
    RoutedAttentionCase(3, 65, 4, 16, 24, ragged=True, key_heads=2, window=1),
    RoutedAttentionCase(2, 200, 5, 32, 32, key_heads=1, window=70, sink=True, score=True),
    RoutedAttentionCase(3, 63, 2, 16, 16, ragged=True, sink=True),
    RoutedAttentionCase(3, 130, 2, 16, 16, ragged=True, score=True),
    RoutedAttentionCase(2, 40, 2, 16, 16, fraction=1.0, window=100, score=True),
)

SPEED_CASES = tuple(
    RoutedAttentionCase(4, 1024, 4, 32, 32, fraction=fraction) for fraction in (0.125, 0.25, 0.5, 1)
)
