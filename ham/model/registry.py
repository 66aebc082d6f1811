"""The registry of sequence mixers: one decorated class per architecture.

A class decorated with `@register_baseline("name")` in `baselines/<name>.py` is found on the first
look-up, and so is one that an installed package announces (`ham.model.outside`). Registration alone
makes it legal in a configuration and puts it into every stage.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ham.config_files import describe_faults
from ham.errors import ConfigError, unknown_choice
from ham.model.outside import announced, announced_twice, import_source

if TYPE_CHECKING:
    from types import ModuleType

    from ham.model.mixer import MixerOptions, SequenceMixer

_MIXERS: dict[str, type[SequenceMixer]] = {}
_FAULTS: dict[str, str] = {}
"""Why an announced baseline cannot be used, by its name."""


def register_baseline(name: str) -> Callable[[type[SequenceMixer]], type[SequenceMixer]]:
    """Class decorator that makes a `SequenceMixer` known under `name`.

    Raises:
        ConfigError: If another class has that name already.
    """

    def register(mixer: type[SequenceMixer]) -> type[SequenceMixer]:
        known = _MIXERS.get(name)
        if known is not None and _place(known) != _place(mixer):
            raise ConfigError(
                f"baseline {name!r} of {_place(mixer)} is registered already, by {_place(known)}"
            )
        mixer.registered_name = name
        _MIXERS[name] = mixer
        return mixer

    return register


def registered_mixers() -> dict[str, type[SequenceMixer]]:
    """All mixers by name, after importing every module in `baselines/` and the announced ones.

    An announced one that cannot be imported is left out; `unusable_baselines` says why.
    """
    import ham.baselines

    for module in pkgutil.iter_modules(ham.baselines.__path__):
        importlib.import_module(f"ham.baselines.{module.name}")
    _FAULTS.update(announced_twice())
    for name, module in announced().items():
        if name not in _FAULTS and getattr(_MIXERS.get(name), "__module__", None) != module:
            _load_announced(name, module)
    return dict(sorted(_MIXERS.items()))


def unusable_baselines() -> dict[str, str]:
    """Why an announced baseline cannot be used, by its name."""
    registered_mixers()
    return dict(_FAULTS)


def load_baseline(source: str) -> list[str]:
    """Import a file or a module that registers baselines; returns their names.

    Args:
        source: Path of a `.py` file, or a dotted module name.

    Raises:
        ConfigError: If it cannot be imported, takes a name that is in use, or registers nothing.
            What it registered before it failed is taken back.
    """
    before = registered_mixers()
    prefix = f"{_import_or_undo(source).__name__}."
    names = [
        name
        for name, mixer in _MIXERS.items()
        if name not in before or f"{mixer.__module__}.".startswith(prefix)
    ]
    if not names:
        raise ConfigError(f"baseline {source!r} registers nothing; it needs @register_baseline")
    return sorted(names)


def _load_announced(name: str, module: str) -> None:
    """Import an announced module, or note why it cannot be used."""
    try:
        _import_or_undo(module)
    except ConfigError as error:
        _FAULTS[name] = str(error)
        return
    if name not in _MIXERS:
        _FAULTS[name] = f"module {module!r} does not register {name!r}"
    elif _MIXERS[name].__module__.partition(".")[0] != module.partition(".")[0]:
        place = _place(_MIXERS[name])
        _FAULTS[name] = f"{module!r} announces a name that is registered already, by {place}"


def _import_or_undo(source: str) -> ModuleType:
    """Import; where that fails, what was registered on the way is taken back."""
    before = dict(_MIXERS)
    try:
        return import_source(source)
    except ConfigError:
        _MIXERS.clear()
        _MIXERS.update(before)
        raise


def _place(mixer: type[SequenceMixer]) -> str:
    return f"{mixer.__module__}.{mixer.__qualname__}"


def mixer_class(name: str) -> type[SequenceMixer]:
    """The class registered under `name`.

    Raises:
        ConfigError: If there is none; the message lists the registered names, or says why an
            announced one cannot be used.
    """
    mixers = registered_mixers()
    if name not in mixers and name in _FAULTS:
        raise ConfigError(f"mixer {name!r} cannot be used: {_FAULTS[name]}")
    if name not in mixers:
        raise unknown_choice("mixer", name, mixers)
    return mixers[name]


def parse_options(name: str, options: dict[str, Any], context: int) -> MixerOptions:
    """Validate the options of a mixer against the training context.

    Raises:
        ConfigError: For an unknown mixer, one that lacks a method or claims what it cannot do, an
            unknown option or a value outside its legal set.
    """
    from ham.model.capabilities import class_faults, require_sound

    mixer = mixer_class(name)
    require_sound(name, class_faults(mixer))
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
