"""Has an operation become slower than its stored baseline?

Method. Every round times a control workload, the operation, and the control again, and what is
compared is the ratio of the operation to the mean of the two, so that a slow moment, a lower clock
or a busy neighbour hits both. An operation is slower if its median ratio rose by more than a
practical threshold (10 % on a GPU, 25 % on a CPU) and by more than noise: 80 % of its rounds lie
above 80 % of the rounds of the baseline. Both are needed: quiet machines show differences that do
not matter, noisy ones large ones that mean nothing.

A baseline belongs to a device product and to the Triton (on a CPU: torch and number of threads)
that it was measured with; without one there is nothing to compare.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from ham.errors import CorruptFileError
from ham.files import read_json, write_json
from ham.report.manifest import cpu_model
from ham.report.statistics import p20_p80

FOLDER = Path(__file__).parent / "benchmarks" / "baselines"
THRESHOLDS = {"cuda": 0.10, "cpu": 0.25}
FORMAT = 1
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Measurement:
    """Rounds of one operation beside its control, summarised.

    Attributes:
        size: Name of the problem size; measurements of different sizes are not compared.
        ratio, ratio_p20, ratio_p80: Time of the operation over that of the control: median and
            percentiles over the rounds.
        kernel_ms, control_ms: Medians, to read.
        rounds: Their number.
    """

    size: str
    ratio: float
    ratio_p20: float
    ratio_p80: float
    kernel_ms: float
    control_ms: float
    rounds: int


@dataclass(frozen=True)
class Verdict:
    """What a comparison came to, with a sentence that says why."""

    kind: Literal["slower", "faster", "same"]
    text: str


def summarise(
    size: str,
    kernel_ms: Sequence[float],
    earlier_ms: Sequence[float],
    later_ms: Sequence[float],
) -> Measurement:
    """A measurement from the times of all rounds: operation, control before it, control after it.

    Raises:
        ValueError: If there are too few rounds for an interval.
    """
    control_ms = [(one + two) / 2 for one, two in zip(earlier_ms, later_ms, strict=True)]
    ratios = p20_p80([each / other for each, other in zip(kernel_ms, control_ms, strict=True)])
    if ratios.low is None or ratios.high is None or ratios.n < MIN_ROUNDS:
        raise ValueError(f"{ratios.n} rounds are too few, at least {MIN_ROUNDS} are needed")
    medians = (statistics.median(times) for times in (kernel_ms, control_ms))
    return Measurement(size, ratios.value, ratios.low, ratios.high, *medians, ratios.n)


def judge(before: Measurement, now: Measurement, threshold: float) -> Verdict:
    """Compare with a baseline; `threshold` is the fraction that matters."""
    change = now.ratio / before.ratio - 1
    text = (
        f"{now.ratio:.3g} [{now.ratio_p20:.3g}, {now.ratio_p80:.3g}] times the control, "
        f"{before.ratio:.3g} [{before.ratio_p20:.3g}, {before.ratio_p80:.3g}] in the baseline "
        f"({change:+.0%}; {now.kernel_ms:.3g} ms, {before.kernel_ms:.3g} ms)"
    )
    if change > threshold and now.ratio_p20 > before.ratio_p80:
        return Verdict("slower", text)
    if change < -threshold and now.ratio_p80 < before.ratio_p20:
        return Verdict("faster", text)
    return Verdict("same", text)


def baseline_name(device: torch.device) -> str:
    """Device product and version of what makes its kernels, as a file name without ending."""
    if device.type == "cuda":
        return f"{_slug(torch.cuda.get_device_name(device))}-triton-{_version('triton')}"
    threads = torch.get_num_threads()
    return f"{_slug(cpu_model())}-{threads}-threads-torch-{_version('torch')}"


def baseline_path(device: torch.device, folder: Path = FOLDER) -> Path:
    """Where the baseline of this device lies, or would lie."""
    return folder / f"{baseline_name(device)}.json"


def read_baseline(path: Path) -> dict[str, Measurement]:
    """Measurements by name; empty if nothing is stored.

    Raises:
        CorruptFileError: If the file is not a baseline.
    """
    if not path.exists():
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise CorruptFileError(f"{path} is not a speed baseline of format {FORMAT}")
    return {name: Measurement(**fields) for name, fields in stored["measurements"].items()}


def write_baseline(path: Path, measured: Mapping[str, Measurement]) -> None:
    """Store measurements atomically, beside those stored under other names."""
    together = {**read_baseline(path), **measured}
    measurements = {name: _rounded(each) for name, each in together.items()}
    write_json(path, {"format": FORMAT, "measurements": measurements})


def _rounded(measurement: Measurement) -> dict[str, object]:
    """Four digits: more are noise, and would make every line differ."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in asdict(measurement).items()
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"
