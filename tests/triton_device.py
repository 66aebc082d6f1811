"""Where tests of Triton kernels run: on a GPU as compiled, else on the CPU in Triton's interpreter.

Triton decides when it is imported whether it interprets, so `tests/conftest.py` imports this module
before anything else can import Triton.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    # What a kernel becomes is decided when its module is imported, too, which any test may be the
    # first to do.
    for module in ("decode.launch", "decode.blocks", "decode.prompt"):
        importlib.import_module(f"ham.kernels.{module}")
    del os.environ["TRITON_INTERPRET"]
    if not isinstance(triton.language.sum, InterpretedFunction):
        raise RuntimeError("Triton was imported before this module could ask for its interpreter")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels run on the CPU where there is no GPU."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


@pytest.fixture
def needs_gpu() -> None:
    """Skip where there is no GPU."""
    if not CUDA:
        pytest.skip("needs a CUDA device")
