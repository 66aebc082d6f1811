"""The complete state of a training run, saved so that `kill -9` at any moment loses little.

One file holds weights, thresholds with their controller, optimiser, random number generators and
the log; it is replaced atomically and begins with its own checksum. The position in the data is
the step: batches are a pure function of seed and step (`ham.train.batches`).

The folder is keyed by configuration, code, arm and seed and is not an output of the workflow:
Snakemake deletes outputs before it reruns a job.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from ham.errors import CorruptFileError
from ham.files import atomic_writer

MAGIC = b"HAM-TRAINING-STATE-1\n"
_DIGEST_BYTES = 32


def save_state(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write a training state atomically.

    Raises:
        DiskFullError: If it does not fit; the earlier state is kept.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with atomic_writer(path, "wb") as handle:
        handle.write(MAGIC)
        handle.write(hashlib.sha256(payload).digest())
        handle.write(payload)


def load_state(path: str | os.PathLike, device: torch.device) -> dict[str, Any] | None:
    """Read a training state; None if there is none.

    Raises:
        CorruptFileError: If the file is truncated or changed.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    head = len(MAGIC) + _DIGEST_BYTES
    payload = content[head:]
    if content[: len(MAGIC)] != MAGIC or content[len(MAGIC) : head] != (
        hashlib.sha256(payload).digest()
    ):
        raise CorruptFileError(
            f"training state {path} is truncated or changed; delete it to train from the start"
        )
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
