"""The sweep on a GPU at toy sizes: captured steps, fused operations, training graphs, memory."""

from __future__ import annotations

import pytest
import torch

from ham.kernels.speed.clock import make_clock
from ham.measure.sweep.attention import (
    CANDIDATES,
    HEADS_FIRST,
    TOKENS_FIRST,
    attend_one,
    empty_cache,
)
from ham.measure.sweep.grid import MODELS, SMOKE, Cell, Choice, choose_cells
from ham.measure.sweep.layers import LayerSettings
from ham.measure.sweep.models import ModelShelf
from ham.measure.sweep.ops import FUSED, PLAIN, step_ops
from ham.measure.sweep.parts import part_times
from ham.measure.sweep.passes import TrainingStep
from ham.measure.sweep.run import Sweep
from ham.measure.sweep.sessions import ModelSession
from ham.measure.sweep.store import SweepStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
COMMON = {"device": "GPU", "code_fingerprint": "code", "manifest_id": "manifest"}
CEILINGS = {"buffer_bytes": 1 << 24, "size": 256}


def session_of(mixer: str, ops: str) -> ModelSession:
    torch.manual_seed(0)
    shelf = ModelShelf(SMOKE, CUDA, torch.bfloat16)
    cell = Cell("model_decode", mixer, 128, 2, 0.25 if mixer == "ham" else None, 32)
    layouts = {(4, 32): HEADS_FIRST}
    clock = make_clock(CUDA)
    settings = LayerSettings(cell, CUDA, torch.bfloat16, clock, layouts, step_ops(ops))
    session = ModelSession(shelf.decoder(mixer), settings)
    session.prepare()
    return session


@pytest.mark.parametrize("mixer", MODELS)
def test_fused_and_plain_steps_agree(mixer: str) -> None:
    """Same weights and memory from the same seed; bfloat16 rounds at different places."""
    with torch.inference_mode():
        plain, fused = (session_of(mixer, name).step().float() for name in (PLAIN, FUSED))
    assert (fused - plain).norm() <= 2e-2 * plain.norm()


@pytest.mark.parametrize("mixer", MODELS)
@torch.inference_mode()
def test_a_replay_does_what_a_step_does(mixer: str) -> None:
    expected_BV = session_of(mixer, FUSED).step().float()
    session = session_of(mixer, FUSED)
    states = [tensor.clone() for tensor in _state_tensors(session)]
    session.capture()
    assert session.launch_mode == "cuda_graph"
    for tensor, before in zip(_state_tensors(session), states, strict=True):
        tensor.copy_(before)
    session.tokens_B.zero_()
    session.replay()
    torch.cuda.synchronize()
    found_BV = session._graph.result.float()
    assert (found_BV - expected_BV).norm() <= 1e-2 * expected_BV.norm()
    session.free()


def _state_tensors(session: ModelSession) -> list[torch.Tensor]:
    found = []
    for layer in session.layers:
        if hasattr(layer, "state"):
            found += [layer.state.recurrent, layer.state.history_BWC]
        elif hasattr(layer, "state_BHKV"):
            found += [layer.state_BHKV, layer.history_BWC]
    return found


@pytest.mark.parametrize("mixer", MODELS)
def test_every_part_is_timed_in_a_graph_by_fused_operations(mixer: str) -> None:
    """As the first compilation of the process, too: the part may not wait inside its capture."""
    torch.compiler.reset()
    session = session_of(mixer, FUSED)
    session.capture()
    sweep = Sweep(CUDA, torch.bfloat16, SMOKE, SweepStore(None, COMMON), fuse=True)
    found = part_times(session, sweep)
    assert {name for name, part in found.items() if part.time is None} == set()
    assert {(part.launch_mode, part.operations) for part in found.values()} == {
        ("cuda_graph", FUSED)
    }, {name: part.note for name, part in found.items()}
    session.free()


@pytest.mark.parametrize("layout", [HEADS_FIRST, TOKENS_FIRST])
@pytest.mark.parametrize("backend", CANDIDATES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_attention_of_one_query_is_right(layout: str, backend: str, head_dim: int) -> None:
    k, v = (
        empty_cache(2, 4, 1025, head_dim, layout, CUDA, torch.bfloat16).normal_() for _ in range(2)
    )
    q = torch.randn(2, 4, head_dim, device=CUDA, dtype=torch.bfloat16)
    score = torch.einsum("bhk,bhtk->bht", q.double(), k.double()) * head_dim**-0.5
    expected = torch.einsum("bht,bhtv->bhv", score.softmax(-1), v.double())
    found = attend_one(q, k, v, backend).double()
    assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("mixer", ["ham", "transformer", "sliding_window"])
def test_a_training_step_is_captured(mixer: str) -> None:
    shelf = ModelShelf(SMOKE, CUDA, torch.bfloat16)
    cell = Cell("model_train", mixer, 128, 2, 0.25 if mixer == "ham" else None, 32)
    step = TrainingStep(shelf.trained(mixer), cell)
    eager = step.step().loss.item()
    step.prepare()
    assert step.optimise.launch_mode == "cuda_graph", step.optimise.note
    # Weights do not move at a learning rate of 0: the loss of the replay is that of the first call.
    assert step.step().loss.item() == pytest.approx(eager, rel=1e-2)


def test_the_whole_path_leaves_no_memory_behind() -> None:
    cells = choose_cells(SMOKE, Choice(quick=True, experiments=["mixer_decode"]))[1]
    sweep = Sweep(CUDA, torch.bfloat16, SMOKE, SweepStore(None, COMMON), fuse=True)
    held = []
    for _ in range(2):
        sweep.store = SweepStore(None, COMMON)
        assert sweep.run(cells, **CEILINGS) == 0
        torch._C._cuda_clearCublasWorkspaces()
        held.append(torch.cuda.memory_allocated())
    rows = [row for row in sweep.store.all_rows() if row.experiment == "mixer_decode"]
    assert all(row.error is None and row.launch_mode == "cuda_graph" for row in rows)
    assert all(row.labels["peak_bytes"] >= row.labels["kv_bytes"] for row in rows)
    assert held[1] == held[0]


def test_more_than_the_device_has_is_a_row() -> None:
    sweep = Sweep(
        CUDA, torch.bfloat16, SMOKE, SweepStore(None, COMMON), free=lambda device: 1 << 60
    )
    huge = Cell("mixer_decode", "transformer", 1 << 30, 64, None, 32)
    small = Cell("mixer_decode", "transformer", 64, 1, None, 32)
    assert sweep.run([huge, small], **CEILINGS) == 0
    rows = {row.x_value: row for row in sweep.store.all_rows() if row.metric == "median_ms"}
    assert "out of memory" in rows[float(1 << 30)].error
    assert rows[64.0].value > 0
