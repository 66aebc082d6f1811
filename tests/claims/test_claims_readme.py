"""The examples of the README on published rows run and compare no two runs."""

from __future__ import annotations

import re
import shlex

import pytest

from ham.cli import main
from ham.fingerprint import repository_root

README = (repository_root() / "README.md").read_text()
EXAMPLES = re.findall(r"^ham (claims results/published/[^#\n]+)", README, flags=re.MULTILINE)


def test_there_is_an_example():
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_gives_verdicts(
    example: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(repository_root())
    assert "*" not in example
    assert main(shlex.split(example)) == 0
    printed = capsys.readouterr().out
    assert "several runs have such rows" not in printed
    assert re.search(r"^P4  SUPPORTED", printed, flags=re.MULTILINE)
