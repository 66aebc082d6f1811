"""Generators of needles, recall documents and associative recall keep their speed."""

from __future__ import annotations

import pytest
import torch

from ham.cli import main
from ham.fingerprint import repository_root
from ham.measure.samples import Haystack, mqar_speeds, needle_speeds, recall_speeds
from ham.ruler.tasks import TASKS
from ham.study.config import load_mqar_config

FLOOR = 33_000
"""A third of the goal of 100,000 samples of 1K tokens a minute, so that a busy core passes."""


@pytest.mark.parametrize("speeds", [needle_speeds, recall_speeds])
def test_needles_and_recall_documents_of_a_thousand_tokens(speeds):
    lines = list(speeds(Haystack.open(None), 1024, samples=60))
    named = [*TASKS] if speeds is needle_speeds else ["recall, 126 pairs", "training rows"]
    assert [line.task for line in lines] == named
    assert all(1000 < line.tokens <= 1024 or line.task == "vt" for line in lines)
    assert min(line.per_minute for line in lines) > FLOOR, [str(line) for line in lines]


def test_associative_recall_of_a_thousand_tokens():
    config = load_mqar_config(repository_root() / "workflow/config/mqar.yaml")
    threads = torch.get_num_threads()
    lines = list(mqar_speeds(config))
    assert torch.get_num_threads() == threads
    assert [line.task for line in lines[:2]] == ["blank, 256 pairs", "random, 256 pairs"]
    assert len(lines) == len(config.tasks) and {line.tokens for line in lines} == {1024}
    assert min(line.per_minute for line in lines) > FLOOR, [str(line) for line in lines]


def test_speed_commands_print_a_line_a_task(capsys: pytest.CaptureFixture, tmp_path):
    assert main(["needle", "bench", "--data", str(tmp_path)]) == 2
    assert "data.json does not exist" in capsys.readouterr().err
    assert main(["mqar", "bench", str(repository_root() / "workflow/config/mqar.yaml")]) == 0
    assert capsys.readouterr().out.count("samples a minute\n") == 6
