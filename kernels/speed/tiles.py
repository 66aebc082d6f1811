"""Which tiles Triton launchers chose while something ran."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ham.kernels.triton_target import interpreting


@contextlib.contextmanager
def recorded_tiles(operation: str) -> Iterator[set[str]]:
    """Collect `kernel: tile` for every call of the operation's `triton_tiles.choose_tile`.

    Empty for operations without Triton kernels and where Triton is missing.
    """
    name = f"ham.kernels.{operation}"
    chosen: set[str] = set()
    with contextlib.ExitStack() as stack:
        if _exists(name) and _exists(f"{name}.triton_tiles") and not interpreting():
            with contextlib.suppress(ImportError):
                module = importlib.import_module(f"{name}.triton_tiles")
                stack.enter_context(_recording(module, chosen))
        yield chosen


def _recording(module: Any, chosen: set[str]) -> contextlib.AbstractContextManager:
    choose = module.choose_tile

    def record(kernel: str, *arguments: Any, **keywords: Any) -> Any:
        tile = choose(kernel, *arguments, **keywords)
        chosen.add(f"{kernel}: {tile}")
        return tile

    return mock.patch.object(module, "choose_tile", record)


def _exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
