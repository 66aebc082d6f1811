"""Which device a job runs on, and a lock so that one job at a time uses a GPU, or as many as agree.

Snakemake never hands out device numbers, and a killed Snakemake leaves its jobs running. A file
lock per physical GPU, taken by the job itself, keeps timings honest between Snakemake, its
orphans, a test run and commands started by hand.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ham.errors import DeviceError, unknown_choice
from ham.locks import holder, try_lock

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
# Containers expose only the device files of their own GPUs; the driver's /proc folder lists all.
_DEVICE_FOLDER = Path("/dev")
_LEASE_VARIABLE, _SHARED_VARIABLE = "HAM_GPU_LEASE", "HAM_GPU_PROCESSES"
_POLL_SECONDS = 2.0


def resolve_device(name: str) -> torch.device:
    """The torch device for a configured name.

    Args:
        name: `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        ConfigError: If `name` is none of those.
        DeviceError: If `cuda` was asked for and cannot be used; the message says why.
    """
    import torch

    if name not in DEVICES:
        raise unknown_choice("device", name, DEVICES)
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "auto":
        return torch.device("cpu")
    raise DeviceError(f"device 'cuda' was asked for, but {why_no_cuda()}; legal here: auto, cpu")


def why_no_cuda() -> str:
    """The reason why torch cannot use a GPU, in a few words."""
    import torch

    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if not visible_gpus():
        return "this machine shows no NVIDIA GPU"
    return f"torch (CUDA {torch.version.cuda}) cannot use the GPU; check its driver"


def visible_gpus() -> list[str]:
    """Indices or UUIDs of the GPUs that this process may use, without loading torch.

    `CUDA_VISIBLE_DEVICES` decides where it is set, the NVIDIA device files otherwise.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(_DEVICE_FOLDER.glob("nvidia[0-9]*")))
    if not present:
        return []
    if listed is None:
        return [str(index) for index in range(present)]
    return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]


def uses_gpu(name: str) -> bool:
    """Whether a job with this configured device will ask for a GPU; loads no torch."""
    return name == "cuda" or (name == "auto" and bool(visible_gpus()))


@contextlib.contextmanager
def gpu_lease(device: str, processes: int = 1) -> Iterator[str | None]:
    """Hold one GPU, or a share of it, and set `CUDA_VISIBLE_DEVICES` to it.

    Must be entered before CUDA is initialised. Waits, with a message, while all GPUs are taken.
    The lock goes with the process, so a killed job never leaves it behind. Inside a lease, in this
    process or in one that it starts, a second lease is the same one.

    Args:
        device: The configured name; nothing happens for `cpu` or where there is no GPU.
        processes: So many that ask for it may hold the same GPU at a time. A lease of a whole GPU
            excludes them, and waits until all of them have ended.

    Yields:
        The leased GPU's index or UUID, or None.
    """
    gpus = visible_gpus() if uses_gpu(device) else []
    held = os.environ.get(_LEASE_VARIABLE)
    if not gpus or held:
        yield held
        return
    gpu, handles = _wait_for_gpu(gpus, processes)
    values = {"CUDA_VISIBLE_DEVICES": gpu, _LEASE_VARIABLE: gpu, _SHARED_VARIABLE: str(processes)}
    try:
        with _environment(values):
            yield gpu
    finally:
        for handle in handles:
            handle.close()


def processes_on_gpu() -> int:
    """How many processes may use the leased GPU; more than one makes its timings worthless."""
    return int(os.environ.get(_SHARED_VARIABLE) or 1)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_for_gpu(gpus: list[str], processes: int) -> tuple[str, list[IO]]:
    announced = False
    while True:
        for gpu in gpus:
            handles = _try_gpu(gpu, processes)
            if handles is not None:
                return gpu, handles
        if not announced:
            held = ", ".join(f"{gpu}: process {holder(_lock_name(gpu))}" for gpu in gpus)
            print(f"ham: waiting for a GPU ({held})", file=sys.stderr, flush=True)
            announced = True
        time.sleep(_POLL_SECONDS)


def _try_gpu(gpu: str, processes: int) -> list[IO] | None:
    """The locks of a GPU or of one of its shares; None while it is taken."""
    whole = try_lock(_lock_name(gpu), shared=processes > 1)
    if whole is None or processes == 1:
        return None if whole is None else [whole]
    for number in range(processes):
        share = try_lock(f"{_lock_name(gpu)}-share{number}")
        if share is not None:
            return [whole, share]
    whole.close()
    return None


def _lock_name(gpu: str) -> str:
    return f"gpu-{gpu.replace('/', '_')}"
