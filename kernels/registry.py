"""Operations and their providers: who can compute what, and on which device.

An operation is a folder of this package. Its `__init__` builds one `Operation`, registers the
providers and hands both to `register_operation`; verification, timing and tests loop over the
registry, so a new provider needs no further line anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class Case(Protocol):
    """A problem size of one operation, as kept in its `cases.py`."""

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""

    @property
    def time(self) -> int:
        """Sequence length T."""

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of the operation; equal seeds give equal values on every device."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    Attributes:
        name: Name that callers pass as `provider=`.
        function: Takes the operation's own arguments, all of them by keyword.
        available: Whether it can run on a device; must not raise.
    """

    name: str
    function: Callable[..., Any]
    available: Callable[[torch.device], bool]


@dataclass(frozen=True)
class Operation:
    """An operation with everything needed to check and time its providers.

    Attributes:
        name: Name of its folder.
        run: The public function; takes `provider=`.
        verify_cases: Small cases that cover the corners; every provider must match on all.
        speed_cases: Cases worth timing.
        providers: By name; `reference` is always among them.
    """

    name: str
    run: Callable[..., Any]
    verify_cases: tuple[Case, ...]
    speed_cases: tuple[Case, ...]
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
