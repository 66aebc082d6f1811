"""What a mixer says of itself, checked against what it has before anything is built on it."""

from __future__ import annotations

import inspect

from ham.errors import ConfigError
from ham.model.mixer import MixerOptions, SequenceMixer

HINTED_METHODS = ("forward", "prefill", "step")


def class_faults(mixer: type[SequenceMixer]) -> list[str]:
    """What is missing or contradicts itself in a class, one clause each."""
    from ham.kernels.registry import operations

    faults = []
    missing = sorted(getattr(mixer, "__abstractmethods__", ()))
    if missing:
        faults.append(f"{mixer.__name__} lacks {', '.join(missing)}")
    if not (isinstance(mixer.Options, type) and issubclass(mixer.Options, MixerOptions)):
        faults.append(f"{mixer.__name__}.Options does not derive from MixerOptions")
    if mixer.uses_hints:
        deaf = [name for name in HINTED_METHODS if not _takes_hints(mixer, name)]
        if deaf:
            faults.append(
                f"{mixer.__name__}.uses_hints is true, but {', '.join(deaf)} take no `hints`"
            )
    unknown = sorted(set(mixer.operations) - set(operations())) if mixer.operations else []
    if unknown:
        faults.append(
            f"{mixer.__name__}.operations names {', '.join(unknown)}; "
            f"known: {', '.join(sorted(operations()))}"
        )
    return faults


def instance_faults(mixer: SequenceMixer) -> list[str]:
    """The same for what only an instance shows."""
    name = type(mixer).__name__
    if mixer.routes and mixer.controller is None:
        return [f"{name}.routes is true, but it has no `controller`"]
    if mixer.controller is not None and not mixer.routes:
        return [f"{name} has a `controller`, but {name}.routes is false"]
    return []


def require_sound(name: str, faults: list[str]) -> None:
    """Refuse a mixer that has faults.

    Raises:
        ConfigError: One message with all of them.
    """
    if faults:
        raise ConfigError(f"mixer {name!r} cannot be used: {'; '.join(faults)}")


def _takes_hints(mixer: type[SequenceMixer], method: str) -> bool:
    parameters = inspect.signature(getattr(mixer, method)).parameters.values()
    return any(one.name == "hints" or one.kind is one.VAR_KEYWORD for one in parameters)
