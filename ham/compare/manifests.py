"""What differs between the manifests of two runs: code, machine, versions, configuration."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ham.compare.sides import Side
from ham.report.manifest import VOLATILE_GPU

ABSENT = "–"
MOST_VALUES = 3
# Read first; the others follow in the order of their names.
FIRST = ("commit", "dirty hash", "device", "cpu", "threads", "platform", "seeds")


@dataclass(frozen=True)
class Fact:
    """Something that a manifest says, with the values that occur on each side."""

    name: str
    one: tuple[str, ...]
    other: tuple[str, ...]


def manifest_differences(one: Side, other: Side) -> list[Fact]:
    """Every fact whose values differ: code and machine first, then versions and configuration."""
    sides = [_facts(side) for side in (one, other)]
    names = sorted(sides[0].keys() | sides[1].keys(), key=_order)
    found = [
        Fact(name, *(tuple(sorted(side.get(name, {ABSENT}))) for side in sides)) for name in names
    ]
    return [fact for fact in found if fact.one != fact.other]


def shorten(values: tuple[str, ...]) -> str:
    """Values for a line of a table; many become their number."""
    return ", ".join(values) if len(values) <= MOST_VALUES else f"{len(values)} values"


def _order(name: str) -> tuple[int, str]:
    if name in FIRST:
        return (FIRST.index(name), "")
    groups = ("GPU ", "version ", "config hash", "code fingerprint", "config ", "extra ")
    return (len(FIRST) + next(i for i, start in enumerate(groups) if name.startswith(start)), name)


def _facts(side: Side) -> dict[str, set[str]]:
    facts: dict[str, set[str]] = defaultdict(set)
    for manifest in side.used_manifests:
        for name, value in _of_manifest(manifest):
            facts[name].add(value)
    for row in side.rows:
        facts["device"].add(row.device)
        facts["config hash"].add(row.config_hash or ABSENT)
        facts["code fingerprint"].add(row.code_fingerprint or ABSENT)
    return facts


def _of_manifest(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "commit", str(manifest.get("commit", ABSENT))
    yield "dirty hash", str(manifest.get("dirty_hash") or ABSENT)
    for name in ("cpu", "threads", "platform", "seeds"):
        yield name, _text(manifest.get(name))
    for gpu in manifest.get("gpus", []):
        for name, value in gpu.items():
            if name not in VOLATILE_GPU:
                yield f"GPU {name}", _text(value)
    for name, value in manifest.get("versions", {}).items():
        yield f"version {name}", _text(value)
    for part in ("config", "extra"):
        for name, value in flatten(manifest.get(part, {})):
            yield f"{part} {name}", _text(value)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of nested maps; maps in a list go by their `name`, if all have one."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[str, Any]] = value.items()
    elif _named(value):
        items = ((item["name"], {k: v for k, v in item.items() if k != "name"}) for item in value)
    else:
        yield prefix, value
        return
    for name, inner in items:
        yield from flatten(inner, f"{prefix}.{name}" if prefix else str(name))


def _named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and "name" in item for item in value)
    )


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
