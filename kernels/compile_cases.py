"""What the static gate compiles: calls of launchers, each with one shipped tile configuration.

A folder with Triton kernels has a module `compile_cases` with `COMPILE_CASES`. The gate calls
`launch` with Triton's launcher replaced by one that records kernel, argument types and meta
parameters, so exactly what a GPU would be given is compiled, and no list can go stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CompileCase:
    """One call of one or more launchers.

    Attributes:
        name: Unique within the operation; names sizes, dtype and tile, e.g.
            `walk K128 V128 bf16 BV64 w4 s2`.
        launch: Calls launchers on small CPU tensors (a few chunks, batch 1); what they return is
            not looked at.
        default: Part of the default set; the rest is compiled with `--all`.
    """

    name: str
    launch: Callable[[], object]
    default: bool = True
