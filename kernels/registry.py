"""Operations and their providers: who can compute what, and on which device.

An operation is a folder of this package whose `__init__` calls `register_operation`.
Verification, timing and tests loop over the registry, so a new provider needs no further line
anywhere else. Other people's implementations (`ham.kernels.peers`) are providers of kind `peer`:
they are there to be measured against, and neither `auto` nor `ham kernels verify` takes them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ham.errors import ConfigError, DeviceError, unknown_choice

REFERENCE = "reference"
TORCH = "torch"
TRITON = "triton"
AUTO = "auto"

Limits = Callable[[Mapping[str, Any]], str | None]


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
        kind: `reference` is the definition, `own` this project's code, `peer` somebody else's.
        limits: Why it cannot do these arguments (by name), in a few words, or None if it can;
            must not raise.
        version: Version of the package behind a peer, or None where it is not installed.
        setting: What must hold while it runs, forward and backward; entered around every call by
            whoever compares or times it.
        unguarded: Further setting under which a peer does what it refuses to do because it knows
            its result to be wrong; for `--time-wrong-peer` only.
    """

    name: str
    function: Callable[..., Any]
    available: Callable[[torch.device], bool]
    kind: Literal["reference", "own", "peer"] = "own"
    limits: Limits | None = None
    version: Callable[[], str | None] | None = None
    setting: Callable[[], AbstractContextManager] = nullcontext
    unguarded: Callable[[], AbstractContextManager] | None = None

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Why it cannot do these arguments, or None."""
        return None if self.limits is None else self.limits(arguments)


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


def limits_of(check: Callable[..., None], *names: str) -> Limits:
    """Limits from a function that raises `ConfigError` for what its provider cannot do.

    Args:
        check: Takes the arguments called `names`, in this order, None for one left to its default.
        names: Parameters of the operation.
    """

    def limits(arguments: Mapping[str, Any]) -> str | None:
        try:
            check(*(arguments.get(name) for name in names))
        except ConfigError as error:
            return str(error)
        return None

    return limits


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


def find_provider(
    operation: str,
    name: str,
    device: torch.device,
    arguments: Mapping[str, Any] | None = None,
) -> Provider:
    """The provider `name` of an operation whose folder is imported already.

    Args:
        operation: Name of the operation.
        name: A provider, or `auto`: `triton` on a CUDA device where it is available and can do
            the arguments, `torch` everywhere else.
        device: Where the inputs are.
        arguments: Arguments of the operation by name, for `auto`; without them its limits are not
            looked at.

    Raises:
        ConfigError: If the operation has no such provider; the message lists the legal ones.
        DeviceError: If the provider cannot run on `device`.
    """
    if name == AUTO:
        return _automatic(operation, device, arguments or {})
    providers = _OPERATIONS[operation].providers
    if name not in providers:
        # Peers register themselves when the whole package is imported.
        providers = operations()[operation].providers
    if name not in providers:
        peers = sorted(other.name for other in providers.values() if other.kind == "peer")
        legal = [*sorted(set(providers).difference(peers)), AUTO, *peers]
        raise ConfigError(f"unknown provider of {operation} {name!r}; known: {', '.join(legal)}")
    provider = providers[name]
    if not provider.available(device):
        usable = sorted(other.name for other in providers.values() if other.available(device))
        raise DeviceError(
            f"provider {name!r} of {operation} cannot run on {device}; "
            f"available there: {', '.join(usable)}"
        )
    return provider


def _automatic(operation: str, device: torch.device, arguments: Mapping[str, Any]) -> Provider:
    providers = _OPERATIONS[operation].providers
    fused = providers.get(TRITON)
    if fused is None or device.type != "cuda" or not fused.available(device):
        return providers[TORCH]
    # No Triton kernel takes float64; asked for its reason, it would raise an error, whose text
    # `torch.compile` cannot read.
    if any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in arguments.values()):
        return providers[TORCH]
    if arguments and fused.refusal(arguments) is not None:
        return providers[TORCH]
    return fused
