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


class RoutingError(HamError):
    """Routing cannot decide: scores that are not numbers, or hints that a score needs."""


class MissingDataError(HamError):
    """A file that an earlier stage or a download should have written is not there."""


def unknown_choice(kind: str, received: object, legal: Iterable[str]) -> ConfigError:
    """A `ConfigError` that names the value received and every legal one."""
    return ConfigError(f"unknown {kind} {received!r}; known: {', '.join(sorted(legal))}")
