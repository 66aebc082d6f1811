"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ham.errors import CorruptFileError, DiskFullError, MissingDataError
from ham.files import (
    atomic_writer,
    read_json,
    read_jsonl,
    stable_hash,
    write_json,
    write_jsonl,
    write_text,
)


def test_json_lines_round_trip(tmp_path: Path) -> None:
    records = [{"a": 1, "b": "é"}, {"a": None}]
    write_jsonl(tmp_path / "deep" / "x.jsonl", records)
    assert read_jsonl(tmp_path / "deep" / "x.jsonl") == records


def test_a_crash_while_writing_keeps_the_old_file_and_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="crash"), atomic_writer(path) as handle:
        handle.write("half")
        raise RuntimeError("crash")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_reported(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    real_open = os.fdopen

    def full(descriptor: int, *arguments, **options):
        os.close(descriptor)
        return real_open(os.open("/dev/full", os.O_WRONLY), *arguments, **options)

    monkeypatch.setattr("os.fdopen", full)
    with pytest.raises(DiskFullError, match=r"no space left.*x\.txt.*earlier results"):
        write_text(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_rename_is_reported(tmp_path: Path, monkeypatch, number: int) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(DiskFullError):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError):
        write_text(tmp_path / "x", "new")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"nothing\.json"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(CorruptFileError, match=r"x\.jsonl:2"):
        read_jsonl(tmp_path / "x.jsonl")


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {})
    current = os.umask(0)
    os.umask(current)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o666 & ~current


def test_stable_hash_ignores_key_order_and_sees_values() -> None:
    assert stable_hash({"a": 1, "b": 2}) == stable_hash({"b": 2, "a": 1})
    assert stable_hash({"a": 1}) != stable_hash({"a": 1.5})
