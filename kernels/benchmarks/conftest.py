"""Options and bookkeeping of the speed regression suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ham.kernels.regression import (
    FOLDER,
    Measurement,
    Verdict,
    baseline_path,
    read_baseline,
    write_baseline,
)


class Records:
    """Baseline of this device, and what this run measured.

    Attributes:
        store: Whether to store instead of comparing.
        overwrite: Whether to measure again what is stored.
        path: File of the baseline.
        measured: By name of the test.
        verdicts: By name of the test.
    """

    def __init__(self, store: bool, overwrite: bool, folder: Path):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.store = store
        self.overwrite = overwrite
        self.path = baseline_path(self.device, folder)
        self.baseline = read_baseline(self.path)
        self.measured: dict[str, Measurement] = {}
        self.verdicts: dict[str, Verdict] = {}

    def keep(self, test: str, now: Measurement) -> None:
        """Note a measurement, and store it at once: a run that is cut off goes on where it was."""
        self.measured[test] = now
        if self.store:
            write_baseline(self.path, {test: now})


RECORDS = pytest.StashKey[Records]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--store-baseline` stores what the baseline lacks; `--baselines` looks elsewhere."""
    group = parser.getgroup("speed regression")
    group.addoption("--store-baseline", action="store_true", help="store speeds that are lacking")
    group.addoption(
        "--overwrite-baseline", action="store_true", help="and measure again those that are stored"
    )
    group.addoption("--baselines", type=Path, default=FOLDER, help="folder of the baselines")


def pytest_configure(config: pytest.Config) -> None:
    """Read the baseline once."""
    store, overwrite = (config.getoption(f"--{verb}-baseline") for verb in ("store", "overwrite"))
    if overwrite and not store:
        raise pytest.UsageError("--overwrite-baseline needs --store-baseline")
    config.stash[RECORDS] = Records(store, overwrite, config.getoption("--baselines"))


@pytest.fixture
def records(request: pytest.FixtureRequest) -> Records:
    """The session's records."""
    return request.config.stash[RECORDS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """One line per comparison."""
    records = config.stash[RECORDS]
    for name, verdict in records.verdicts.items():
        terminalreporter.write_line(f"{verdict.kind:>6}  {name}: {verdict.text}")
    if any(verdict.kind == "faster" for verdict in records.verdicts.values()):
        terminalreporter.write_line(
            "keep what became faster with `python -m pytest kernels/benchmarks --store-baseline "
            "--overwrite-baseline`"
        )
    if records.store and records.measured:
        terminalreporter.write_line(f"stored {len(records.measured)} speeds in {records.path}")
