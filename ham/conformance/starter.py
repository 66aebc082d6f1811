"""The starting file of a new baseline."""

from __future__ import annotations

import keyword
import re
import string
from importlib.resources import files

from ham.errors import ConfigError
from ham.model.registry import registered_mixers


def starting_file(name: str) -> str:
    """Python source of a small baseline called `name` that keeps every rule.

    Raises:
        ConfigError: If the name is not usable or in use already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"a baseline cannot be called {name!r}; legal: lower-case letters, digits and "
            "underscores, from a letter on, and no word of Python"
        )
    known = registered_mixers()
    if name in known:
        raise ConfigError(f"baseline {name!r} is registered already, by {known[name].__module__}")
    words = [word for word in name.split("_") if word]
    template = string.Template(files("ham.conformance").joinpath("starter.txt").read_text("utf-8"))
    return template.substitute(
        name=name,
        Class="".join(word.capitalize() for word in words),
        title=" ".join(words).capitalize(),
    )
