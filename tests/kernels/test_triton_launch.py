"""Launches that go past Triton: what is handed over, and when Triton is asked again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from ham.kernels import triton_launch  # noqa: E402
from ham.kernels.eager import traced  # noqa: E402
from ham.kernels.triton_launch import launch  # noqa: E402

pytestmark = pytest.mark.skipif(not triton_launch.DIRECT, reason="other versions of Triton")


@triton.jit(do_not_specialize=["T"])
def copy_kernel(p_from, p_to, p_more, scale, T, N, C: tl.constexpr, D: tl.constexpr = 3):
    tl.store(p_to, tl.load(p_from) * scale)


class Compiled:
    """A kernel that only notes what it is launched with."""

    packed_metadata = (1, 1, 0)
    function = 7

    def __init__(self, log: list[tuple[Any, ...]]):
        self.log = log

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.log.append(arguments)


class Driver:
    """A GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 5

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list, list]]:
    """What was launched, and what was compiled."""
    launched: list[tuple[Any, ...]] = []
    compiled: list[str] = []

    def compile_kernel(self: JITFunction, key: str, *arguments: Any) -> Compiled:
        compiled.append(key)
        made = self.device_caches[0][0][key] = Compiled(launched)
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compile_kernel)
    monkeypatch.setattr(triton_launch, "_on_gpu", lambda argument: True)
    monkeypatch.setattr(triton_launch, "_ready", {})
    monkeypatch.setattr(driver, "_active", Driver())
    copy_kernel.device_caches.clear()
    yield launched, compiled
    copy_kernel.device_caches.clear()


def pointer(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def test_hands_over_what_triton_does(machine: tuple[list, list]) -> None:
    launched, compiled = machine
    x, y = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        launch(copy_kernel, (4, 2), x, y, None, 0.5, 70, 32, C=64, num_warps=8)
    assert len(compiled) == 1
    first, second = launched
    # Grid, stream, function and metadata, then three entries for profilers, then the parameters.
    assert first[:6] == second[:6] == (4, 2, 1, 5, 7, (1, 1, 0))
    assert second[6:9] == (None, None, None)
    assert tuple(map(pointer, first[9:])) == second[9:]
    assert second[9:] == (x.data_ptr(), y.data_ptr(), None, 0.5, 70, 32, 64, 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(65)[1:]},
        {"more": torch.zeros(1)},
        {"number": 1},
        {"number": 33},
        {"number": 2**31},
        {"constant": 32},
        {"warps": 4},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_asks_triton_again(machine: tuple[list, list], changed: dict[str, Any]) -> None:
    launched, compiled = machine
    x, y = torch.zeros(64), torch.zeros(64)

    def call(
        x: Tensor = x,
        more: Tensor | None = None,
        number: int = 32,
        constant: int = 64,
        warps: int = 8,
    ) -> None:
        launch(copy_kernel, (1,), x, y, more, 0.5, 70, number, C=constant, num_warps=warps)

    for _ in range(2):
        call()
        call(**changed)
    assert len(set(compiled)) == len(compiled) == 2
    assert len(launched) == 4
    assert pointer(launched[3][9]) == changed.get("x", x).data_ptr()


def test_profilers_see_launches(
    machine: tuple[list, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, _ = machine
    x = torch.zeros(64)
    launch(copy_kernel, (1,), x, x, None, 0.5, 70, 32, C=64)
    monkeypatch.setattr(triton_launch.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(copy_kernel, (1,), x, x, None, 0.5, 70, 32, C=64)
    assert launched[1][9] is x


def test_tracers_get_the_operator() -> None:
    x = torch.zeros(2)
    assert not traced(x, None, torch.nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert traced(x)
    assert traced(mode.from_tensor(x))
    torch.func.grad(lambda y: y.sum() * traced(y))(x)
    assert torch.func.grad(lambda y: y.sum() * traced(y))(x).tolist() == [1.0, 1.0]
    function = torch.compile(lambda y: y + traced(y), fullgraph=True, backend="eager")
    assert function(x).tolist() == [1.0, 1.0]
