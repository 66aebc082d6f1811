"""Which sub-command made a row, and the command that makes it again."""

from __future__ import annotations

import pytest

from ham.report.aggregate import Results
from ham.report.provenance import gather, job_lines, stage_of
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


def test_what_jobs_found_of_a_gpu_is_one_line_with_its_span():
    gpu = {"name": "G", "driver": "1", "power_limit_watts": 700.0, "sm_clock_mhz": 345}
    manifests = [
        {"manifest_id": str(heat), "gpus": [{**gpu, "temperature_celsius": heat}]}
        for heat in (60, 35, 71)
    ]
    facts = dict(gather(Results([]), [*manifests, {"gpus": [{**gpu, "driver": "2"}]}], "c").facts)
    assert facts["GPU"] == [
        "G, driver 1, power limit 700 W, 345 MHz at start, 35 to 71 °C at start",
        "G, driver 2, power limit 700 W, 345 MHz at start",
    ]
