"""Speed regressions: what counts as slower, and what a missing baseline means."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ham.errors import CorruptFileError
from ham.kernels.registry import operations
from ham.kernels.regression import (
    Measurement,
    baseline_name,
    baseline_path,
    judge,
    read_baseline,
    summarise,
    write_baseline,
)
from ham.kernels.regression_workloads import MODES, PROVIDERS, SIZES, Stopwatch, make_control

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def measure(seed: int, *, kernel: float = 10.0, spread: float, drift: float = 1.0) -> Measurement:
    """Thirty rounds of made-up times; `drift` slows the whole machine down towards the end."""
    draw = random.Random(seed)
    slow = [1 + (drift - 1) * i / 29 for i in range(30)]
    times = [[t * s * draw.lognormvariate(0, spread) for s in slow] for t in (kernel, 1.0, 1.0)]
    return summarise("B1", *times)


@pytest.mark.parametrize("spread", [0.001, 0.02, 0.1, 0.25])
def test_twice_as_slow_is_noticed_and_noise_is_not(spread: float) -> None:
    before = measure(0, spread=spread)
    for seed in range(1, 21):
        assert judge(before, measure(seed, spread=spread), 0.1).kind == "same"
        verdict = judge(before, measure(seed, kernel=20.0, spread=spread), 0.1)
        assert verdict.kind == "slower"
        assert "in the baseline (+" in verdict.text
        assert judge(before, measure(seed, kernel=5.0, spread=spread), 0.1).kind == "faster"


def test_a_machine_that_slows_down_is_not_a_slower_kernel() -> None:
    before = measure(0, spread=0.02)
    assert judge(before, measure(1, spread=0.02, drift=2.0), 0.1).kind == "same"


def test_significant_but_small_is_not_slower() -> None:
    before = measure(0, spread=0.001)
    assert judge(before, measure(1, kernel=10.8, spread=0.001), 0.1).kind == "same"
    assert judge(before, measure(1, kernel=11.2, spread=0.001), 0.1).kind == "slower"


def test_large_but_within_noise_is_not_slower() -> None:
    before = Measurement("B1", 10.0, 8.0, 13.0, 10.0, 1.0, 30)
    assert judge(before, replace(before, ratio=12.5, ratio_p20=12.0), 0.1).kind == "same"
    assert judge(before, replace(before, ratio=14.0, ratio_p20=13.1), 0.1).kind == "slower"


def test_ratio_of_hand_worked_rounds() -> None:
    earlier, later = [3.0, 4.0, 4.0, 1.0, 4.0], [5.0, 4.0, 6.0, 3.0, 4.0]
    now = summarise("B1", [8.0, 12.0, 20.0, 10.0, 4.0], earlier, later)
    assert (now.ratio, now.kernel_ms, now.control_ms, now.rounds) == (3.0, 10.0, 4.0, 5)
    with pytest.raises(ValueError, match="1 rounds are too few"):
        summarise("B1", [1.0], [1.0], [1.0])


def test_baselines_are_kept_by_device_and_updated_by_name(tmp_path: Path) -> None:
    path = baseline_path(CPU, tmp_path)
    assert path.stem == baseline_name(CPU)
    assert f"-{torch.get_num_threads()}-threads-torch-" in path.stem
    assert "+" not in path.stem
    assert read_baseline(path) == {}
    one, two = (Measurement("B1", ratio, 1.0, 3.0, 2.0, 1.0, 30) for ratio in (1.5, 2.5))
    write_baseline(path, {"a": one, "b": one})
    write_baseline(path, {"b": two})
    assert read_baseline(path) == {"a": one, "b": two}
    path.write_text('{"format": 0}')
    with pytest.raises(CorruptFileError, match="not a speed baseline"):
        read_baseline(path)


@pytest.mark.parametrize("device", sorted(SIZES))
def test_every_operation_is_timed(device: str) -> None:
    assert set(SIZES[device]) == set(operations())
    for name, operation in operations().items():
        assert set(PROVIDERS[device]) & set(operation.providers), name


def test_stopwatch_keeps_one_time_per_call() -> None:
    watch = Stopwatch(make_control(CPU), CPU)
    watch()
    watch()
    assert len(watch.times_ms) == 2 and min(watch.times_ms) > 0


def test_suite_fails_for_the_slower_and_skips_without_a_baseline(tmp_path: Path) -> None:
    size = SIZES["cpu"]["ssd"].name
    stored = Measurement(size, 0.01, 0.009, 0.011, 0.1, 10.0, 30)
    write_baseline(baseline_path(CPU, tmp_path), {"ssd-torch-forward": stored})
    command = [sys.executable, "-m", "pytest", "kernels/benchmarks", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: text for name, text in environment.items() if "PYTEST" not in name}
    run = subprocess.run(
        [*command, "--baselines", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout
    assert "slower  ssd-torch-forward: " in run.stdout
    others = len(SIZES["cpu"]) * len(MODES) - 1
    assert f"1 failed, {others} skipped" in run.stdout
    assert "store one on a quiet machine with `make bench-baseline`" in run.stdout
