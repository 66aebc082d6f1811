"""Configuration files: reading, overlaying, `--set`, and what is wrong with one, in words.

`load_config` reads one or more YAML files (a later one overlays an earlier one), applies `--set`
overrides and validates the result. An unknown key, a wrong type or a value outside its legal set
is a `ConfigError` that names the key. There is no second way to configure an experiment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ham.config import Config
from ham.errors import ConfigError, MissingDataError

Model = TypeVar("Model", bound=BaseModel)


def load_config(
    paths: str | os.PathLike | Sequence[str | os.PathLike], overrides: Sequence[str] = ()
) -> Config:
    """Read, overlay and validate YAML files.

    Args:
        paths: One file, or several of which a later one overlays the earlier (maps are merged,
            everything else is replaced).
        overrides: `"a.b.c=value"` strings; the value is read as YAML.

    Raises:
        MissingDataError: If a file does not exist.
        ConfigError: If the result is not valid.
    """
    files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    merged: dict[str, Any] = {}
    for path in files:
        merged = _overlay(merged, read_yaml(path))
    for override in overrides:
        merged = _overlay(merged, _parse_override(override))
    return parse_config(merged, source=" + ".join(str(path) for path in files))


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a plain dictionary.

    Raises:
        ConfigError: With one line per fault: the key, what is wrong and the value received.
    """
    return validated(Config, _lists_to_tuples(values), source)


def validated(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Validate a plain dictionary as any configuration class.

    Raises:
        ConfigError: With one line per fault, as `parse_config`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source} is not valid:\n{describe_faults(error, model)}") from error


def describe_faults(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Pydantic's faults as one line each: key, reason, value received, legal set.

    Args:
        error: What validation raised.
        model: The class that was validated; `Config` when None.
    """
    schema = (model or Config).model_json_schema()
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "(whole)"
        if fault["type"] == "extra_forbidden":
            known = _schema_at(schema, fault["loc"][:-1]).get("properties", {})
            lines.append(f"  {key}: unknown key; known: {', '.join(sorted(known)) or 'none'}")
            continue
        message = fault["msg"].removeprefix("Value error, ")
        legal = _legal_range(_schema_at(schema, fault["loc"]))
        shown = repr(fault["input"])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        suffix = "" if isinstance(fault["input"], dict | BaseModel) else f" (received {shown})"
        lines.append(f"  {key}: {message}{legal}{suffix}")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file, for editors and for Snakemake."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _schema_at(schema: dict[str, Any], location: tuple[str | int, ...]) -> dict[str, Any]:
    """The part of a JSON schema that describes the value at `location`; empty if there is none."""
    definitions = schema.get("$defs", {})
    for part in location:
        inner = schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {})
        schema = inner if isinstance(part, int) else inner.get(part, {})
        variants = [one for one in schema.get("anyOf", []) if one.get("type") != "null"]
        schema = variants[0] if variants else schema
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rpartition("/")[2]]
    return schema


def _legal_range(schema: dict[str, Any]) -> str:
    """`; legal: 0..1` for a bounded number, else nothing."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"; legal: {low:g}..{high:g}"
    return ""


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The map in a YAML file.

    Raises:
        MissingDataError: If the file does not exist.
        ConfigError: If it cannot be read or holds no map.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingDataError(f"configuration file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a map of keys, not {type(loaded).__name__}")
    return loaded


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _overlay(merged[key], value)
        else:
            merged[key] = value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set expects key=value, received {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _lists_to_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """YAML has no tuples; strict validation wants one for `train.betas`."""
    train = values.get("train")
    if isinstance(train, dict) and isinstance(train.get("betas"), list):
        return {**values, "train": {**train, "betas": tuple(train["betas"])}}
    return values
