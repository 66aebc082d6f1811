"""The registry of sequence mixers: one decorated class per architecture.

A class decorated with `@register_baseline("name")` in `baselines/<name>.py` is found on the first
look-up. Registration alone makes it legal in a configuration and puts it into every stage.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ham.config_files import describe_faults
from ham.errors import ConfigError, unknown_choice

if TYPE_CHECKING:
    from ham.model.mixer import MixerOptions, SequenceMixer

_MIXERS: dict[str, type[SequenceMixer]] = {}


def register_baseline(name: str) -> Callable[[type[SequenceMixer]], type[SequenceMixer]]:
    """Class decorator that makes a `SequenceMixer` known under `name`.

    Raises:
        ValueError: If another class has that name already.
    """

    def register(mixer: type[SequenceMixer]) -> type[SequenceMixer]:
        known = _MIXERS.get(name)
        if known is not None and known.__qualname__ != mixer.__qualname__:
            raise ValueError(f"baseline {name!r} is registered already, by {known.__module__}")
        mixer.registered_name = name
        _MIXERS[name] = mixer
        return mixer

    return register


def registered_mixers() -> dict[str, type[SequenceMixer]]:
    """All mixers by name, after importing every module in `baselines/`."""
    import ham.baselines

    for module in pkgutil.iter_modules(ham.baselines.__path__):
        importlib.import_module(f"ham.baselines.{module.name}")
    return dict(sorted(_MIXERS.items()))


def mixer_class(name: str) -> type[SequenceMixer]:
    """The class registered under `name`.

    Raises:
        ConfigError: If there is none; the message lists the registered names.
    """
    mixers = registered_mixers()
    if name not in mixers:
        raise unknown_choice("mixer", name, mixers)
    return mixers[name]


def parse_options(name: str, options: dict[str, Any], context: int) -> MixerOptions:
    """Validate the options of a mixer against the training context.

    Raises:
        ConfigError: For an unknown mixer, an unknown option or a value outside its legal set.
    """
    mixer = mixer_class(name)
    try:
        parsed = mixer.Options.model_validate(options)
    except ValidationError as error:
        legal = ", ".join(sorted(mixer.Options.model_fields)) or "none"
        raise ConfigError(
            f"options of mixer {name!r} are not valid (known options: {legal}):\n"
            f"{describe_faults(error, mixer.Options)}"
        ) from error
    parsed.check_context(context)
    return parsed
