"""The libraries that models come from: their model types, configuration classes and keys."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from ham.errors import ConfigError, UnusableModelError, unknown_of_many
from ham.hf.requirement import transformers_fault

FLA_PACKAGE = "flash-linear-attention"
# What the base class of every configuration adds, which says nothing about the architecture.
_NOT_ARCHITECTURE = frozenset(
    {
        "architectures",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "transformers_version",
    }
)


def require(library: str) -> None:
    """Import a library.

    Raises:
        UnusableModelError: If it is not installed, too old, or cannot be imported.
    """
    fault = transformers_fault()
    if fault is not None:
        raise UnusableModelError(f"models of other libraries need transformers: {fault}")
    if library == "fla":
        try:
            # The package itself hides a failed import of its models.
            importlib.import_module("fla.models")
        except Exception as error:  # Triton and CUDA raise whatever they like at import
            raise UnusableModelError(
                f"models of library 'fla' need {FLA_PACKAGE} (pip install {FLA_PACKAGE}): "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error


def configuration_class(library: str, model_type: str) -> type:
    """The configuration class of a causal language model.

    Raises:
        UnusableModelError: If the library is not there.
        ConfigError: For an unknown model type; the message names the nearest ones.
    """
    classes = _classes(library)
    if model_type not in classes:
        raise unknown_of_many(f"model_type of library {library!r}", model_type, classes)
    module, name = classes[model_type]
    return getattr(importlib.import_module(module), name)


def known_types(library: str) -> set[str]:
    """The model types of a library.

    Raises:
        UnusableModelError: If the library is not there.
    """
    return set(_classes(library))


def legal_keys(configuration: type) -> set[str]:
    """The keys that a configuration class takes, its own names and the standard ones."""
    # Both: a class with an `__init__` of its own, as all of flash-linear-attention's, may still
    # have the fields that a dataclass above it declares.
    parameters = inspect.signature(configuration.__init__).parameters.values()
    nameless = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {one.name for one in parameters if one.kind not in nameless} - {"self"}
    if dataclasses.is_dataclass(configuration):
        names |= {field.name for field in dataclasses.fields(configuration)}
    return (names | set(configuration.attribute_map)) - _NOT_ARCHITECTURE


def check_keys(configuration: type, model_type: str, values: dict[str, Any]) -> None:
    """Check that a configuration class takes these keys.

    Raises:
        ConfigError: For an unknown one; the message names the nearest ones.
    """
    legal = legal_keys(configuration)
    for key in values:
        if key not in legal:
            raise unknown_of_many(f"key of a {model_type!r} configuration", key, legal)


def make_configuration(configuration: type, model_type: str, values: dict[str, Any]) -> Any:
    """A configuration object.

    Raises:
        ConfigError: For values that the class refuses.
    """
    try:
        with quiet():
            return configuration(**values)
    except Exception as error:  # each class checks in its own way
        raise ConfigError(
            f"a {model_type!r} configuration refuses {values}: {one_line(error)}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the advice that transformers logs, which is not about this use of it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


@contextlib.contextmanager
def no_kernel_launched() -> Iterator[None]:
    """Refuse Triton launches, for traces of tensors without memory.

    Such a tensor's address is 0, and Triton launches kernels on it all the same: those of
    flash-linear-attention then write to address 0, and from there on every CUDA call of the process
    fails with "an illegal memory access was encountered".

    Raises:
        RuntimeError: From the launch that was refused.
    """
    jit = sys.modules.get("triton.runtime.jit")
    if jit is None:
        yield
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a Triton kernel cannot run on tensors without memory")

    launch = jit.JITFunction.run
    jit.JITFunction.run = refuse
    try:
        yield
    finally:
        jit.JITFunction.run = launch


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, cut at 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _classes(library: str) -> dict[str, tuple[str, str]]:
    """Module and name of the configuration class by model type.

    Both libraries have some types, e.g. `mamba2`; the auto classes of transformers would give the
    one that registered last.
    """
    require(library)
    if library == "fla":
        models = importlib.import_module("fla.models")
        found = {name: getattr(models, name) for name in dir(models) if name.endswith("Config")}
        return {one.model_type: ("fla.models", name) for name, one in found.items()}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        model_type: ("transformers", CONFIG_MAPPING_NAMES[model_type])
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if model_type in CONFIG_MAPPING_NAMES
    }
