"""Sizes worth timing on a GPU, their inputs and what they cost.

Names of shapes: B batch, T time, H heads, D head size of keys and values, P head size and S state
size of Mamba-2, G groups that share keys (or b and c); `B8_T4096_H16_D128`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ham.errors import ConfigError
from ham.kernels import gated_delta_rule, routed_attention, ssd
from ham.kernels.registry import Cost

Inputs = dict[str, Tensor]
STATE_BYTES = 4


class Problem(Protocol):
    """One operation at one size.

    Attributes:
        operation: Name of the operation or component.
        shape: Name of the size.
        fraction: Nominal share of routed tokens, or None.
        backward_flops: FLOPs of the backward in units of the forward's.
    """

    operation: str
    shape: str
    fraction: float | None
    backward_flops: float

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Positional arguments of the operation in order; names carry the axes."""

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""

    def output_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the read-out, whose gradient the backward reads."""


def parse_shape(shape: str) -> dict[str, int]:
    """`B8_T4096_H16_D128` as `{"B": 8, ...}`.

    Raises:
        ConfigError: If it is not made of letters with numbers.
    """
    parts = [re.fullmatch(r"([A-Z])([1-9]\d*)", part) for part in shape.split("_")]
    if not all(parts):
        raise ConfigError(f"shape {shape!r} is not of the form B8_T4096_H16_D128")
    return {part[1]: int(part[2]) for part in parts if part is not None}


def sizes_of(shape: str, required: str, optional: Mapping[str, int]) -> dict[str, int]:
    """The numbers of a shape, which must name all `required` letters.

    Raises:
        ConfigError: If a letter is missing or unknown.
    """
    sizes = parse_shape(shape)
    if not set(required) <= set(sizes) <= {*required, *optional}:
        legal = ", ".join([*required, *(f"{letter} (optional)" for letter in optional)])
        raise ConfigError(f"shape {shape!r} must name the sizes {legal}")
    return {**optional, **sizes}


class _Random:
    """Random tensors made on the device; equal seeds give equal values on one kind of device."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class RuleProblem:
    """The gated delta rule with its score; keys of unit length, gates as a trained layer's."""

    shape: str
    operation: str = "gated_delta_rule"
    fraction: None = None
    backward_flops: float = 2.0

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by letter."""
        return sizes_of(self.shape, "BTHD", {"G": 0})

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """q, k, v in `dtype`, log decay and beta in float32."""
        n, random = self.sizes, _Random(device, seed)
        rows, wide = (n["B"], n["T"]), torch.promote_types(dtype, torch.float32)
        axes = "BTGK" if n["G"] else "BTHK"
        heads = n["G"] or n["H"]
        return {
            f"q_{axes}": F.normalize(random.normal(*rows, heads, n["D"]), dim=-1).to(dtype),
            f"k_{axes}": F.normalize(random.normal(*rows, heads, n["D"]), dim=-1).to(dtype),
            "v_BTHV": random.normal(*rows, n["H"], n["D"]).to(dtype),
            "log_decay_BTH": -F.softplus(random.normal(*rows, n["H"]) - 3.0).to(wide),
            "beta_BTH": torch.sigmoid(random.normal(*rows, n["H"])).to(wide),
        }

    def cost(self, dtype: torch.dtype) -> Cost:
        """Of the recurrence with one score for each token and head instead of its prediction."""
        n = self.sizes
        rows, tokens = n["B"] * n["T"], n["B"] * n["T"] * n["H"]
        whole = gated_delta_rule.cost(
            batch=n["B"],
            time=n["T"],
            heads=n["H"],
            key_size=n["D"],
            value_size=n["D"],
            dtype=dtype,
        )
        shared = 2 * rows * (n["H"] - (n["G"] or n["H"])) * n["D"] * dtype.itemsize
        prediction = tokens * n["D"] * STATE_BYTES
        return replace(whole, bytes=whole.bytes - shared - prediction + tokens * STATE_BYTES)

    def output_bytes(self, dtype: torch.dtype) -> int:
        """Of o."""
        n = self.sizes
        return n["B"] * n["T"] * n["H"] * n["D"] * dtype.itemsize


@dataclass(frozen=True)
class SsdProblem:
    """The recurrence of Mamba-2; `G1` is its real shape, b and c shared by all heads."""

    shape: str
    operation: str = "ssd"
    fraction: None = None
    backward_flops: float = 2.0

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by letter."""
        return sizes_of(self.shape, "BTHPS", {"G": 1})

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """x, b, c in `dtype`, the rest in float32."""
        n, random = self.sizes, _Random(device, seed)
        rows, wide = (n["B"], n["T"]), torch.promote_types(dtype, torch.float32)
        groups = () if n["G"] == 1 else (n["G"],)
        axes = "BTGS" if groups else "BTS"
        shrink = n["S"] ** -0.5
        return {
            "x_BTHP": random.normal(*rows, n["H"], n["P"]).to(dtype),
            "dt_BTH": F.softplus(random.normal(*rows, n["H"]) - 3.0).to(wide),
            "a_H": -(1.0 + 15.0 * random.uniform(n["H"])).to(wide),
            f"b_{axes}": random.normal(*rows, *groups, n["S"]).to(dtype),
            f"c_{axes}": (random.normal(*rows, *groups, n["S"]) * shrink).to(dtype),
            "d_H": random.normal(n["H"]).to(wide),
        }

    def cost(self, dtype: torch.dtype) -> Cost:
        """Of the recurrence; b and c count once for each group."""
        n = self.sizes
        shared = ssd.cost(
            batch=n["B"],
            time=n["T"],
            heads=n["H"],
            head_size=n["P"],
            state_size=n["S"],
            dtype=dtype,
        )
        further = 2 * n["B"] * n["T"] * (n["G"] - 1) * n["S"] * dtype.itemsize
        return replace(shared, bytes=shared.bytes + further)

    def output_bytes(self, dtype: torch.dtype) -> int:
        """Of y."""
        n = self.sizes
        return n["B"] * n["T"] * n["H"] * n["P"] * dtype.itemsize


@dataclass(frozen=True)
class AttentionProblem:
    """Routed attention; every token is routed with probability `fraction`, all of them at 1."""

    shape: str
    fraction: float
    operation: str = "routed_attention"
    backward_flops: float = 2.5

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by letter."""
        return sizes_of(self.shape, "BTHD", {"G": 0})

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """q, k, v in `dtype` and the mask."""
        n, random = self.sizes, _Random(device, seed)
        rows, groups = (n["B"], n["T"]), n["G"] or n["H"]
        letter = "G" if n["G"] else "H"
        return {
            "q_BTHK": random.normal(*rows, n["H"], n["D"]).to(dtype),
            f"k_BT{letter}K": random.normal(*rows, groups, n["D"]).to(dtype),
            f"v_BT{letter}V": random.normal(*rows, groups, n["D"]).to(dtype),
            "routed_BT": random.uniform(*rows) < self.fraction,
        }

    def cost(self, dtype: torch.dtype) -> Cost:
        """q and o for every token, k and v for the routed ones, a byte of mask a token."""
        n = self.sizes
        whole = routed_attention.cost(
            batch=n["B"],
            time=n["T"],
            heads=n["H"],
            key_size=n["D"],
            value_size=n["D"],
            dtype=dtype,
            routed_fraction=self.fraction,
        )
        missing = n["H"] - (n["G"] or n["H"])
        unread = 2 * n["B"] * n["T"] * missing * n["D"] * dtype.itemsize * self.fraction
        return replace(whole, bytes=whole.bytes - round(unread))

    def output_bytes(self, dtype: torch.dtype) -> int:
        """Of o."""
        n = self.sizes
        return n["B"] * n["T"] * n["H"] * n["D"] * dtype.itemsize


@dataclass(frozen=True)
class RoutingProblem:
    """A part of routing alone: `route_index` (mask to positions and counts), `route_pack`.

    Index building reads a byte and writes four of position a token at most; packing reads and
    writes the routed keys and values as well.
    """

    operation: str
    shape: str
    fraction: float
    backward_flops: float = 0.0

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Keys, values and mask of the attention problem of the same size."""
        whole = AttentionProblem(self.shape, self.fraction).inputs(dtype, device, seed)
        del whole["q_BTHK"]
        return whole

    def cost(self, dtype: torch.dtype) -> Cost:
        """Bytes only."""
        n = sizes_of(self.shape, "BTHD", {"G": 0})
        tokens, routed = n["B"] * n["T"], n["B"] * n["T"] * self.fraction
        moved = tokens + 4 * routed
        if self.operation == "route_pack":
            moved += 4 * routed * (n["G"] or n["H"]) * n["D"] * dtype.itemsize
        return Cost(flops=0, bytes=round(moved))

    def output_bytes(self, dtype: torch.dtype) -> int:
        """Not used: there is no backward."""
        return 0


FRACTIONS = (0.125, 0.25, 0.5)
DENSE = 1.0
RULE_SHAPES = ("B8_T4096_H16_D128", "B1_T32768_H16_D128", "B8_T4096_H16_D64")
SSD_SHAPES = (
    "B8_T4096_H16_P128_S128_G16",
    "B1_T32768_H16_P128_S128_G16",
    "B8_T4096_H32_P64_S128_G1",
)
ATTENTION_SHAPES = ("B8_T4096_H16_D128", "B1_T32768_H16_D128")
COMPONENTS = ("route_index", "route_pack")
OPERATIONS = ("gated_delta_rule", "ssd", "routed_attention", *COMPONENTS)
QUICK_SHAPES = 1


def default_shapes(operation: str, quick: bool) -> tuple[str, ...]:
    """The shapes of an operation that are timed unless others are named."""
    shapes = {"gated_delta_rule": RULE_SHAPES, "ssd": SSD_SHAPES}.get(operation, ATTENTION_SHAPES)
    return shapes[:QUICK_SHAPES] if quick else shapes


def make_problems(
    operation: str, shape: str, fractions: Sequence[float] = FRACTIONS
) -> list[Problem]:
    """Every problem of an operation at a shape: one, or one for each fraction and full attention.

    Raises:
        ConfigError: If the shape does not fit the operation.
    """
    if operation == "gated_delta_rule":
        problems: list[Problem] = [RuleProblem(shape)]
    elif operation == "ssd":
        problems = [SsdProblem(shape)]
    else:
        if operation == "routed_attention":
            problems = [AttentionProblem(shape, part) for part in (*fractions, DENSE)]
        else:
            problems = [RoutingProblem(operation, shape, part) for part in fractions]
    for problem in problems:
        problem.cost(torch.bfloat16)
    return problems


def choose_problems(
    operations: list[str] | None,
    shapes: list[str] | None,
    quick: bool,
    fractions: Sequence[float] | None = None,
) -> list[Problem]:
    """Problems of the named operations (default: all) at the named shapes that fit them.

    Raises:
        ConfigError: If an operation is unknown, a fraction is no share or no problem is left.
    """
    fractions = fractions or ((0.25,) if quick else FRACTIONS)
    if not all(0 < part < 1 for part in fractions):
        raise ConfigError(f"routed fractions lie between 0 and 1, not {list(fractions)}")
    problems: list[Problem] = []
    for operation in operations or OPERATIONS:
        if operation not in OPERATIONS:
            raise ConfigError(f"unknown operation {operation!r}; known: {', '.join(OPERATIONS)}")
        for shape in shapes or default_shapes(operation, quick):
            try:
                problems += make_problems(operation, shape, fractions)
            except ConfigError:
                if not shapes or len(operations or ()) == 1:
                    raise
    if not problems:
        raise ConfigError(f"none of the shapes {', '.join(shapes or ())} fits an operation")
    return problems
