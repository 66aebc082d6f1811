"""An arm that failed: what stands in the place of its results, so that the other arms go on.

With `--keep-going`, as the workflow calls the stages, an arm that cannot be built or that raises
leaves a checkpoint folder with `failed.json` and error rows at the coordinates of its main numbers;
the stages after training then write the same for theirs. Faults of the surroundings (a full disk, a
missing file, a device that is not there) still end the job: they say nothing about the arm.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from ham.errors import ConfigError, HamError, NotFiniteError, RoutingError, UnusableModelError
from ham.files import read_json, write_json

FAILURE_FILE = "failed.json"
OF_THE_ARM = (ConfigError, RoutingError, NotFiniteError, UnusableModelError)
"""Errors that an arm causes; an exception that is no `HamError` is one of the arm as well."""


def reason_of(error: Exception) -> str:
    """Why the arm failed, in one line; a traceback goes to the log where it helps.

    Raises:
        HamError: The error itself, if it is a fault of the surroundings.
    """
    if not isinstance(error, HamError):
        traceback.print_exception(error)
        return " ".join(f"{type(error).__name__}: {error}".split())
    if not isinstance(error, OF_THE_ARM):
        raise error
    return " ".join(str(error).split())


def write_failure(checkpoint: Path, reason: str) -> None:
    """Leave a checkpoint folder that says why it holds no model."""
    (checkpoint / "model.json").unlink(missing_ok=True)
    write_json(checkpoint / FAILURE_FILE, {"error": reason})


def clear_failure(checkpoint: Path) -> None:
    """Forget what an earlier attempt left."""
    (checkpoint / FAILURE_FILE).unlink(missing_ok=True)


def read_failure(checkpoint: Path) -> str | None:
    """Why training left no model in this folder; None where it did not fail."""
    path = checkpoint / FAILURE_FILE
    return read_json(path)["error"] if path.exists() else None
