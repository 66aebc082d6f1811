from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from ham.report import manifest as m


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "a.py").write_text("x = 1\n")
    for command in (
        ["init", "-q"],
        ["add", "a.py"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def test_manifest_has_every_field_and_is_quick():
    started = time.perf_counter()
    manifest = m.collect_manifest(
        {"name": "demo", "device": "cpu"}, ["ham", "train"], [0], {"k": 1}
    )
    elapsed = time.perf_counter() - started
    assert manifest["config"] == {"name": "demo", "device": "cpu"}
    assert manifest["seeds"] == [0]
    assert manifest["extra"] == {"k": 1}
    assert manifest["threads"] >= 1
    assert manifest["cpu"] and manifest["device"] == manifest["cpu"]
    assert set(m.PACKAGES) | {"python"} == set(manifest["versions"])
    assert manifest["versions"]["numpy"][0].isdigit()
    assert len(manifest["manifest_id"]) == 12
    json.dumps(manifest)
    assert elapsed < 0.3


def test_collecting_loads_no_torch():
    code = (
        "import sys; from ham.report.manifest import collect_manifest; collect_manifest({}, []);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_host_name_is_not_recorded(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "very-secret-host")
    monkeypatch.setattr("platform.node", lambda: "very-secret-host")
    assert "very-secret-host" not in json.dumps(m.collect_manifest({}, []))


def test_id_ignores_time_and_temperature_only():
    manifest = m.collect_manifest({"name": "demo"}, ["ham"])
    gpu = {"name": "X", "driver": "1", "sm_clock_mhz": 1000.0, "temperature_celsius": 40.0}
    manifest["gpus"] = [gpu]
    before = m.manifest_id(manifest)
    later = {**manifest, "started": "later", "wall_seconds": 9.0}
    later["gpus"] = [{**gpu, "sm_clock_mhz": 900.0, "temperature_celsius": 70.0}]
    assert m.manifest_id(later) == before
    assert m.manifest_id({**manifest, "seeds": [1]}) != before
    assert m.manifest_id({**manifest, "gpus": [{**gpu, "driver": "2"}]}) != before


def test_clean_checkout(repository):
    state = m.code_state(repository)
    assert len(state["commit"]) == 40
    assert (state["dirty"], state["dirty_hash"]) == (False, None)


def test_changed_and_new_files_make_a_checkout_dirty(repository):
    (repository / "a.py").write_text("x = 2\n")
    changed = m.code_state(repository)
    (repository / "b.py").write_text("y = 1\n")
    added = m.code_state(repository)
    (repository / "b.py").write_text("y = 2\n")
    edited = m.code_state(repository)
    assert changed["dirty"] and added["dirty"]
    assert len({changed["dirty_hash"], added["dirty_hash"], edited["dirty_hash"]}) == 3


def test_folder_inside_a_foreign_checkout_is_not_that_checkout(repository, monkeypatch):
    monkeypatch.delenv(m.COMMIT_FILE_VARIABLE, raising=False)
    inside = repository / "site-packages"
    inside.mkdir()
    assert m.code_state(inside)["commit"] == "unknown"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("abc123\n", ("abc123", False, None)),
        ("abc123\nfeed\n", ("abc123", True, "feed")),
        ("", ("unknown", None, None)),
    ],
)
def test_commit_file(tmp_path, monkeypatch, content, expected):
    (tmp_path / "commit").write_text(content)
    monkeypatch.setenv(m.COMMIT_FILE_VARIABLE, str(tmp_path / "commit"))
    state = m.code_state(tmp_path)
    assert (state["commit"], state["dirty"], state["dirty_hash"]) == expected


def test_missing_git_is_tolerated(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(m.COMMIT_FILE_VARIABLE, raising=False)
    assert m.code_state()["commit"] == "unknown"


def test_gpu_answer_is_parsed_and_gaps_are_tolerated():
    line = "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 700.00, 1980, 2619, [N/A], 121.5\n"
    (gpu,) = m.parse_gpu_query(line + "garbage\n")
    assert gpu["name"] == "NVIDIA H100 80GB HBM3"
    assert gpu["driver"] == "550.54.15"
    assert gpu["sm_clock_mhz"] == 1980.0
    assert gpu["temperature_celsius"] is None


def test_broken_nvidia_smi_is_tolerated(tmp_path, monkeypatch):
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\nexit 9\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert m.query_gpus() == []


def test_device_name_follows_the_configuration():
    gpus = [{"name": "NVIDIA H100"}]
    assert m.device_name("cuda", gpus) == "NVIDIA H100"
    assert m.device_name("auto", gpus) == "NVIDIA H100"
    assert m.device_name("cpu", gpus) == m.cpu_model()
    assert m.device_name("auto", []) == m.cpu_model()


def test_command_carries_no_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["/opt/venv/bin/ham", "train", f"{tmp_path}/workflow/demo.yaml", "--seed", "0"]
    expected = ["ham", "train", "workflow/demo.yaml", "--seed", "0"]
    assert m.portable_command(command) == expected
    assert m.portable_command(["/opt/ham/__main__.py", *command[1:]]) == expected


def test_write_and_read(tmp_path):
    manifest = m.collect_manifest({"name": "demo"}, ["ham"])
    path = m.manifest_path(tmp_path / "train.rows.jsonl")
    m.write_manifest(path, manifest, wall_seconds=1.23456)
    assert path.name == "train.manifest.json"
    assert m.read_manifest(path) == {**manifest, "wall_seconds": 1.235}
    assert m.read_manifest(path)["manifest_id"] == m.manifest_id(m.read_manifest(path))
