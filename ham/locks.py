"""File locks that go with their process, and taking over from a process that a killed run left.

Snakemake killed with SIGKILL leaves its jobs running. A rerun would then train beside the orphan,
both writing the same files. Each job therefore owns its output; a newcomer asks the owner to stop
(SIGTERM, upon which training saves its state), waits, and goes on from there. That is safe because
a living workflow never runs two jobs with one output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ham.errors import HamError
from ham.files import stable_hash

POLL_SECONDS = 0.2


def lock_folder() -> Path:
    """Where the lock files lie: one local folder for all users and checkouts of this machine."""
    return Path(os.environ.get("HAM_LOCK_FOLDER") or Path(tempfile.gettempdir()) / "ham-locks")


def try_lock(name: str, shared: bool = False) -> IO | None:
    """The open, locked file called `name`, or None while another process holds it.

    The file holds the number of the process. Closing it, or the end of the process, frees it.

    Args:
        shared: Others may hold it at the same time if they share it too.
    """
    folder = lock_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        folder.chmod(0o777)
    handle = os.fdopen(os.open(_path(name), os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def holder(name: str) -> int | None:
    """The process that locked `name` last, or None if that is not known."""
    try:
        return int(_path(name).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def sole_writer(output: Path, patience_seconds: float = 60.0) -> Iterator[None]:
    """Be the only process of this machine that makes `output`; stop an orphan that still does.

    Raises:
        HamError: If the other process does not stop within `patience_seconds`.
    """
    name = f"output-{stable_hash(str(output.resolve()))}"
    handle = try_lock(name)
    deadline = time.monotonic() + patience_seconds
    asked = None
    while handle is None:
        other = holder(name)
        if other is not None and other != asked:
            print(
                f"ham: process {other} of an earlier run still makes {output}; stopping it",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGTERM)
            asked = other
        if time.monotonic() > deadline:
            raise HamError(
                f"process {other} still makes {output} and does not stop; end it and repeat"
            )
        time.sleep(POLL_SECONDS)
        handle = try_lock(name)
    with handle:
        yield


def _path(name: str) -> Path:
    return lock_folder() / f"{name}.lock"
