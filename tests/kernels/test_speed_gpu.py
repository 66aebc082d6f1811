"""Timing on a GPU: events, graphs, ceilings, and a whole run at small sizes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ham.kernels.registry import AUTO, find_provider
from ham.kernels.speed.ceilings import COPY, measure_ceilings
from ham.kernels.speed.cells import EAGER, GRAPH, modes_of
from ham.kernels.speed.clock import Task, make_clock, take_turns
from ham.kernels.speed.problems import (
    AttentionProblem,
    Problem,
    RoutingProblem,
    RuleProblem,
    SsdProblem,
)
from ham.kernels.speed.run import Bench
from ham.kernels.speed.store import SpeedStore
from ham.kernels.speed.subjects import default_names
from ham.kernels.speed.tasks import capture_checked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
PROBLEMS: list[Problem] = [
    RuleProblem("B2_T200_H2_D64"),
    SsdProblem("B2_T200_H2_P64_S64_G1"),
    AttentionProblem("B2_T256_H2_D64", 0.25),
    AttentionProblem("B2_T256_H2_D64", 1.0),
    RoutingProblem("route_index", "B2_T256_H2_D64", 0.25),
    RoutingProblem("route_pack", "B2_T256_H2_D64", 0.25),
]


def task(run) -> Task:
    return Task(run, contextlib.nullcontext)


def test_twice_the_work_takes_about_twice_as_long() -> None:
    one, two = (torch.ones(size << 26, device=CUDA) for size in (1, 2))
    timings = take_turns(make_clock(CUDA), {"1": task(one.sum), "2": task(two.sum)})
    ratio = timings["2"].estimate.value / timings["1"].estimate.value
    assert 1.6 < ratio < 2.4


def test_ceilings_of_a_gpu() -> None:
    rates = measure_ceilings(CUDA, buffer_bytes=1 << 28, size=2048)
    assert 50 < rates[COPY].value < 20_000
    assert all(rate.low <= rate.value <= rate.high for rate in rates.values())


def test_a_graph_gives_what_the_call_gives() -> None:
    left = torch.randn(64, 64, device=CUDA, requires_grad=True)

    def both() -> dict:
        o = left @ left
        return {"o": o.detach(), "gradients": torch.autograd.grad(o.sum(), [left])}

    graph = capture_checked(task(both))
    graph.result["o"].zero_()
    graph.replay()
    torch.testing.assert_close(graph.result["o"], (left @ left).detach())


def test_a_call_that_waits_has_no_graph_and_harms_no_other() -> None:
    x = torch.ones(8, device=CUDA)
    with pytest.raises(RuntimeError, match="synchroniz"):
        capture_checked(task(lambda: {"o": x * x.sum().item()}))
    capture_checked(task(lambda: {"o": x + 1}))


def test_work_that_a_graph_does_not_do_is_found() -> None:
    x = torch.ones(8, device=CUDA)
    made: list[torch.Tensor] = []

    def only_the_first_time() -> dict:
        if len(made) < 4:
            made.append(x + 1)
        return {"o": made[-1]}

    with pytest.raises(ValueError, match="replay of the graph differs"):
        capture_checked(task(only_the_first_time))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem.operation}")
def test_every_cell_has_a_row_and_our_results_are_right(problem: Problem) -> None:
    store = SpeedStore(None, {"device": "x", "code_fingerprint": "y", "manifest_id": "z"})
    bench = Bench(CUDA, torch.bfloat16, store, rounds={"max_rounds": 5, "budget_ms": 5})
    bench.run(problem, bench.ceilings(buffer_bytes=1 << 28, size=1024))
    rows = {(row.provider, row.metric, row.launch_mode): row for row in store.all_rows()}
    for name in default_names(problem):
        for mode in modes_of(problem):
            for launch_mode in (EAGER, GRAPH):
                row = rows[name, f"{mode}_ms", launch_mode]
                assert row.value is not None or row.error
        if name in ("torch", "triton") and rows[name, "forward_ms", EAGER].value:
            assert rows[name, "forward_ms", EAGER].correct is True
            assert rows[name, "forward_peak_bytes", EAGER].value > 0
    wrong = [row.error for row in store.all_rows() if row.correct is False]
    assert not [error for error in wrong if error and "triton" in error]


def test_triton_is_chosen_on_a_gpu() -> None:
    assert find_provider("gated_delta_rule", AUTO, CUDA).name == "triton"
