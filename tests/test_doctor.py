from __future__ import annotations

from pathlib import Path

import pytest

from ham import doctor
from ham.cli import main
from ham.doctor import ABILITIES, Check, abilities, examine, format_report


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return examine()


def test_every_need_is_a_check(checks: list[Check]):
    names = {check.name for check in checks}
    assert {need for _, needs in ABILITIES.values() for need in needs} <= names
    assert all(check.detail for check in checks)


def test_says_what_cannot_run_and_why():
    checks = [Check("cuda", False, "this torch is a CPU build"), Check("triton", True, "3.6.0")]
    report = format_report(checks)
    assert "cannot run  Triton kernels on a GPU: cuda missing" in report
    assert "can run     Triton kernels in its interpreter" in report
    assert "no  cuda    this torch is a CPU build" in report


def test_a_broken_corpus_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from ham.errors import CorruptFileError

    def broken() -> dict:
        raise CorruptFileError("corpus.xz is truncated")

    monkeypatch.setattr("ham.train.corpus.verify_corpus", broken)
    checks = examine()
    corpus = next(check for check in checks if check.name == "corpus")
    assert corpus == Check("corpus", False, "corpus.xz is truncated")
    demo = next(one for one in abilities(checks) if one.name == "demo")
    assert "corpus" in demo.missing


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    wanted = ["numpy<1", "surely-not-installed>=1", "ignored>=1; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    good, detail = doctor._packages()
    assert not good
    assert "numpy" in detail
    assert "surely-not-installed is missing" in detail
    assert "ignored" not in detail


def test_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert main(["doctor"]) == 0
    assert "can run     the demo" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "DEMO_MEMORY_BYTES", 1 << 60)
    assert main(["doctor"]) == 1
    assert "cannot run  the demo: `make reproduce`: memory missing" in capsys.readouterr().out
