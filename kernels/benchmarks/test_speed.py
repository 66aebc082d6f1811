"""Every operation by every provider of this project, against the stored baseline of this device.

Each round times the control, the operation and the control again (`ham.kernels.regression` says
why). Sessions with xdist time nothing: pytest-benchmark switches itself off there. A provider is
compared with the reference before it is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ham.kernels.registry import find_operation
from ham.kernels.regression import THRESHOLDS, judge, summarise
from ham.kernels.regression_workloads import (
    MODES,
    PROVIDERS,
    SIZES,
    Stopwatch,
    checked,
    make_call,
    make_control,
)

ROUNDS = 30
WARM_UP = 3
DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [(name, provider) for name in SIZES[DEVICE_TYPE] for provider in PROVIDERS[DEVICE_TYPE]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "provider"), NAMES)
def test_speed(name: str, provider: str, mode: str, benchmark: Any, records: Any) -> None:
    """Fails if an operation is slower than its baseline, skips if there is none."""
    operation, device = find_operation(name), records.device
    size = SIZES[device.type][name].name
    test = f"{name}-{provider}-{mode}"
    if provider not in operation.providers or not operation.providers[provider].available(device):
        pytest.skip(f"{name} has no provider {provider!r} on {device.type}")
    before = records.baseline.get(test)
    known = before is not None and before.size == size
    if records.store and known and not records.overwrite:
        pytest.skip(f"{records.path.name} has {test}; --overwrite-baseline measures it again")
    if not records.store and not known:
        pytest.skip(
            f"no baseline for this device: {records.path.name} lacks {test} at {size}; "
            "store one on a quiet machine with `make bench-baseline`"
        )
    check = checked(name, provider, device)
    assert check.refused is None, f"not compared, so not timed: {check.refused}"
    assert check.passed, f"wrong, so not timed: error {check.worst:.1e} on {check.case}"

    control = make_control(device)
    earlier, later = Stopwatch(control, device), Stopwatch(control, device)
    kernel = Stopwatch(make_call(operation, provider, mode, device), device)
    benchmark.pedantic(
        kernel, setup=earlier, teardown=later, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1
    )
    rounds = [watch.times_ms[-ROUNDS:] for watch in (kernel, earlier, later)]
    now = summarise(size, *rounds)
    records.keep(test, now)
    benchmark.extra_info.update(ratio=now.ratio, control_ms=now.control_ms)
    if records.store:
        return
    verdict = judge(before, now, THRESHOLDS[device.type])
    records.verdicts[test] = verdict
    assert verdict.kind != "slower", verdict.text
