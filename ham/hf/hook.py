"""Registration with the auto classes of transformers without importing transformers.

`import ham` must stay cheap, and transformers takes seconds. So a finder on `sys.meta_path` waits
for the modules that hold the auto classes. It leaves finding and executing them to the other
finders and registers this project's classes when one of them has run; where that happened before,
registration happens at once. A program that never asks for an auto class pays nothing.

Each module registers what it owns, with classes that do not import it back, so no import cycle
and no wait of one thread for another's import can arise.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from ham.hf.requirement import transformers_fault

_AUTO = "transformers.models.auto"


def _register_config(module: ModuleType) -> None:
    from ham.hf.configuration import HamConfig

    module.AutoConfig.register(HamConfig.model_type, HamConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from ham.hf.configuration import HamConfig
    from ham.hf.modeling import HamForCausalLM

    module.AutoModelForCausalLM.register(HamConfig, HamForCausalLM, exist_ok=True)


def _register_tokenizer(module: ModuleType) -> None:
    from transformers import PreTrainedTokenizerFast

    from ham.hf.configuration import HamConfig

    module.AutoTokenizer.register(HamConfig, PreTrainedTokenizerFast, exist_ok=True)


_REGISTRARS: dict[str, Callable[[ModuleType], None]] = {
    f"{_AUTO}.configuration_auto": _register_config,
    f"{_AUTO}.modeling_auto": _register_model,
    f"{_AUTO}.tokenization_auto": _register_tokenizer,
}


class AutoClassFinder:
    """A `sys.meta_path` finder that registers once an auto module has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, told to register after execution."""
        if name not in _REGISTRARS:
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, AutoClassFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _register_after_execution(spec)
                return spec
        return None


def install() -> None:
    """Put the finder in place, once, and register with auto modules that are there already."""
    if not any(type(finder).__qualname__ == "AutoClassFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, AutoClassFinder())
    for name in _REGISTRARS:
        if name in sys.modules:
            # Another thread may still be executing it: this import waits until it is complete.
            _register(importlib.import_module(name))


def _register_after_execution(spec: ModuleSpec) -> None:
    """Wrap `exec_module` of this one loader object; its type and other methods stay."""
    execute = spec.loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register(module)

    spec.loader.exec_module = execute_and_register


def _register(module: ModuleType) -> None:
    fault = transformers_fault()
    if fault is None:
        _REGISTRARS[module.__name__](module)
    else:
        warnings.warn(f"models of ham-bench are not registered: {fault}", stacklevel=2)
