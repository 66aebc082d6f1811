"""Operations and their providers: who can compute what, and on which device.

An operation is a folder of this package whose `__init__` calls `register_operation`.
Verification, timing and tests loop over the registry, so a new provider needs no further line
anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ham.errors import DeviceError, unknown_choice

REFERENCE = "reference"


@dataclass(frozen=True)
class Cost:
    """What an operation needs by definition, whatever computes it.

    Attributes:
        flops: Floating-point operations of one forward pass, a multiply-add counted as 2.
        bytes: Bytes moved if each input is read once and each output written once.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    Attributes:
        name: Name that callers pass as `provider=`.
        function: Takes the arguments of `Operation.run`, defaults filled in, without `provider`.
        available: Whether it can run on a device; must not raise.
    """

    name: str
    function: Callable[..., Any]
    available: Callable[[torch.device], bool]


@dataclass(frozen=True)
class Operation:
    """An operation and who can compute it.

    Attributes:
        name: Name of its folder.
        run: The public function; takes `provider=`.
        providers: By name; `reference` is always among them.
    """

    name: str
    run: Callable[..., Any]
    providers: dict[str, Provider] = field(default_factory=dict)


_OPERATIONS: dict[str, Operation] = {}


def anywhere(device: torch.device) -> bool:
    """Availability of plain torch code."""
    return True


def register_operation(operation: Operation, *providers: Provider) -> None:
    """Make an operation known together with its providers."""
    _OPERATIONS[operation.name] = operation
    for provider in providers:
        register_provider(operation.name, provider)


def register_provider(operation: str, provider: Provider) -> None:
    """Add a provider to an operation.

    Raises:
        ValueError: If the operation has a provider of that name already.
    """
    providers = _OPERATIONS[operation].providers
    if provider.name in providers:
        raise ValueError(f"{operation} has a provider {provider.name!r} already")
    providers[provider.name] = provider


def operations() -> dict[str, Operation]:
    """All operations by name, after importing every folder of this package."""
    import ham.kernels

    for module in pkgutil.iter_modules(ham.kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"ham.kernels.{module.name}")
    return dict(sorted(_OPERATIONS.items()))


def find_operation(name: str) -> Operation:
    """The operation called `name`.

    Raises:
        ConfigError: If there is none; the message lists the known ones.
    """
    known = operations()
    if name not in known:
        raise unknown_choice("operation", name, known)
    return known[name]


def find_provider(operation: str, name: str, device: torch.device) -> Provider:
    """The provider `name` of an operation whose folder is imported already.

    Raises:
        ConfigError: If the operation has no such provider; the message lists the legal ones.
        DeviceError: If the provider cannot run on `device`.
    """
    providers = _OPERATIONS[operation].providers
    if name not in providers:
        raise unknown_choice(f"provider of {operation}", name, providers)
    provider = providers[name]
    if not provider.available(device):
        usable = sorted(other.name for other in providers.values() if other.available(device))
        raise DeviceError(
            f"provider {name!r} of {operation} cannot run on {device}; "
            f"available there: {', '.join(usable)}"
        )
    return provider
