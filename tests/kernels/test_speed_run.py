"""The speed run on a CPU with tiny problems: comparing, timing, failing, going on later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ham.cli import _kernels_speed, build_parser
from ham.errors import ConfigError, DeviceError
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput
from ham.kernels.gated_delta_rule.chunked import chunked
from ham.kernels.registry import Provider, anywhere, find_operation, register_provider
from ham.kernels.speed import run as run_module
from ham.kernels.speed.ceilings import Ceilings
from ham.kernels.speed.checks import Check, decisions_flipped, describe
from ham.kernels.speed.clock import (
    GpuLostError,
)
from ham.kernels.speed.problems import AttentionProblem, RoutingProblem, RuleProblem, SsdProblem
from ham.kernels.speed.record import kernel_modules, switches
from ham.kernels.speed.run import Bench
from ham.kernels.speed.store import SpeedStore, key_of
from ham.kernels.speed.tiles import recorded_tiles
from ham.report.manifest import read_manifest
from ham.report.rows import Row, read_rows

CPU = torch.device("cpu")
RATES = Ceilings(copy_bytes=1e11, matmul_flops=1e12)
RULE = RuleProblem("B1_T20_H2_D8")
COMMON = {"device": "CPU", "code_fingerprint": "code", "manifest_id": "manifest"}
ROUNDS = {"min_rounds": 2, "max_rounds": 2, "budget_ms": 1.0}


@pytest.fixture
def rule() -> Iterator[dict[str, Provider]]:
    """Only `torch` and what a test adds; the others are back afterwards."""
    providers = find_operation("gated_delta_rule").providers
    before = dict(providers)
    providers.clear()
    providers.update({name: before[name] for name in ("reference", "torch")})
    yield providers
    providers.clear()
    providers.update(before)


def make_bench(store: SpeedStore, dtype: torch.dtype = torch.float32, **changes: Any) -> Bench:
    return Bench(CPU, dtype, store, rounds=ROUNDS, **changes)


def run_rule(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[tuple[str, str], Row]:
    store = SpeedStore(None, COMMON)
    make_bench(store, dtype, **changes).run(RULE, RATES)
    return {(row.provider, row.metric): row for row in store.all_rows()}


def peer(name: str, function: Any, **changes: Any) -> None:
    register_provider("gated_delta_rule", Provider(name, function, anywhere, "peer", **changes))


def without_prediction(*args: Any, **kwargs: Any) -> GatedDeltaRuleOutput:
    return chunked(*args, **kwargs)._replace(prediction_BTHV=None)


def wrong_gradient(*args: Any, **kwargs: Any) -> GatedDeltaRuleOutput:
    return without_prediction(*args[:4], args[4].detach(), **kwargs)


def wrong_output(*args: Any, **kwargs: Any) -> GatedDeltaRuleOutput:
    output = without_prediction(*args, **kwargs)
    return output._replace(o_BTHV=output.o_BTHV * 1.01)


class Guard:
    """A peer that refuses its backward unless its guard is off."""

    def __init__(self) -> None:
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> GatedDeltaRuleOutput:
        output = without_prediction(*args, **kwargs)
        if output.o_BTHV.requires_grad:
            output.o_BTHV.register_hook(self.check)
        return output

    def check(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.on:
            raise RuntimeError("wrong on this compiler")
        return gradient

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


def test_a_right_provider_is_compared_and_timed(rule: dict[str, Provider]) -> None:
    rows = run_rule()
    assert {metric for _, metric in rows} == {
        "forward_ms",
        "forward_saving_ms",
        "forward_backward_ms",
        "max_relative_error",
    }
    row = rows["torch", "forward_backward_ms"]
    assert row.correct is True and 0 < row.low <= row.value <= row.high
    assert (row.experiment, row.task, row.x_value, row.n) == ("kernel_speed", RULE.shape, 20, 2)
    assert row.labels["score"] == "cosine" and row.labels["compared_shape"] == RULE.shape
    assert row.labels["floor_ms"] > 0 and row.labels["max_relative_error"] < 1e-5
    assert rows["torch", "max_relative_error"].labels["error d beta"] < 1e-5


def test_scores_in_bfloat16_are_held_against_their_own_limits(rule: dict[str, Provider]) -> None:
    rows = run_rule(torch.bfloat16)
    assert rows["torch", "score_mean_absolute_error"].value < 0.005
    assert rows["torch", "decisions_flipped"].value <= 0.01
    bad = Check(1e-2, {"o": 0.0}, {}, score_error=0.006, decisions_flipped=0.02)
    assert len(bad.faults()) == 2
    assert not Check(1e-2, {"o": 0.0}, {}, 0.005, 0.01).faults()


def test_decisions_flipped() -> None:
    """Eight tokens, two of them routed at a quarter; one score sinks below the threshold."""
    truth = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 2)
    assert decisions_flipped(truth, truth) == 0.0
    score = truth.clone()
    score[0, 7, 1] = 0.0
    assert decisions_flipped(score, truth) == 1 / 8


@pytest.mark.parametrize("function", [wrong_gradient, wrong_output])
def test_a_wrong_peer_is_not_timed(rule: dict[str, Provider], function: Any) -> None:
    peer("other", function)
    rows = run_rule()
    for mode in ("forward", "forward_saving", "forward_backward"):
        row = rows["other", f"{mode}_ms"]
        assert row.value is None and row.correct is False
        assert row.error.startswith("wrong result: ") and "accepted 1e-05" in row.error


def test_a_wrong_peer_is_timed_on_request_and_marked(rule: dict[str, Provider]) -> None:
    peer("other", wrong_gradient)
    rows = run_rule(time_wrong=True)
    both = rows["other", "forward_backward_ms"]
    assert both.value is not None and both.correct is False
    assert "d beta off by" in both.labels["comparison_error"]
    # Its outputs are right.
    assert rows["other", "forward_ms"].correct is True


def test_a_peer_that_refuses_its_backward(rule: dict[str, Provider]) -> None:
    guard = Guard()
    peer("guarded", guard, unguarded=guard.off)
    rows = run_rule()
    assert rows["guarded", "forward_ms"].correct is True
    assert "wrong on this compiler" in rows["guarded", "forward_ms"].labels["gradients"]
    refused = rows["guarded", "forward_backward_ms"]
    assert refused.value is None and refused.error.startswith("backward refused: RuntimeError")

    rows = run_rule(time_wrong=True)
    both = rows["guarded", "forward_backward_ms"]
    assert both.correct is True and both.labels["guard"] == "bypassed"
    assert guard.on


def test_a_provider_that_raises_leaves_rows_and_the_others_run(rule: dict[str, Provider]) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("\n\nout of memory")

    peer("failing", fails)
    peer("limited", chunked, limits=lambda arguments: f"K = {arguments['q_BTHK'].shape[-1]}")
    register_provider("gated_delta_rule", Provider("absent", chunked, lambda device: False))
    rows = run_rule()
    assert rows["failing", "forward_ms"].error == "MemoryError: out of memory"
    assert rows["limited", "forward_ms"].error == "skipped: K = 8"
    assert rows["absent", "forward_backward_ms"].error.startswith("skipped: not available")
    assert rows["torch", "forward_ms"].value is not None


def test_nothing_is_timed_where_the_truth_is_off(
    rule: dict[str, Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "check_truth", lambda operation, device: "the truth is off")
    rows = run_rule()
    assert {row.error for row in rows.values()} == {"the truth is off"}


def test_inputs_that_do_not_fit_leave_rows(
    rule: dict[str, Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RuleProblem, "inputs", too_large)
    rows = run_rule()
    assert rows["torch", "forward_ms"].error == "OutOfMemoryError: CUDA out of memory"


def test_a_later_run_does_what_is_missing(
    rule: dict[str, Provider], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel_speed.rows.jsonl"
    peer("other", wrong_output)
    make_bench(SpeedStore(path, COMMON), providers=["torch"]).run(RULE, RATES)
    first = read_rows(path)
    later = {**COMMON, "manifest_id": "later"}
    make_bench(SpeedStore(path, later)).run(RULE, RATES)
    second = read_rows(path)
    assert second[: len(first)] == first
    assert {row.provider for row in second[len(first) :]} == {"other"}
    assert {row.manifest_id for row in second} == {"manifest"}

    # Everything is there now, failures included, so nothing is even drawn.
    monkeypatch.setattr(run_module, "_Part", None)
    make_bench(SpeedStore(path, COMMON)).run(RULE, RATES)
    assert read_rows(path) == second


def test_failed_cells_are_tried_again_on_request(rule: dict[str, Provider], tmp_path: Path) -> None:
    path = tmp_path / "kernel_speed.rows.jsonl"
    peer("other", wrong_output)
    make_bench(SpeedStore(path, COMMON)).run(RULE, RATES)
    rule["other"] = Provider("other", without_prediction, anywhere, "peer")
    make_bench(SpeedStore(path, COMMON, retry_errors=True)).run(RULE, RATES)
    rows = read_rows(path)
    assert len({key_of(row) for row in rows}) == len(rows)
    assert all(row.error is None for row in rows)


def test_rows_of_other_code_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "kernel_speed.rows.jsonl"
    store = SpeedStore(path, COMMON)
    store.put(
        [store.make("kernel_speed", "copy_gb_per_second", 1.0, model="device", mixer="device")]
    )
    with pytest.raises(ConfigError, match=r"code_fingerprint 'code', now 'new'.*--overwrite"):
        SpeedStore(path, {**COMMON, "code_fingerprint": "new"})
    assert not SpeedStore(path, {**COMMON, "code_fingerprint": "new"}, overwrite=True).cells


def test_every_operation_runs() -> None:
    store = SpeedStore(None, COMMON)
    bench = make_bench(store)
    for problem in (
        SsdProblem("B1_T20_H2_P8_S4_G1"),
        AttentionProblem("B2_T20_H2_D8", 0.5),
        AttentionProblem("B2_T20_H2_D8", 1.0),
        RoutingProblem("route_index", "B2_T20_H2_D8", 0.5),
        RoutingProblem("route_pack", "B2_T20_H2_D8", 0.5),
    ):
        bench.run(problem, RATES)
    timed = {row.model for row in store.all_rows() if row.value and row.metric == "forward_ms"}
    assert timed == {"ssd", "routed_attention", "route_index", "route_pack"}
    rows = [row for row in store.all_rows() if row.model == "routed_attention"]
    assert all(0 < row.kv_fraction <= 1 for row in rows)
    assert {row.labels["fraction"] for row in rows} == {0.5, 1.0}


def test_ceilings_are_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "x.rows.jsonl"
    bench = make_bench(SpeedStore(path, COMMON))
    first = bench.ceilings(buffer_bytes=1 << 16, size=16)
    assert first.copy_bytes > 0 and first.matmul_flops > 0
    again = make_bench(SpeedStore(path, COMMON)).ceilings(buffer_bytes=-1)
    assert again == first
    for row in read_rows(path):
        assert row.low <= row.value <= row.high


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel_speed.rows.jsonl"
    arguments = ["kernels", "bench", "--dtype", "float32", "--rows", str(path), "--providers"]
    parsed = build_parser().parse_args(
        [*arguments, "torch", "--ops", "ssd", "--shapes", "B1_T20_H2_P8_S4_G1"]
    )
    assert _kernels_speed.run_bench(parsed, CPU, buffer_bytes=1 << 16, size=16) == 0
    rows = read_rows(path)
    manifest = read_manifest(tmp_path / "kernel_speed.manifest.json")
    assert {row.manifest_id for row in rows} == {manifest["manifest_id"]}
    assert manifest["config"] == {"device": "cpu", "dtype": "float32"}
    assert set(manifest["extra"]) == {
        "kernel_sources",
        "peers",
        "environment",
        "peer_environment",
    }
    assert manifest["extra"]["peer_environment"]["fla"]["FLA_FLASH_QLA"] == "0"
    assert len(manifest["measured"]["ceilings"]) == 3
    printed = capsys.readouterr()
    assert "SSD (Mamba-2): times" in printed.out
    assert "ssd B1_T20_H2_P8_S4_G1 torch forward eager:" in printed.err

    assert _kernels_speed.run_bench(parsed, CPU) == 0
    again = read_manifest(tmp_path / "kernel_speed.manifest.json")
    assert read_rows(path) == rows and len(again["measured"]["commands"]) == 2
    assert again["manifest_id"] == manifest["manifest_id"]


def test_errors_in_one_line() -> None:
    assert describe(ValueError("\n first \n second")) == "ValueError: first"
    assert len(describe(ValueError("x" * 1000))) == 300


def test_numbers_that_are_none() -> None:
    check = Check(1e-2, {"o": float("nan"), "p": 1.0})
    assert check.worst()[0] == "o" and len(check.faults()) == 2
    assert Check(1e-2).worst() is None


def test_the_cell_that_loses_the_gpu_has_a_row(
    rule: dict[str, Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*args: Any, **kwargs: Any) -> None:
        raise GpuLostError(RuntimeError("illegal memory access"), "torch")

    store = SpeedStore(None, COMMON)
    monkeypatch.setattr(run_module, "take_turns", lose)
    with pytest.raises(DeviceError, match="illegal memory access"):
        make_bench(store).run(RULE, RATES)
    lost = [row for row in store.all_rows() if row.error is not None]
    assert [(row.provider, row.metric) for row in lost] == [("torch", "forward_ms")]


def test_chosen_tiles_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = pytest.importorskip("ham.kernels.gated_delta_rule.triton_tiles")
    monkeypatch.setattr(tiles, "choose_tile", lambda kernel, width: f"{width} wide")
    with recorded_tiles("gated_delta_rule") as chosen:
        assert tiles.choose_tile("walk", 64) == "64 wide"
    assert chosen == {"walk: 64 wide"}
    with recorded_tiles("route_index") as chosen:
        pass
    assert chosen == set()


def test_all_kernel_code_is_in_the_fingerprint() -> None:
    modules = kernel_modules()
    for name in ("speed.run", "peers.fla", "gated_delta_rule.triton_forward", "registry"):
        assert f"ham.kernels.{name}" in modules
    assert all(name.startswith("FLA_") for name in switches() if "FLASH_QLA" in name)
