"""Registry, verification and the command: what is wrong is found, reported and not timed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ham.cli import kernels as command
from ham.errors import ConfigError, DeviceError
from ham.kernels import bench, verify
from ham.kernels.gated_delta_rule import gated_delta_rule
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase
from ham.kernels.gated_delta_rule.chunked import chunked
from ham.kernels.registry import (
    REFERENCE,
    Provider,
    anywhere,
    find_operation,
    find_provider,
    operations,
    register_provider,
)
from ham.report.manifest import read_manifest
from ham.report.rows import read_rows

CPU = torch.device("cpu")
SMALL = GatedDeltaRuleCase(1, 20, 2, 8, 8)


@pytest.fixture
def added() -> Iterator[dict[str, Provider]]:
    """Providers of the gated delta rule; those that a test adds are removed afterwards."""
    providers = find_operation("gated_delta_rule").providers
    before = dict(providers)
    yield providers
    providers.clear()
    providers.update(before)


def wrong_gradient(*args: Any, **kwargs: Any) -> Any:
    """Right outputs, but no gradient reaches beta: what a test of outputs alone would miss."""
    return chunked(*args[:4], args[4].detach(), **kwargs)


def test_every_operation_has_a_reference_a_torch_provider_and_cases() -> None:
    assert list(operations()) == ["gated_delta_rule", "routed_attention", "ssd"]
    for name, operation in operations().items():
        assert {REFERENCE, "torch"} <= set(operation.providers)
        for cases in (verify.verify_cases(name), verify.speed_cases(name)):
            names = [case.name for case in cases]
            assert names and len(set(names)) == len(names)
            assert all(case.cost(torch.float32).flops >= 0 for case in cases)


def test_unknown_operation() -> None:
    with pytest.raises(ConfigError, match=r"'conv'; known: gated_delta_rule, routed_attention"):
        find_operation("conv")


def test_provider_that_cannot_run_here(added: dict[str, Provider]) -> None:
    register_provider("gated_delta_rule", Provider("gpu", chunked, lambda device: False))
    with pytest.raises(DeviceError, match=r"'gpu'.*cpu; available there: reference, torch"):
        gated_delta_rule(**SMALL.inputs(torch.float32, CPU, 0), provider="gpu")
    compared = {each.provider for each in verify.verify_all(torch.float64, CPU)}
    assert compared == {"torch"}


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="has a provider 'torch' already"):
        register_provider("ssd", Provider("torch", chunked, anywhere))


def test_reference_inputs_are_equal_on_every_call() -> None:
    first, second = (SMALL.inputs(torch.float32, CPU, seed=1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if name != "chunk_size")


def test_relative_error() -> None:
    truth = torch.tensor([4.0, -2.0])
    assert verify.relative_error(torch.tensor([4.0, -1.0]), truth) == 0.25
    assert verify.relative_error(torch.tensor([0.5, 0.0]), torch.zeros(2)) == 0.5


def test_not_a_number_never_passes() -> None:
    comparison = verify.Comparison("x", "y", "z", torch.float32, {"o": float("nan")}, 1.0)
    assert not comparison.passed


def test_wrong_gradient_is_found(added: dict[str, Provider]) -> None:
    register_provider("gated_delta_rule", Provider("broken", wrong_gradient, anywhere))
    result = verify.compare(find_operation("gated_delta_rule"), "broken", SMALL, torch.float32, CPU)
    assert not result.passed
    assert result.errors["o"] < 1e-6
    assert result.errors["d beta"] == 1.0


def test_wrong_provider_is_reported_and_not_timed(
    added: dict[str, Provider],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    register_provider("gated_delta_rule", Provider("broken", wrong_gradient, anywhere))
    operation = find_operation("gated_delta_rule")
    monkeypatch.setattr(bench, "all_cases", lambda: [(operation, SMALL)])
    rows_path = tmp_path / "kernels.rows.jsonl"
    status = command.bench(argparse.Namespace(device="cpu", rows=rows_path))
    assert status == 1

    rows = read_rows(rows_path)
    assert {(row.provider, row.metric) for row in rows} == {
        (provider, metric)
        for provider in ("reference", "torch", "broken")
        for metric in ("forward_ms", "forward_backward_ms")
    }
    for row in rows:
        assert row.experiment == "kernel_speed"
        assert (row.task, row.x_name, row.x_value) == (SMALL.name, "context", 20.0)
        if row.provider == "broken":
            assert row.value is None and "error 1.0e+00, accepted 1e-05" in row.error
        else:
            assert 0 < row.low <= row.value <= row.high
            assert row.n >= bench.MIN_ROUNDS and row.interval == "p20_p80"
            assert row.labels["max_relative_error"] < 1e-5
    manifest = read_manifest(tmp_path / "kernels.manifest.json")
    assert {row.manifest_id for row in rows} == {manifest["manifest_id"]}

    printed = capsys.readouterr()
    assert "wrong: 1.0e+00" in printed.out
    assert "gated_delta_rule by broken is wrong on" in printed.err


def test_verify_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {name: verify.verify_cases(name)[1:2] for name in operations()}
    monkeypatch.setattr(verify, "verify_cases", cases.__getitem__)
    assert command.verify(argparse.Namespace(dtype="float64")) == 0
    printed = capsys.readouterr().out
    for name in operations():
        assert f"\n{name}, float64" in printed
        assert f"| {name} | torch |" in printed
    for tensor in ("o", "prediction", "d log_decay", "d initial_state", "d dt", "y"):
        assert f" {tensor} |" in printed


def test_verify_command_fails_with_a_wrong_provider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = verify.compare(find_operation("gated_delta_rule"), "torch", SMALL, torch.float64, CPU)
    bad = replace(good, errors={**good.errors, "d k": 1e-3})
    monkeypatch.setattr(verify, "verify_all", lambda dtype, device: iter([good, bad]))
    assert command.verify(argparse.Namespace(dtype="float64")) == 1
    assert "error 1.0e-03, accepted 1e-10" in capsys.readouterr().err


def test_find_provider_returns_what_was_registered() -> None:
    assert find_provider("gated_delta_rule", "torch", CPU).function is chunked
