"""Operations under `torch.vmap` over runs: one program that trains several models alike.

There every tensor that differs between runs has an axis of runs that the program does not see. An
operation on rows (a batch of sequences that do not know of each other) needs no rule of its own
for that: runs are further rows, and the same kernels compute them in one call. Only what all rows
share, such as weights, stands in the way where it differs; then each run has a call of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def differs_between_runs(*tensors: Tensor | None) -> bool:
    """Whether a `torch.vmap` is active that gives one of the tensors an axis of runs."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(torch._C._functorch.is_batchedtensor(x) for x in tensors if isinstance(x, Tensor))


def takes_runs(*shared: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of rows do all runs of a `torch.vmap` at once.

    Tensors may stand in tuples. Outside of `torch.vmap`, and under `torch.compile`, the function is
    called as it is. Gradients are those of the operations that it calls.

    Args:
        shared: Its parameters whose tensors serve all rows. All other tensors, and all that it
            returns, must have the rows as their first axis.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function) if shared else None

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
                return function(*args, **kwargs)
            leaves, layout = pytree.tree_flatten((args, kwargs))
            if not differs_between_runs(*leaves):
                return function(*args, **kwargs)
            among_rows = _among_rows(args, kwargs, signature, shared)
            return _OverRuns.apply(function, layout, among_rows, *leaves)

        return call

    return decorate


class _OverRuns(torch.autograd.Function):
    """Called for its rule under `torch.vmap`; autograd follows what that calls."""

    @staticmethod
    def forward(*operands: Any) -> Any:
        raise NotImplementedError("operations on rows are called through torch.vmap alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise NotImplementedError("operations on rows are called through torch.vmap alone")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        function: Callable[..., Any],
        layout: pytree.TreeSpec,
        among_rows: tuple[bool, ...],
        *leaves: Any,
    ) -> tuple[Any, Any]:
        # No axes of runs for the three arguments before the leaves.
        axes = in_dims[3:]
        triples = [*zip(leaves, axes, among_rows, strict=True)]
        if any(axis is not None and not is_row for _, axis, is_row in triples):
            made = _run_by_run(function, layout, triples, info.batch_size)
        else:
            made = _all_at_once(function, layout, triples, info.batch_size)
        return made, pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, made)


Triple = tuple[Any, int | None, bool]


def _all_at_once(
    function: Callable[..., Any], layout: pytree.TreeSpec, triples: list[Triple], runs: int
) -> Any:
    """One call in which the rows of all runs stand one after another."""
    folded = []
    for leaf, axis, is_row in triples:
        if not isinstance(leaf, Tensor) or not is_row:
            folded.append(leaf)
            continue
        leaf_R = leaf.expand(runs, *leaf.shape) if axis is None else leaf.movedim(axis, 0)
        folded.append(leaf_R.flatten(0, 1))
    args, kwargs = pytree.tree_unflatten(folded, layout)
    return pytree.tree_map_only(
        Tensor, lambda x: x.unflatten(0, (runs, -1)), function(*args, **kwargs)
    )


def _run_by_run(
    function: Callable[..., Any], layout: pytree.TreeSpec, triples: list[Triple], runs: int
) -> Any:
    """A call for each run, and the results side by side."""
    # `unbind` and not an index: the gradient of that fills a tensor of all runs for each run.
    split = [[leaf] * runs if axis is None else leaf.unbind(axis) for leaf, axis, _ in triples]
    made = []
    for run in range(runs):
        args, kwargs = pytree.tree_unflatten([leaf[run] for leaf in split], layout)
        made.append(function(*args, **kwargs))
    return pytree.tree_map(lambda *x: torch.stack(x) if isinstance(x[0], Tensor) else x[0], *made)


def _among_rows(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: inspect.Signature | None,
    shared: Collection[str],
) -> tuple[bool, ...]:
    """For each leaf of the arguments, in their order, whether it has rows."""
    names = () if signature is None else tuple(signature.parameters)

    def marked(name: str | None, value: Any) -> Any:
        return pytree.tree_map(lambda _: name not in shared, value)

    given = tuple(
        marked(names[index] if index < len(names) else None, value)
        for index, value in enumerate(args)
    )
    return tuple(
        pytree.tree_leaves((given, {name: marked(name, value) for name, value in kwargs.items()}))
    )
