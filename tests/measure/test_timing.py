"""The stopwatch and the memory counter."""

from __future__ import annotations

import time

import pytest
import torch

from ham.measure.timing import Timing, peak_extra_bytes, time_calls

CPU = torch.device("cpu")


def test_percentiles_by_hand() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert timing.median_ms == 3.5
    assert timing.interval() == {"n": 6, "low": 2.0, "high": 5.0, "interval": "p20_p80"}


def test_one_sample_has_no_interval() -> None:
    assert Timing((5.0,)).interval() == {"n": 1}


def test_warmup_is_called_and_not_counted() -> None:
    calls = []

    def work() -> None:
        calls.append(len(calls))
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    timing = time_calls(work, CPU, warmup=1, repeats=3)
    assert len(calls) == 4
    assert len(timing.samples_ms) == 3
    assert max(timing.samples_ms) < 40


def test_peak_counts_what_is_held_at_once() -> None:
    mib = 1 << 20

    def one_after_the_other() -> None:
        for _ in range(4):
            torch.zeros(mib, dtype=torch.uint8)

    def all_together() -> None:
        kept = [torch.zeros(mib, dtype=torch.uint8) for _ in range(4)]
        del kept

    assert peak_extra_bytes(one_after_the_other, CPU) == pytest.approx(mib, rel=0.01)
    assert peak_extra_bytes(all_together, CPU) == pytest.approx(4 * mib, rel=0.01)
