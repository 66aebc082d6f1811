"""Baselines outside the repository: entry points of installed packages, and files or modules.

A package announces a baseline in its `pyproject.toml`; the key is the registered name, the value
the module that registers it:

    [project.entry-points."ham.baselines"]
    my_mixer = "my_package.my_mixer"

Once the package is installed the name is legal wherever those of `baselines/` are. Nothing is
imported to find the names, so that starting the workflow stays quick.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ham.errors import ConfigError

GROUP = "ham.baselines"


def announced() -> dict[str, str]:
    """Module by registered name, from the entry points of installed packages."""
    return {name: modules[0] for name, modules in announcements().items()}


def announced_twice() -> dict[str, str]:
    """What is wrong with a name that installed packages announce for different modules, by name."""
    return {
        name: f"it is announced more than once, by {' and '.join(modules)}; uninstall one"
        for name, modules in announcements().items()
        if len(modules) > 1
    }


@functools.cache
def announcements() -> dict[str, list[str]]:
    """The modules announced for each name, all sorted."""
    modules: dict[str, set[str]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        modules.setdefault(point.name, set()).add(point.value)
    return {name: sorted(modules[name]) for name in sorted(modules)}


def import_source(source: str) -> ModuleType:
    """Import a Python file by its path, or a module by its dotted name.

    Raises:
        ConfigError: If it does not exist or raises; the message names the source and the reason.
    """
    try:
        if source.endswith(".py"):
            return _import_file(Path(source).resolve())
        return importlib.import_module(source)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        # Whatever an outside file raises is its fault, not the project's.
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"baseline {source!r} cannot be imported: {type(error).__name__}: {reason}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"baseline {str(path)!r} cannot be imported: there is no such file")
    # Files of one name in different folders are different modules.
    place = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"ham_outside_{place}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pydantic look their module up while it runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
