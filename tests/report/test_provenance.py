"""Which sub-command made a row, and the command that makes it again."""

from __future__ import annotations

import pytest

from ham.report.aggregate import Results
from ham.report.provenance import job_lines, stage_of
from ham.report.rows import Row


def row(experiment: str, metric: str) -> Row:
    return Row(
        experiment=experiment,
        metric=metric,
        value=1.0,
        model="a",
        mixer="m",
        device="CPU",
        seed=0,
        manifest_id="one",
    )


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (["ham", "measure", "c.yaml"], "measure"),
        (["ham", "evaluate", "c.yaml"], "evaluate"),
        (["ham", "batch", "c.yaml"], "evaluate"),
        ([], "evaluate"),
    ],
)
def test_the_recorded_command_says_the_stage(command, stage):
    dial = row("dial", "decode_ms")
    assert stage_of(dial, {"one": {"command": command}}) == stage
    assert stage_of(dial) == "evaluate"


def test_rows_of_one_measurement_are_one_job():
    rows = [row("dial", "decode_ms"), row("throughput", "decode_ms")]
    command = ["ham", "measure", "c.yaml", "--arm", "a"]
    (line,) = job_lines(Results(rows), {"one": {"command": command}}, "c")
    assert (line.stage, line.rows, line.command) == ("measure", 2, "ham measure c.yaml --arm a")
