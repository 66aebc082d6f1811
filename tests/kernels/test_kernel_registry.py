"""Registry, verification and the command: what is wrong is found, reported and not timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ham.cli import build_parser
from ham.errors import ConfigError, DeviceError
from ham.kernels import bench, verify
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_scored
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase
from ham.kernels.gated_delta_rule.chunked import chunked
from ham.kernels.registry import (
    AUTO,
    REFERENCE,
    Provider,
    anywhere,
    find_operation,
    find_provider,
    limits_of,
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


def run_command(*arguments: str) -> int:
    parsed = build_parser().parse_args(["kernels", *arguments])
    return parsed.handler(parsed)


def test_every_operation_has_a_reference_a_torch_provider_and_cases() -> None:
    assert list(operations()) == [
        "convolved_heads",
        "gated_delta_rule",
        "gated_sum",
        "routed_attention",
        "ssd",
    ]
    for name, operation in operations().items():
        assert {REFERENCE, "torch"} <= set(operation.providers)
        for cases in (verify.verify_cases(name), verify.speed_cases(name)):
            names = [case.name for case in cases]
            assert names and len(set(names)) == len(names)
            assert all(case.cost(torch.float32).flops >= 0 for case in cases)


def test_unknown_operation() -> None:
    with pytest.raises(ConfigError, match=r"'conv'; known: convolved_heads, gated_delta_rule"):
        find_operation("conv")


def test_kinds_of_providers() -> None:
    for operation in operations().values():
        kinds = {provider.name: provider.kind for provider in operation.providers.values()}
        assert kinds[REFERENCE] == "reference"
        assert kinds["torch"] == "own"
    assert kinds_of("gated_delta_rule", "peer") == {"fla", "flash_qla"}
    assert kinds_of("ssd", "peer") == {"fla", "mamba_ssm"}
    assert kinds_of("routed_attention", "peer") == {
        "flex",
        "flex_masked",
        "sdpa_cudnn",
        "sdpa_flash",
    }


def kinds_of(operation: str, kind: str) -> set[str]:
    providers = find_operation(operation).providers.values()
    return {provider.name for provider in providers if provider.kind == kind}


def test_no_peer_runs_on_a_cpu() -> None:
    for operation in operations().values():
        for provider in operation.providers.values():
            assert provider.kind != "peer" or not provider.available(CPU)


def test_automatic_choice(added: dict[str, Provider]) -> None:
    """`triton` where there is a GPU that can run it, as far as the arguments allow it."""
    cuda = torch.device("cuda")
    arguments = {"size": 8}

    def chosen(device: torch.device, arguments: dict[str, Any] | None = None) -> str:
        return find_provider("gated_delta_rule", AUTO, device, arguments).name

    del added["triton"]
    assert chosen(cuda) == "torch"
    limited = Provider(
        "triton",
        chunked,
        lambda device: device.type == "cuda",
        limits=lambda arguments: "too large" if arguments["size"] > 8 else None,
    )
    register_provider("gated_delta_rule", limited)
    assert chosen(CPU, arguments) == "torch"
    assert chosen(cuda) == chosen(cuda, arguments) == "triton"
    assert chosen(cuda, {"size": 9}) == "torch"


def test_automatic_choice_by_the_public_functions() -> None:
    inputs = SMALL.inputs(torch.float32, CPU, 0)
    expected = gated_delta_rule(**inputs, provider="torch")
    assert torch.equal(gated_delta_rule(**inputs, provider=AUTO).o_BTHV, expected.o_BTHV)
    scored = gated_delta_rule_scored(**inputs, provider=AUTO)
    assert torch.equal(scored.o_BTHV, expected.o_BTHV)


def test_limits_from_a_check() -> None:
    def check(size: int) -> None:
        if size > 2:
            raise ConfigError("too large")

    limits = limits_of(check, "size")
    assert limits({"size": 2, "other": 3}) is None
    assert limits({"size": 3}) == "too large"


def test_unknown_provider_names_automatic_choice_and_peers() -> None:
    with pytest.raises(ConfigError, match=r"'x'; known: reference, torch.*, auto, fla, mamba_ssm"):
        find_provider("ssd", "x", CPU)


def test_what_a_provider_cannot_do_is_said(added: dict[str, Provider]) -> None:
    refusing = Provider("picky", chunked, anywhere, limits=lambda arguments: "not today")
    register_provider("gated_delta_rule", refusing)
    operation = find_operation("gated_delta_rule")
    comparison = verify.compare(operation, "picky", SMALL, torch.float32, CPU)
    assert (comparison.refused, comparison.worst, comparison.passed) == ("not today", 0.0, True)


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


def test_relative_norm() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert verify.relative_norm(torch.tensor([3.0, 3.0]), truth) == pytest.approx(0.2)
    assert verify.relative_norm(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0
    assert verify.error_measure(torch.bfloat16) is verify.relative_norm
    assert verify.error_measure(torch.float32) is verify.relative_error


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
    status = run_command("bench", "--device", "cpu", "--rows", str(rows_path))
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
    assert run_command("verify", "--device", "cpu", "--dtype", "float64") == 0
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
    assert run_command("verify", "--device", "cpu", "--dtype", "float64") == 1
    assert "error 1.0e-03, accepted 1e-10" in capsys.readouterr().err


def test_find_provider_returns_what_was_registered() -> None:
    assert find_provider("gated_delta_rule", "torch", CPU).function is chunked
