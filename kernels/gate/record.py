"""What launchers hand to Triton, caught just before it would be compiled and launched.

Triton's own code makes signature, constants and attributes of the arguments (pointer types,
divisibility by 16, value 1, `do_not_specialize`), for the target asked for; only the launch itself
is left out. So launchers run on CPU tensors, and their outputs hold whatever memory held before.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, create_function_from_signature

from ham.kernels.compile_cases import CompileCase
from ham.kernels.gate.targets import GateTarget
from ham.kernels.triton_target import stand_in

# Launchers run on NVIDIA's GPUs only, so they may pass these; elsewhere Triton refuses them.
NVIDIA_OPTIONS = ("maxnreg",)


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: Name of the kernel.
        source: Kernel, signature, constants and attributes.
        options: What `triton.compile` takes as options, e.g. `num_warps`.
        target: What it is compiled for.
    """

    kernel: str
    source: ASTSource
    options: dict[str, Any]
    target: GateTarget

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        text = f"{self.source.hash()} {sorted(self.options.items())} {self.target.name}"
        return hashlib.sha256(text.encode()).hexdigest()


def gpu_target(target: GateTarget) -> GPUTarget:
    """The target as Triton has it."""
    return GPUTarget(target.backend, target.arch, target.warp_size)


def record(case: CompileCase, target: GateTarget) -> list[Launch]:
    """The launches of a case on a target, in order.

    Raises:
        ValueError: If a kernel is launched without any tensor.
        Exception: Whatever the launcher raises.
    """
    launches: list[Launch] = []
    with _recording(launches, target), stand_in(target.stand_in):
        case.launch()
    return launches


@contextlib.contextmanager
def _recording(launches: list[Launch], target: GateTarget) -> Iterator[None]:
    backend = make_backend(gpu_target(target))

    def keep(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del grid, warmup
        options = {"debug": False, "instrumentation_mode": "", **options}
        if target.backend != "cuda":
            options = {name: each for name, each in options.items() if name not in NVIDIA_OPTIONS}
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, parsed = binder(*args, **options)
        parsed, signature, constants, attributes = self._pack_args(
            backend, options, bound, specialization, parsed
        )
        if not any("*" in str(kind) or "tensordesc" in str(kind) for kind in signature.values()):
            raise ValueError(
                f"{self.__name__} is launched without a tensor; launch it on small CPU tensors"
            )
        kind_of_source = GluonASTSource if self.is_gluon() else ASTSource
        source = kind_of_source(self, signature, constants, attributes)
        launches.append(Launch(self.__name__, source, dict(parsed.__dict__), target))

    def every_config(self: Autotuner, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options):
            self.fn.run(*args, **options, **config.all_kwargs())

    launch, tune = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = keep, every_config
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def compile_launch(launch: Launch) -> Any:
    """Compile through Triton's cache; returns the compiled kernel."""
    return triton.compile(
        launch.source, target=gpu_target(launch.target), options=dict(launch.options)
    )
