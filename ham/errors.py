"""Errors that a user can cause and can fix.

The command line prints them as one message without a traceback and exits with status 2. Anything
else that is raised is a defect of the project and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class HamError(Exception):
    """A mistake of the user or a fault of the surroundings; the message says what to do."""


class ConfigError(HamError):
    """A configuration that is not valid; names the key, the value received and the legal set."""


class CorruptFileError(HamError):
    """A file whose content does not match its checksum, size or format."""


class DiskFullError(HamError):
    """The file system ran out of space; what was there before is untouched."""


class DeviceError(HamError):
    """The device asked for does not exist here or cannot do what was asked."""


class CachePoolFullError(HamError):
    """The page pool of the KV cache reached its limit; says what was needed, free and allowed."""


class NotFiniteError(HamError):
    """A model that computes NaN or infinities where numbers are needed; names where."""


class RoutingError(HamError):
    """Routing cannot decide: scores that are not numbers, or hints that a score needs."""


class UnusableModelError(HamError):
    """A model of another library that cannot do here what was asked.

    A package that is missing, a device without a path, a position range that ends too early, a
    cache that cannot be measured.
    """


class MissingDataError(HamError):
    """A file that an earlier stage or a download should have written is not there."""


def unknown_choice(kind: str, received: object, legal: Iterable[str]) -> ConfigError:
    """A `ConfigError` that names the value received and every legal one."""
    return ConfigError(f"unknown {kind} {received!r}; known: {', '.join(sorted(legal))}")


def unknown_of_many(kind: str, received: str, legal: Iterable[str]) -> ConfigError:
    """The same where there are too many legal values to list: the nearest of them, and how many."""
    # Here, because every `import ham` reads this module.
    import difflib

    known = sorted(legal)
    nearest = difflib.get_close_matches(received, known, n=6, cutoff=0.4) or known[:6]
    return ConfigError(
        f"unknown {kind} {received!r}; nearest of {len(known)} known: {', '.join(nearest)}"
    )
