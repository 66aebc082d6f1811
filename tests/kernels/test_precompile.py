"""Compiling ahead of a speed run: what is compiled, once each, and failures that do not stop it."""

from __future__ import annotations

import subprocess

import pytest

from ham.cli import main
from ham.kernels.speed import precompile
from ham.kernels.speed.problems import choose_problems


def test_every_shape_and_provider_is_compiled_once() -> None:
    shapes = ["B1_T128_H2_D16"]
    problems = choose_problems(["routed_attention"], shapes, quick=False)
    jobs = precompile.jobs_of(problems, ["triton", "sdpa_cudnn"])
    assert [(job[2], job[3]) for job in jobs] == [("0.125", "triton"), ("1.0", "sdpa_cudnn")]


def test_a_process_runs_forward_and_backward() -> None:
    jobs = precompile.jobs_of(choose_problems(["ssd"], ["B1_T8_H2_P16_S16_G1"], False), ["torch"])
    (done,) = precompile.precompile(jobs, "float32", 1)
    assert (done.operation, done.provider, done.error) == ("ssd", "torch", None)


def test_what_a_process_says_last_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: no such tile\n")

    monkeypatch.setattr(subprocess, "run", failed)
    arguments = ["--ops", "ssd", "--shapes", "B1_T8_H2_P16_S16_G1", "--providers", "torch"]
    assert main(["kernels", "precompile", *arguments]) == 0
    assert "ssd B1_T8_H2_P16_S16_G1 torch: ValueError: no such tile" in capsys.readouterr().out


def test_a_refused_problem_says_why() -> None:
    with pytest.raises(SystemExit, match="skipped: not available"):
        precompile.run_once("float32", "ssd", "B1_T8_H2_P16_S16_G1", "", "fla")
