"""Launches of Triton kernels with less of the host's time than Triton itself takes.

For every launch Triton builds a dictionary of all parameters, a description of each and a string of
the options before it knows that it has compiled the kernel already, and its launcher asks the
driver about every pointer. A call of the gated delta rule launches three to nine kernels with up
to 37 parameters each, and the host takes longer than the GPU on short inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# The call of a compiled kernel is not part of Triton's interface; other versions take its own way.
DIRECT = triton.__version__.startswith("3.6.")
ALIGNMENT = 16
LARGEST_INT = 2**31 - 1


class _Ready(NamedTuple):
    """A compiled kernel.

    Attributes:
        kernel: What it was compiled from; kept because keys hold its address.
        compiled: As Triton returned it.
        constants: Values of the parameters after the arguments.
    """

    kernel: JITFunction
    compiled: Any
    constants: tuple[Any, ...]


_ready: dict[tuple[Any, ...], _Ready] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Do `kernel[grid](*arguments, **options)`.

    A kernel is compiled anew for other dtypes, for pointers that are (not) multiples of 16, for
    integers that are 1 or multiples of 16, and for other options; the key knows all of that, and
    where the tensors are, at least as finely as Triton does. What Triton makes of settings that
    change after the first launch (its `knobs`, global constants of a kernel) is not looked at.

    Args:
        kernel: A function under `triton.jit`, compiled or interpreted.
        grid: One to three sizes.
        arguments: Tensors, descriptors, numbers and None for the first parameters, none of which
            is a constant, or the kernel goes Triton's way.
        options: Constants by name, and what Triton calls options.
    """
    if not (DIRECT and isinstance(kernel, JITFunction) and _on_gpu(arguments[0])) or _hooked():
        kernel[grid](*arguments, **options)
        return
    device = driver.active.get_current_device()
    key: list[Any] = [id(kernel), device]
    handed: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            pointer = argument.data_ptr()
            key += (argument.dtype, argument.is_cuda, pointer % ALIGNMENT == 0)
            handed.append(pointer)
            continue
        handed.append(argument)
        if argument is None or kind is float:
            key.append(kind)
        elif kind is int and 0 <= argument <= LARGEST_INT:
            key.append(1 if argument == 1 else (argument % ALIGNMENT == 0) * ALIGNMENT)
        elif kind is TensorDescriptor:
            base = argument.base
            key += (base.dtype, base.is_cuda, argument.padding, *argument.block_shape)
        else:
            kernel[grid](*arguments, **options)
            return
    key += options
    key += options.values()
    found = tuple(key)
    made = _ready.get(found)
    if made is None:
        compiled = kernel[grid](*arguments, **options)
        _remember(found, kernel, compiled, len(arguments), options)
        return
    compiled = made.compiled
    compiled.run(
        *grid,
        *(1,) * (3 - len(grid)),
        driver.active.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *handed,
        *made.constants,
    )


def _on_gpu(argument: Tensor | TensorDescriptor) -> bool:
    return (argument.base if type(argument) is TensorDescriptor else argument).is_cuda


def _hooked() -> bool:
    """Whether a profiler wants to know about launches; a chain of hooks may be empty."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _remember(
    key: tuple[Any, ...], kernel: JITFunction, compiled: Any, given: int, options: dict[str, Any]
) -> None:
    """Keep a compiled kernel; not one that was only recorded, or still is being compiled."""
    rest = kernel.params[given:]
    named = all(each.is_constexpr and (each.name in options or each.has_default) for each in rest)
    plain = not any(each.is_constexpr for each in kernel.params[:given])
    if plain and named and hasattr(compiled, "packed_metadata"):
        constants = tuple(options.get(each.name, each.default) for each in rest)
        _ready[key] = _Ready(kernel, compiled, constants)
