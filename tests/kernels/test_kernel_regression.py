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
from ham.kernels import regression_workloads
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
from ham.kernels.regression_workloads import (
    CHUNK,
    MODES,
    PROVIDERS,
    SIZES,
    Stopwatch,
    check_case,
    make_control,
    timed_inputs,
)
from ham.kernels.verify import SEED, verify_cases

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DIES_EARLY = """
import os

def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        os._exit(9)
"""


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


def run_suite(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "kernels/benchmarks", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": paths,
    }
    return subprocess.run(
        [*command, "--baselines", str(folder), *options],
        cwd=ROOT,
        env={name: text for name, text in environment.items() if "PYTEST" not in name},
        capture_output=True,
        text=True,
    )


def test_suite_fails_for_the_slower_and_skips_without_a_baseline(tmp_path: Path) -> None:
    size = SIZES["cpu"]["ssd"].name
    stored = Measurement(size, 0.01, 0.009, 0.011, 0.1, 10.0, 30)
    write_baseline(baseline_path(CPU, tmp_path), {"ssd-torch-forward": stored})
    run = run_suite(tmp_path)
    assert run.returncode == 1, run.stdout
    assert "slower  ssd-torch-forward: " in run.stdout
    others = len(SIZES["cpu"]) * len(MODES) - 1
    assert f"1 failed, {others} skipped" in run.stdout
    assert "store one on a quiet machine with `make bench-baseline`" in run.stdout


def test_storing_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """What is stored at this size is skipped, the rest measured and stored before the next."""
    outdated, lacking = (f"gated_sum-torch-{mode}" for mode in MODES)
    path = baseline_path(CPU, tmp_path)
    stored = {
        f"{name}-torch-{mode}": Measurement(case.name, 1.5, 1.0, 2.0, 1.0, 1.0, 30)
        for name, case in SIZES["cpu"].items()
        for mode in MODES
    }
    del stored[lacking]
    write_baseline(path, {**stored, outdated: replace(stored[outdated], size="B1")})
    (tmp_path / "dies_early.py").write_text(DIES_EARLY)
    killed = run_suite(tmp_path, "--store-baseline", "-p", "dies_early")
    assert killed.returncode == 9, killed.stdout
    after = read_baseline(path)
    assert after.pop(outdated).size == stored.pop(outdated).size
    assert after == stored


def test_overwriting_needs_storing(tmp_path: Path) -> None:
    run = run_suite(tmp_path, "--overwrite-baseline")
    assert run.returncode == 4
    assert "--overwrite-baseline needs --store-baseline" in run.stderr


def test_providers_are_checked_on_a_case_like_the_timed_one() -> None:
    for name in SIZES["cuda"]:
        case = check_case(name, "cuda")
        assert case in verify_cases(name) and case.time > CHUNK
        assert case.time < max(each.time for each in verify_cases(name))
    assert check_case("convolved_heads", "cuda").rotated
    assert check_case("ssd", "cpu").time == 512


def test_inputs_for_a_gpu_are_one_sequence_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the right shapes; on the CPU all of them are drawn, as in the stored baselines."""
    meant = torch.device("meta")
    for name in SIZES["cuda"]:
        small = replace(SIZES["cuda"][name], batch=3, time=5, heads=2)
        monkeypatch.setitem(regression_workloads.SIZES, "meta", {name: small})
        monkeypatch.setitem(regression_workloads.DTYPES, "meta", torch.bfloat16)
        made, drawn = timed_inputs(name, meant), small.inputs(torch.bfloat16, meant, 0)
        assert made.keys() == drawn.keys()
        for key, value in drawn.items():
            if isinstance(value, torch.Tensor):
                assert (made[key].shape, made[key].dtype) == (value.shape, value.dtype), key
    case = SIZES["cpu"]["gated_sum"]
    expected = case.inputs(torch.float32, CPU, SEED)
    assert all(torch.equal(timed_inputs("gated_sum", CPU)[key], expected[key]) for key in expected)
