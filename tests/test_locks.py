from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ham.errors import HamError
from ham.locks import holder, sole_writer, try_lock


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAM_LOCK_FOLDER", str(tmp_path / "locks"))


def start(code: str) -> subprocess.Popen[str]:
    """A process that has printed `ready`."""
    head = "import signal, sys, time; from pathlib import Path; from ham.locks import sole_writer\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def hold(output: Path, before: str = "") -> subprocess.Popen[str]:
    return start(
        f"{before}\nwith sole_writer(Path({str(output)!r})):\n"
        "    print('ready', flush=True); time.sleep(60)"
    )


def test_a_lock_excludes_and_names_its_holder():
    with try_lock("x"):
        assert try_lock("x") is None
        assert holder("x") is not None
        other = try_lock("y")
        assert other is not None
        other.close()
    again = try_lock("x")
    assert again is not None
    again.close()


def test_an_orphan_is_asked_to_stop(tmp_path: Path, capfd: pytest.CaptureFixture):
    saved = tmp_path / "saved"
    orphan = hold(
        tmp_path / "out",
        f"signal.signal(signal.SIGTERM, lambda *_: (Path({str(saved)!r}).touch(), sys.exit(143)))",
    )
    with sole_writer(tmp_path / "out"):
        assert saved.exists()
        assert orphan.wait(10) == 143
    assert f"process {orphan.pid} of an earlier run still makes" in capfd.readouterr().err


def test_other_outputs_are_left_alone(tmp_path: Path):
    other = hold(tmp_path / "other")
    with sole_writer(tmp_path / "out"):
        assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_that_does_not_stop_is_named(tmp_path: Path):
    stubborn = hold(tmp_path / "out", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    started = time.monotonic()
    with (
        pytest.raises(HamError, match=f"process {stubborn.pid} still makes .*out"),
        sole_writer(tmp_path / "out", patience_seconds=0.5),
    ):
        pytest.fail("two writers of one output")
    assert time.monotonic() - started < 10
    stubborn.kill()
    stubborn.wait()


def test_a_killed_process_leaves_nothing_to_wait_for(tmp_path: Path):
    killed = hold(tmp_path / "out")
    killed.kill()
    killed.wait()
    with sole_writer(tmp_path / "out", patience_seconds=1):
        pass
