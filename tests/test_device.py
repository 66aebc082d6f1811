from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ham import device
from ham.device import gpu_lease, processes_on_gpu, resolve_device, uses_gpu, visible_gpus
from ham.errors import ConfigError, DeviceError

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the absence of a GPU")


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs as far as device files tell, and lock files of its own."""
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (folder / name).touch()
    monkeypatch.setattr(device, "_DEVICE_FOLDER", folder)
    monkeypatch.setattr(device, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("HAM_LOCK_FOLDER", str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HAM_GPU_LEASE", raising=False)


def test_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")


@NO_CUDA
def test_auto_falls_back_to_the_cpu():
    assert resolve_device("auto") == torch.device("cpu")


@NO_CUDA
def test_cuda_where_there_is_none():
    with pytest.raises(DeviceError, match=r"'cuda' was asked for, but .*; legal here: auto, cpu"):
        resolve_device("cuda")


def test_unknown_device():
    with pytest.raises(ConfigError, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        resolve_device("tpu")


def test_visible_gpus(two_gpus: None, monkeypatch: pytest.MonkeyPatch):
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus() == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert not uses_gpu("auto")
    assert uses_gpu("cuda")


def test_no_lease_on_a_cpu(two_gpus: None):
    with gpu_lease("cpu") as gpu:
        assert gpu is None
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def in_another_process(code: str) -> subprocess.Popen[str]:
    """A job of another process on the same two GPUs."""
    head = (
        "import os, sys, time; from pathlib import Path; from ham import device;"
        f"device._DEVICE_FOLDER = Path({str(device._DEVICE_FOLDER)!r});"
        "device._POLL_SECONDS = 0.02\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in HELD}
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


HELD = ("HAM_GPU_LEASE", "HAM_GPU_PROCESSES", "CUDA_VISIBLE_DEVICES")
LEASE = "with device.gpu_lease('cuda') as gpu: print(gpu, os.environ['CUDA_VISIBLE_DEVICES'])"


def test_each_process_gets_a_gpu_of_its_own(two_gpus: None):
    with gpu_lease("cuda") as gpu:
        assert gpu == os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        other = in_another_process(LEASE)
        assert other.communicate(timeout=30)[0].split() == ["1", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_lease_inside_a_lease_is_the_same(two_gpus: None):
    with gpu_lease("cuda") as outer, gpu_lease("cuda") as inner:
        assert inner == outer


def test_processes_share_a_gpu_up_to_their_number(two_gpus: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert processes_on_gpu() == 1
    share = "with device.gpu_lease('cuda', 2): print('held', flush=True); sys.stdin.read(1)"
    alone = "with device.gpu_lease('cuda'): print('held', flush=True)"
    with gpu_lease("cuda", 2) as gpu:
        assert gpu == "0" and processes_on_gpu() == 2
        second = in_another_process(f"os.environ['CUDA_VISIBLE_DEVICES'] = '0'\n{share}")
        assert second.stdout.readline() == "held\n"
        # Neither a third share nor the whole GPU is to be had.
        assert device._try_gpu("0", 2) is None and device._try_gpu("0", 1) is None
        whole = in_another_process(f"os.environ['CUDA_VISIBLE_DEVICES'] = '0'\n{alone}")
        second.communicate("x", timeout=30)
    assert whole.communicate(timeout=30)[0] == "held\n"


def test_waits_with_a_message_until_a_gpu_is_free(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    holder = in_another_process(
        "os.environ['CUDA_VISIBLE_DEVICES'] = '0'\n"
        "with device.gpu_lease('cuda'): print('held', flush=True); time.sleep(0.5)"
    )
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    with gpu_lease("cuda") as gpu:
        waited = time.monotonic() - started
    holder.communicate(timeout=30)
    assert gpu == "0"
    assert waited > 0.2
    assert f"waiting for a GPU (0: process {holder.pid})" in capfd.readouterr().err


def test_a_killed_process_leaves_no_lock(two_gpus: None):
    holder = in_another_process(
        "with device.gpu_lease('cuda'): print('held', flush=True); time.sleep(60)"
    )
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate(timeout=30)
    done = threading.Event()

    def lease() -> None:
        with gpu_lease("cuda") as gpu:
            assert gpu == "0"
            done.set()

    thread = threading.Thread(target=lease, daemon=True)
    thread.start()
    assert done.wait(10)
    thread.join()
