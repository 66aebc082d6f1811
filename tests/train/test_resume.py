"""A run that is killed and repeated ends with the same weights as one left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ham.config_files import load_config
from ham.files import read_json, sha256_file
from ham.report.rows import read_rows

STEPS = 24


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny configuration and its prepared data."""
    from ham.train.prepare import prepare_data

    folder = tmp_path_factory.mktemp("experiment")
    values = {
        "name": "tiny",
        "device": "cpu",
        "data": {"context": 64, "recall_fraction": 0.25},
        "model": {"layers": 2, "width": 32, "heads": 2, "max_positions": 2048},
        "arms": [
            {"name": "ham", "mixer": "ham", "options": {"score": "committed"}},
            {"name": "mamba2", "mixer": "mamba2", "options": {"state_size": 16, "head_dim": 16}},
            {"name": "ham@flops", "mixer": "ham", "options": {"score": "committed"}, "steps": 3},
        ],
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "accumulate": 2,
            "checkpoint_seconds": 0.05,
            "validation_every": 10,
            "validation_batches": 1,
            "calibration_batches": 4,
            "log_every": 5,
        },
        "measure": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    prepare_data(load_config(folder / "config.yaml").data, folder / "data")
    return folder


def command(folder: Path, out: str, arm: str = "ham") -> list[str]:
    paths = {"--data": "data", "--out": out, "--state": f"{out}-state"}
    flags = [part for key, name in paths.items() for part in (key, str(folder / name))]
    base = [sys.executable, "-m", "ham", "train", str(folder / "config.yaml")]
    return [*base, "--arm", arm, "--seed", "0", *flags]


def finish(folder: Path, out: str, arm: str = "ham") -> str:
    """Run to the end; returns the checksum of the weights."""
    done = subprocess.run(command(folder, out, arm), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return sha256_file(folder / out / "checkpoint" / "model.safetensors")


def stop_after_first_state(folder: Path, out: str, number: int) -> subprocess.CompletedProcess:
    """Start training and send a signal once a state has been saved."""
    process = subprocess.Popen(command(folder, out), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((folder / f"{out}-state").glob("*/state.pt")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, "", errors)


@pytest.fixture(scope="module")
def undisturbed(experiment: Path) -> str:
    return finish(experiment, "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_stopped_and_repeated_training_is_bit_identical(
    experiment: Path, undisturbed: str, number: int
) -> None:
    out = f"stopped-{int(number)}"
    stopped = stop_after_first_state(experiment, out, number)
    assert stopped.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not (experiment / out / "checkpoint").exists()
    assert finish(experiment, out) == undisturbed
    first, second = (
        [
            (row.metric, row.task, row.x_value, row.labels, row.value)
            for row in read_rows(experiment / name / "train.rows.jsonl")
            if row.x_name == "step"
        ]
        for name in ("undisturbed", out)
    )
    assert first == second


def test_a_finished_run_leaves_rows_manifest_and_no_state(
    experiment: Path, undisturbed: str
) -> None:
    out = experiment / "undisturbed"
    rows = read_rows(out / "train.rows.jsonl")
    manifest = read_json(out / "train.manifest.json")
    assert {row.manifest_id for row in rows} == {manifest["manifest_id"]}
    assert not list((experiment / "undisturbed-state").glob("*"))
    assert read_json(out / "checkpoint" / "model.json")["facts"]["steps"] == STEPS
    losses = [row.value for row in rows if row.metric == "loss_nats" and row.task == "validation"]
    assert losses[-1] < losses[0]
    fractions = [row for row in rows if row.metric == "kv_fraction"]
    assert {row.labels["layer"] for row in fractions} == {0, 1}


def test_an_arm_may_have_steps_of_its_own(experiment: Path) -> None:
    from ham.cli import main

    assert main(command(experiment, "short", "ham@flops")[3:]) == 0
    facts = read_json(experiment / "short" / "checkpoint" / "model.json")["facts"]
    assert (facts["steps"], facts["tokens"]) == (3, 3 * 4 * 64)
    rows = read_rows(experiment / "short" / "train.rows.jsonl")
    assert {row.model for row in rows} == {"ham@flops"}
    assert max(row.x_value for row in rows if row.x_name == "step") == 3


def test_a_damaged_state_is_one_clear_message(experiment: Path) -> None:
    stop_after_first_state(experiment, "damaged", signal.SIGKILL)
    (state,) = (experiment / "damaged-state").glob("*/state.pt")
    state.write_bytes(state.read_bytes()[:-100])
    done = subprocess.run(command(experiment, "damaged"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "state.pt is truncated or changed; delete it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (experiment / "damaged" / "checkpoint").exists()


def test_a_full_disk_stops_with_a_message_and_keeps_the_last_state(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import errno

    from ham.cli import main

    stop_after_first_state(experiment, "full", signal.SIGKILL)
    (state,) = (experiment / "full-state").glob("*/state.pt")
    before = sha256_file(state)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ham.files.os.fsync", no_space)
    assert main(command(experiment, "full")[3:]) == 2
    assert "no space left on the disk while writing" in capsys.readouterr().err
    assert sha256_file(state) == before
    assert not (experiment / "full" / "checkpoint" / "model.json").exists()
