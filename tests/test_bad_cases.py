"""The page of bad cases is what the commands say today."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")

from ham.bad_cases import BadCase, Outcome, bad_cases, page, run_case
from ham.fingerprint import repository_root


def test_the_page_is_what_commands_say() -> None:
    committed = (repository_root() / "docs/bad-cases.md").read_text(encoding="utf-8")
    assert committed == page(), "run `python -m ham.bad_cases docs/bad-cases.md` again"


@pytest.mark.parametrize("case", bad_cases(), ids=lambda case: case.title)
def test_every_case_ends_with_one_line_and_status_2(case: BadCase) -> None:
    here = Path.cwd()
    for outcome in run_case(case):
        assert outcome.status == 2, outcome
        assert outcome.error.startswith("ham: error: ") and "\n" not in outcome.error
        assert str(here) not in outcome.error and "/tmp" not in outcome.error
    assert Path.cwd() == here


def test_nothing_is_wrong_with_the_folder_before_it_is_broken() -> None:
    command = "generate checkpoint --prompt a --tokens 2 --device cpu"
    (outcome,) = run_case(BadCase("", "", lambda folder: None, (command,)))
    assert isinstance(outcome, Outcome) and outcome.status == 0 and outcome.printed[0] == "a"
