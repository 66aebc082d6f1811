"""Fixtures that several test folders share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# First of all: see there.
import triton_device  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side on two cores; more threads would only slow them down."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Build a small `DecoderLM`: `tiny_model("ham", target=0.5)`; same seed, same weights."""
    from ham.conformance import small_model

    return small_model


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    from ham.model import outside, registry

    monkeypatch.setattr(registry, "_MIXERS", dict(registry.registered_mixers()))
    monkeypatch.setattr(registry, "_FAULTS", {})
    outside.announcements.cache_clear()
    yield
    # A test may have put something else in the place of the function that remembers.
    monkeypatch.undo()
    outside.announcements.cache_clear()


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict, dict], None]]:
    """`install({"module": source}, {"name": "module"})`: as installing a package does it."""
    from ham.model import outside

    monkeypatch.syspath_prepend(str(tmp_path))

    def install(modules: dict[str, str], points: dict[str, str]) -> None:
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        about = tmp_path / "rivals-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rivals\nVersion: 1.0\n")
        lines = [f"{name} = {module}" for name, module in points.items()]
        (about / "entry_points.txt").write_text("\n".join([f"[{outside.GROUP}]", *lines, ""]))
        importlib.invalidate_caches()
        outside.announcements.cache_clear()

    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
