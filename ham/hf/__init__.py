"""Models of this project in the Hugging Face way: `save_pretrained`, auto classes, `generate`.

Importing this package loads neither transformers nor torch; the names below do, on first use.
`import ham` alone makes the auto classes know the models (`ham.hf.hook`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ham.hf.cache import HamCache
    from ham.hf.configuration import HamConfig
    from ham.hf.folder import export, load, save
    from ham.hf.modeling import HamForCausalLM
    from ham.hf.tokenization import fast_tokenizer

__all__ = [
    "HamCache",
    "HamConfig",
    "HamForCausalLM",
    "export",
    "fast_tokenizer",
    "load",
    "save",
]

_HOMES = {
    "HamCache": "cache",
    "HamConfig": "configuration",
    "HamForCausalLM": "modeling",
    "export": "folder",
    "fast_tokenizer": "tokenization",
    "load": "folder",
    "save": "folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ham.hf.requirement import require_transformers

    require_transformers()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
