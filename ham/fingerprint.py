"""Fingerprints of the code behind a result: what is hashed, and what is left out on purpose.

A fingerprint covers the given modules and every project module that they import, directly or
through others, also inside functions. Nothing is imported: the sources are parsed. Comments,
docstrings and layout do not count, so formatting a file reruns nothing; a changed operator does.
A string that is exactly the name of a project module counts as an import of it, because lazy
registries and `importlib.resources` name modules that way. Files other than Python and Markdown
in a package of the closure (templates, task files, the corpus) count with their bytes.

Modules that steer or record jobs without touching their numbers are left out (`NEUTRAL`), and so
are imports under `if TYPE_CHECKING`. `ham.config`, its parts and `ham.config_files` are among them:
the resolved values of a configuration are compared by themselves (`ham.workflow.stage_hash`).

A module outside the project, an installed baseline, counts with every Python file of its top-level
package and with the project code that those reach.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ham.errors import DiskFullError
from ham.files import write_json

PROJECT = "ham"
NEUTRAL = frozenset(
    {
        "ham",
        "ham.cli",
        "ham.cli._kernels_training",
        "ham.config",
        "ham.config_arms",
        "ham.config_data",
        "ham.config_evaluate",
        "ham.config_files",
        "ham.device",
        "ham.doctor",
        "ham.errors",
        "ham.fingerprint",
        "ham.locks",
        "ham.plan",
        "ham.progress",
        "ham.report.manifest",
        "ham.workflow",
    }
)
MOST_KNOWN_SOURCES = 5000
# Code is read module by module; Markdown is for readers.
_SKIPPED_SUFFIXES = frozenset({".py", ".pyc", ".md"})
_MENTIONING = frozenset({ast.Import, ast.ImportFrom, ast.Constant})
_DOCUMENTED = frozenset({ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef})
_DOTTED = re.compile(r"ham(\.\w+)+")
# Where code stands, and what its place decides anyway (`ctx`: an assigned name is a target).
_UNHASHED = frozenset(
    {"lineno", "col_offset", "end_lineno", "end_col_offset", "type_comment", "ctx"}
)


class _Source(NamedTuple):
    digest: bytes
    references: frozenset[str]


def repository_root() -> Path:
    """The folder that holds `ham/`, `kernels/` and `baselines/`."""
    return Path(__file__).resolve().parent.parent


def fingerprint(*modules: str, root: Path | None = None) -> str:
    """Hash of `modules` and of all project code that they reach: 12 hexadecimal digits.

    Args:
        modules: Dotted names, e.g. `"ham.cli.train"`.
        root: The repository; that of this file when None.

    Raises:
        ModuleNotFoundError: If one of `modules` has no source file: a project module under `root`,
            another where Python looks for it.
    """
    root = root or repository_root()
    total = hashlib.sha256()
    own = [name for name in modules if _is_project(name)]
    for outside in sorted(set(modules) - set(own)):
        for path in _outside_files(outside):
            source = _read(path, "", path.stat().st_mtime_ns)
            total.update(path.name.encode() + b"\0" + source.digest)
            own.extend(name for name in source.references if module_path(name, root))
    for name in sorted(reachable_modules(own, root)):
        path = module_path(name, root)
        assert path is not None
        total.update(name.encode() + b"\0" + _source(name, path).digest)
        if path.name == "__init__.py":
            for extra in _data_files(path.parent):
                digest = _file_digest(extra, extra.stat().st_mtime_ns)
                total.update(extra.name.encode() + b"\0" + digest)
    _KNOWN.save()
    return total.hexdigest()[:12]


def reachable_modules(modules: Iterable[str], root: Path) -> set[str]:
    """The closure of `modules` under project imports, packages above them included.

    Raises:
        ModuleNotFoundError: If one of `modules` has no source file under `root`.
    """
    found: set[str] = set()
    # Most names are met many times, and looking for their files is a quarter of the work.
    seen = set(NEUTRAL)
    waiting = list(modules)
    for name in waiting:
        if module_path(name, root) is None:
            raise ModuleNotFoundError(f"no source file for {name} under {root}", name=name)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = module_path(name, root)
        if path is None:
            continue
        found.add(name)
        waiting.extend(_parents(name))
        waiting.extend(_source(name, path).references)
    return found


def module_path(name: str, root: Path) -> Path | None:
    """The source file of a project module, or None where there is none.

    `ham.kernels` lies in `kernels/` and `ham.baselines` in `baselines/` (see `pyproject.toml`).
    """
    parts = name.split(".")
    if parts[0] != PROJECT:
        return None
    if parts[1:2] in (["kernels"], ["baselines"]):
        parts = parts[1:]
    # Plain strings: thousands of names are looked up, few of which are modules.
    base = os.path.join(root, *parts)
    for candidate in (f"{base}.py", os.path.join(base, "__init__.py")):
        if os.path.isfile(candidate):
            return Path(candidate)
    return None


def _outside_files(name: str) -> list[Path]:
    """The Python files of the top-level package or module of `name`, which is not imported."""
    top = name.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ModuleNotFoundError(f"no module {top} to be found", name=name)
    if spec.submodule_search_locations:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        return sorted(path for folder in folders for path in folder.rglob("*.py"))
    return [Path(spec.origin)]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in _SKIPPED_SUFFIXES and not path.name.startswith(".")
    )


@functools.cache
def _file_digest(path: Path, mtime_ns: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _source(name: str, path: Path) -> _Source:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return _read(path, package, path.stat().st_mtime_ns)


@functools.cache
def _read(path: Path, package: str, mtime_ns: int) -> _Source:
    """Digest and references of one source file; `mtime_ns` only keys the cache."""
    content = path.read_bytes()
    return _KNOWN.find(content, package, lambda: _parse(content, path, package))


def _parse(content: bytes, path: Path, package: str) -> _Source:
    parts: list[str] = []
    mentions: list[ast.AST] = []
    with _collector_paused():
        _flatten(ast.parse(content, filename=str(path)), parts, mentions)
    names = {name for node in mentions for name in _names(node, package) if _is_project(name)}
    return _Source(hashlib.sha256("\n".join(parts).encode()).digest(), frozenset(names))


class _KnownSources:
    """What was parsed before, kept on disk: parsing takes 2 ms a module, in every process.

    Entries are found by the bytes of a source, and the file belongs to one version of this module
    and of Python, so none can be out of date. A file that cannot be read or written costs time
    only.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, list[str]]] | None = None
        self._used: set[str] = set()
        self._new = False

    def find(self, content: bytes, package: str, parse: Callable[[], _Source]) -> _Source:
        """The entry of a source, made by `parse` if there is none."""
        if self._entries is None:
            self._entries = self._load()
        key = hashlib.sha256(package.encode() + b"\0" + content).hexdigest()
        self._used.add(key)
        if key in self._entries:
            digest, references = self._entries[key]
            return _Source(bytes.fromhex(digest), frozenset(references))
        source = parse()
        self._entries[key] = (source.digest.hex(), sorted(source.references))
        self._new = True
        return source

    def save(self) -> None:
        """Write what is new; entries of other checkouts go when there are too many."""
        if not self._new or self._entries is None:
            return
        entries = self._entries
        if len(entries) > MOST_KNOWN_SOURCES:
            entries = {key: entries[key] for key in self._used}
        with contextlib.suppress(OSError, DiskFullError):
            write_json(_known_sources_file(), entries)
        self._new = False

    @staticmethod
    def _load() -> dict[str, tuple[str, list[str]]]:
        try:
            loaded = json.loads(_known_sources_file().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}


_KNOWN = _KnownSources()


@functools.cache
def _known_sources_file() -> Path:
    version = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()[:12]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("HAM_CACHE") or Path(base) / "ham-bench"
    return Path(folder) / f"sources-{version}.json"


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cyclic collector, which costs a fifth of the time on trees of live objects."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _flatten(node: ast.AST, parts: list[str], mentions: list[ast.AST]) -> None:
    """Append a syntax tree to `parts`, and the nodes that may name project modules to `mentions`.

    One pass, because it runs whenever Snakemake starts. Docstrings and positions are skipped, and
    so are empty fields, of which Python 3.12 added some.
    """
    kind = type(node)
    parts.append(kind.__name__)
    if kind in _MENTIONING:
        mentions.append(node)
    for field, value in node.__dict__.items():
        if field in _UNHASHED or value == [] or (value is None and field != "value"):
            continue
        parts.append(field)
        if type(value) is list:
            documented = field == "body" and kind in _DOCUMENTED and _is_docstring(value[0])
            for_types = field == "body" and kind is ast.If and _is_type_checking(node.test)
            parts.append("[")
            for item in value[1:] if documented else value:
                if isinstance(item, ast.AST):
                    _flatten(item, parts, [] if for_types else mentions)
                else:
                    parts.append(repr(item))
            parts.append("]")
        elif isinstance(value, ast.AST):
            _flatten(value, parts, mentions)
        else:
            parts.append(repr(value))
    parts.append(")")


def _names(node: ast.Import | ast.ImportFrom | ast.Constant, package: str) -> Iterator[str]:
    """The dotted names that an import or a string may stand for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = _absolute(node, package)
        yield origin
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
        yield node.value


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module named after `from`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def _is_project(name: str) -> bool:
    return name == PROJECT or name.startswith(f"{PROJECT}.")


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
