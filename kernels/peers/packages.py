"""What is asked about the packages behind peers, without importing them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from ham.errors import ConfigError


def on_cuda_with(*modules: str) -> Callable[[torch.device], bool]:
    """Availability: a CUDA device, and every one of these modules can be found."""

    def available(device: torch.device) -> bool:
        return (
            device.type == "cuda"
            and torch.cuda.is_available()
            and torch.version.cuda is not None
            and all(importlib.util.find_spec(module) is not None for module in modules)
        )

    return available


def version_of(*packages: str) -> Callable[[], str | None]:
    """The version of the first of these distributions that is installed."""

    def version() -> str | None:
        for package in packages:
            with contextlib.suppress(metadata.PackageNotFoundError):
                return metadata.version(package)
        return None

    return version


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; costs next to nothing where they are set already."""
    if all(os.environ.get(name) == value for name, value in values.items()):
        yield
        return
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def tensor(arguments: Mapping[str, Any], name: str) -> torch.Tensor:
    """The argument `name`, whatever axes its full name carries (`q_BTHK`, `q_BTGK`)."""
    return next(value for key, value in arguments.items() if key.rpartition("_")[0] == name)


def given(arguments: Mapping[str, Any], *names: str) -> str | None:
    """The first of these optional arguments that is given (not None, not 0), or None.

    Without names, all arguments are looked at.
    """
    for name in names or arguments:
        value = arguments.get(name)
        if value is not None and not (isinstance(value, int) and value == 0):
            return name
    return None


def refuse_others(arguments: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an optional argument that a peer would ignore silently.

    `chunk_size` is not one of them: it chooses how to compute, not what.
    """
    extra = given({name: value for name, value in arguments.items() if name != "chunk_size"})
    if extra is not None:
        raise ConfigError(f"this provider does not take {extra}")
