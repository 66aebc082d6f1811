"""The sweep on a CPU: cells, forced routing, sessions against models, rows, failures, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import CEILINGS, COMMON, CPU, make_sweep, settings_of

from ham.cli import build_parser, main
from ham.cli import sweep as command
from ham.errors import ConfigError
from ham.kernels.speed.clock import GpuLostError, WallClock
from ham.measure.sweep import attention
from ham.measure.sweep import run as run_module
from ham.measure.sweep.bounded import EvictedLayer, PaddedWindowLayer
from ham.measure.sweep.budget import cache_bytes, refusal
from ham.measure.sweep.forced import CLUSTER_TOKENS, force_routing, forced_mask
from ham.measure.sweep.grid import (
    CLUSTERED,
    EXPERIMENTS,
    FIRST_MODELS,
    FULL,
    LATER_MODELS,
    MODELS,
    SMOKE,
    UNSTRUCTURED,
    Cell,
    Choice,
    choose_cells,
)
from ham.measure.sweep.layers import DenseLayer, PaddedHamLayer, RecurrentLayer
from ham.measure.sweep.models import parameter_bytes, sweep_config
from ham.measure.sweep.ops import FUSED, PLAIN, step_ops
from ham.measure.sweep.run import Sweep
from ham.measure.sweep.sessions import ModelSession
from ham.measure.sweep.store import SweepStore, cell_key
from ham.model.blocks import RotaryPositions
from ham.model.sizing import parameter_count
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import Row, read_rows

FIRST = Choice(experiments=["mixer_decode"], contexts=[64], batches=[1], fractions=[0.25])


def timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.metric == "median_ms"]


def test_the_cells_of_the_targets_come_first() -> None:
    _, cells = choose_cells(FULL, Choice())
    assert len(cells) == len(set(cells)) > 500
    first = [(cell.experiment, cell.model, cell.context, cell.batch) for cell in cells[:8]]
    assert first[0] == ("mixer_decode", "ham", 32768, 16)
    assert ("model_decode", "transformer", 131072, 8) in first
    assert (
        cells[: len(choose_cells(FULL, Choice(quick=True))[1])]
        == (choose_cells(FULL, Choice(quick=True))[1])
    )
    assert {cell.experiment for cell in cells} == set(EXPERIMENTS)
    grid = {
        (cell.context, cell.batch, cell.fraction)
        for cell in cells
        if (cell.experiment, cell.model, cell.head_dim) == ("model_decode", "ham", 64)
    }
    assert len(grid - {(131072, 8, 0.25)}) == 6 * 3 * 4


def test_a_choice_filters_and_adds_to_the_grid() -> None:
    scale, cells = choose_cells(
        FULL, Choice(experiments=["model_decode"], models=["ham"], contexts=[2048], fractions=[0.3])
    )
    assert {(cell.context, cell.fraction) for cell in cells} == {(2048, 0.3)}
    assert 2048 in scale.contexts
    parameter_count(sweep_config(replace(SMOKE, contexts=(8, 64)), "sliding_window"))
    training = choose_cells(FULL, Choice(experiments=["model_train"], batches=[1]))[1]
    assert {cell.batch * cell.context for cell in training} == {32768}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(models=["lstm"]), r"unknown model 'lstm'; known: gated_delta_rule, .*ham"),
        (Choice(experiments=["decode"]), "unknown experiment 'decode'"),
        (Choice(fractions=[0.0]), "above 0 and at most 1, not 0"),
        (Choice(contexts=[0]), "context must be at least 1, not 0"),
        (Choice(batches=[-1]), "batch must be at least 1, not -1"),
        (Choice(quick=True, contexts=[4096], experiments=["mixer_decode"]), "no cell"),
    ],
)
def test_what_no_cell_can_have_is_refused(choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_cells(FULL, choice)


@pytest.mark.parametrize("routing", [UNSTRUCTURED, CLUSTERED])
def test_forced_masks_keep_their_share_and_do_not_depend_on_pieces(routing: str) -> None:
    mask_BT = forced_mask(3, 16, 8192, 0.25, routing, CPU)
    assert mask_BT.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(mask_BT[:, 1000:], forced_mask(3, 16, 7192, 0.25, routing, CPU, start=1000))
    assert len(set(mask_BT.sum(1).tolist())) > 8, "sequences are ragged"
    assert not torch.equal(mask_BT, forced_mask(4, 16, 8192, 0.25, routing, CPU))
    assert bool(forced_mask(0, 2, 64, 1.0, routing, CPU).all())
    runs = mask_BT.unflatten(1, (-1, CLUSTER_TOKENS))
    whole = (runs.all(-1) | ~runs.any(-1)).all().item()
    assert whole == (routing == CLUSTERED)


def test_models_have_equal_parameters() -> None:
    scale = replace(FULL, layers=1)
    counts = {name: parameter_count(sweep_config(scale, name)) for name in MODELS}
    for count in counts.values():
        assert count == pytest.approx(counts["transformer"], rel=0.01)


@pytest.mark.parametrize("mixer", ["transformer", "sliding_window", "gated_delta_rule", "mamba2"])
@pytest.mark.parametrize("context", [9, 40])
@torch.inference_mode()
def test_a_session_decodes_what_the_model_decodes(
    mixer: str, context: int, tiny_model: Callable[..., Any]
) -> None:
    """From the memory that a real prefill leaves behind, also past the window of 24."""
    model, session, state = prefilled(mixer, context, None, tiny_model)
    for layer, held in zip(session.layers, state.layers, strict=True):
        if isinstance(layer, RecurrentLayer):
            layer.state.recurrent.copy_(held.recurrent)
            layer.state.history_BWC.copy_(held.history_BWC)
        else:
            assert isinstance(layer, DenseLayer)
            keys = getattr(held.cache, "k_BTHK", None)
            for target, name in ((layer.k_BHTK, "k"), (layer.v_BHTV, "v")):
                suffix = "K" if name == "k" else "V"
                axes = "BTH" if keys is not None else "BWH"
                source = getattr(held.cache, f"{name}_{axes}{suffix}").transpose(1, 2)
                count = min(source.shape[2], layer.keys)
                target[:, :, :count] = source[:, :, :count]
    compare_step(model, session, state)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@torch.inference_mode()
def test_a_ham_session_decodes_what_the_model_decodes(
    fraction: float, tiny_model: Callable[..., Any]
) -> None:
    context = position_with_decision_of_the_first(fraction)
    model, session, state = prefilled("ham", context, fraction, tiny_model)
    for layer, held in zip(session.layers, state.layers, strict=True):
        assert isinstance(layer, PaddedHamLayer)
        packed = held.cache.paged.packed()
        assert tuple(packed.counts_B.tolist()) == layer.routed_B
        layer.k_BHNK[:, :, : packed.k_BNHK.shape[1]] = packed.k_BNHK.transpose(1, 2)
        layer.v_BHNV[:, :, : packed.v_BNHV.shape[1]] = packed.v_BNHV.transpose(1, 2)
        layer.state_BHKV.copy_(held.recurrent_BHKV)
        layer.history_BWC.copy_(held.history_BWC)
    compare_step(model, session, state)


@pytest.mark.parametrize("context", [9, 40])
@torch.inference_mode()
def test_a_session_of_a_rule_with_a_window_decodes_what_the_model_decodes(
    context: int, tiny_model: Callable[..., Any]
) -> None:
    model, session, state = prefilled("gated_delta_rule_window", context, None, tiny_model)
    for layer, held in zip(session.layers, state.layers, strict=True):
        assert isinstance(layer, PaddedWindowLayer) and "score" not in layer.pieces()
        # The token of the step takes the place of the oldest.
        before = min(context, 23)
        ring = [position % 24 for position in range(context - before, context)]
        assert layer.slots == before + 1
        layer.k_BHNK[:, :, :before] = held.cache.k_BWHK[:, ring].transpose(1, 2)
        layer.v_BHNV[:, :, :before] = held.cache.v_BWHV[:, ring].transpose(1, 2)
        layer.state_BHKV.copy_(held.recurrent_BHKV)
        layer.history_BWC.copy_(held.history_BWC)
    compare_step(model, session, state)


@torch.inference_mode()
def test_a_session_of_an_evicted_transformer_decodes_what_the_model_decodes(
    tiny_model: Callable[..., Any],
) -> None:
    """Some tokens after an eviction: what it left and those read since."""
    model, session, state = prefilled("transformer_evicted", 40, None, tiny_model)
    for layer, held in zip(session.layers, state.layers, strict=True):
        assert isinstance(layer, EvictedLayer)
        count = held.cache.filled.longest
        assert layer.keys == count + 1 < 41
        others = [slot for slot in range(layer.keys) if slot != layer.slot]
        layer.k_BHTK[:, :, others] = held.cache.slots.k_BNGK[:, :count].transpose(1, 2)
        layer.v_BHTV[:, :, others] = held.cache.slots.v_BNGV[:, :count].transpose(1, 2)
    compare_step(model, session, state)


def test_models_that_come_last_are_measured_where_they_can_be() -> None:
    cells = choose_cells(FULL, Choice())[1]
    first = [index for index, cell in enumerate(cells) if cell.model in LATER_MODELS]
    assert min(first) > max(i for i, cell in enumerate(cells) if cell.model in FIRST_MODELS)
    kinds = {name: {c.experiment for c in cells if c.model == name} for name in LATER_MODELS}
    assert kinds["gated_delta_rule_window"] == set(EXPERIMENTS)
    assert kinds["transformer_evicted"] == {"mixer_decode", "model_decode", "model_decode_part"}
    evicted = next(cell for cell in cells if cell.model == "transformer_evicted")
    full = replace(evicted, model="transformer")
    share = cache_bytes(evicted, FULL, 2) / cache_bytes(full, FULL, 2)
    assert share == pytest.approx(0.25, abs=0.01)


def test_rows_of_an_evicted_transformer_say_what_it_holds() -> None:
    sweep = make_sweep()
    wanted = Choice(["model_decode"], ["transformer_evicted"], [128], [2])
    assert sweep.run(choose_cells(SMOKE, wanted)[1], **CEILINGS) == 0
    (row,) = timed(sweep.store.all_rows())
    assert row.error is None and row.kv_fraction == pytest.approx(0.25, abs=0.05)


def position_with_decision_of_the_first(fraction: float) -> int:
    """A context whose next token is routed as the first one is, which is all that a step sees."""
    for context in range(20, 200):
        masks = [
            forced_mask(layer, 2, context + 1, fraction, UNSTRUCTURED, CPU) for layer in (0, 1)
        ]
        if all(torch.equal(mask[:, 0], mask[:, -1]) for mask in masks):
            return context
    raise AssertionError("no such position")


def prefilled(
    mixer: str, context: int, fraction: float | None, tiny_model: Callable[..., Any]
) -> tuple[Any, ModelSession, Any]:
    model = tiny_model(mixer)
    if fraction is not None:
        force_routing(model, fraction, UNSTRUCTURED)
    cell = Cell("model_decode", mixer, context, 2, fraction, 16)
    session = ModelSession(model, settings_of(cell))
    session.prepare()
    state = model.init_state(2)
    generator = torch.Generator().manual_seed(0)
    model.prefill(torch.randint(257, (2, context), generator=generator), state)
    return model, session, state


def compare_step(model: Any, session: ModelSession, state: Any) -> None:
    session.tokens_B.copy_(torch.tensor([5, 250]))
    found_BV = session.step()
    expected_BV = model.step(torch.tensor([5, 250]), state)
    torch.testing.assert_close(found_BV, expected_BV, atol=1e-5, rtol=1e-5)
    assert torch.equal(session.tokens_B, expected_BV.argmax(-1))


def test_only_attention_that_is_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for the backends: one fails, one is off by 2 %, one is right but slower."""
    q, k, v = (torch.randn(2, 2, *size) for size in ((8,), (33, 8), (33, 8)))
    plain = attention.attend_one

    def stand_in(q: Any, k: Any, v: Any, name: str) -> torch.Tensor:
        if name == "missing":
            raise RuntimeError("no available kernel")
        return plain(q, k, v, attention.AUTOMATIC) * (1.02 if name == "wrong" else 1.0)

    monkeypatch.setattr(attention, "attend_one", stand_in)
    monkeypatch.setattr(attention, "CANDIDATES", ("missing", "wrong", "right"))
    assert set(attention._times(q, k, v, WallClock())) == {"right"}


def test_fused_operations_do_what_plain_ones_do() -> None:
    plain, fused = step_ops(PLAIN), step_ops(FUSED, backend="eager")
    rotary = RotaryPositions(8, 16)
    qkv_BC, gain_D = torch.randn(3, 3 * 4 * 8), torch.randn(32)
    slots = []
    for ops in (plain, fused):
        k_BHK, v_BHV = torch.empty(3, 4, 8), torch.empty(3, 4, 8)
        q_BHK = ops.rotate_append(qkv_BC, rotary.cos[5], rotary.sin[5], k_BHK, v_BHV)
        unit = ops.gated_unit(qkv_BC)
        slots.append(
            (q_BHK, k_BHK, v_BHV, unit, *ops.add_norm(v_BHV.flatten(1), unit[:, :32], gain_D))
        )
    for one, other in zip(*slots, strict=True):
        torch.testing.assert_close(one, other)
    q, k, v = (part.unflatten(-1, (4, 8))[:, None] for part in qkv_BC.chunk(3, dim=-1))
    torch.testing.assert_close(slots[0][0], rotary(q, 5)[:, 0])
    torch.testing.assert_close(slots[0][1], rotary(k, 5)[:, 0])
    assert torch.equal(slots[0][2], v[:, 0])


def test_every_experiment_gives_rows_with_their_fields() -> None:
    wanted = Choice(
        models=["ham", "gated_delta_rule"], contexts=[64], batches=[1], fractions=[0.25]
    )
    sweep = make_sweep()
    assert sweep.run(choose_cells(SMOKE, wanted)[1], **CEILINGS) == 0
    rows = timed(sweep.store.all_rows())
    assert {row.experiment for row in rows} == set(EXPERIMENTS)
    assert all(row.error is None and row.x_name == "context" for row in rows)
    row = next(r for r in rows if (r.experiment, r.model) == ("model_decode", "ham"))
    assert row.labels["routing"] == "forced" and row.labels["fraction"] == 0.25
    assert row.launch_mode == "eager" and 0.1 < row.kv_fraction < 0.4
    assert row.labels["tokens_per_s"] == pytest.approx(1e3 / row.value)
    model = sweep.shelf.decoder("ham")
    assert row.labels["bytes_read_per_token"] > parameter_bytes(model)
    width, layers = SMOKE.width, SMOKE.layers
    assert row.labels["full_cache_bytes"] == 2 * layers * 64 * width * 4
    parts = [r for r in sweep.store.all_rows() if r.metric == "part_ms" and r.model == "ham"]
    assert {"recurrent", "score", "attention", "mlp", "head"} <= {r.task for r in parts}


def test_a_cell_that_cannot_fit_is_a_row_and_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "measure_cell", lambda *_: pytest.fail("it was tried"))
    sweep = make_sweep(free=lambda device: 1 << 20)
    sweep.run(choose_cells(SMOKE, FIRST)[1], **CEILINGS)
    rows = timed(sweep.store.all_rows())
    assert rows and all(row.value is None for row in rows)
    assert all(row.error.startswith("out of memory: needs ") for row in rows)
    assert refusal(1, None) is None and refusal(1, 2 << 30) is None


def test_running_out_of_memory_is_a_row_and_the_sweep_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare = DenseLayer.prepare

    def failing(layer: DenseLayer) -> None:
        if layer.settings.cell.model == "transformer":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96 GiB")
        prepare(layer)

    monkeypatch.setattr(DenseLayer, "prepare", failing)
    sweep = make_sweep()
    cells = choose_cells(SMOKE, FIRST)[1]
    assert sweep.run(cells, **CEILINGS) == 0
    rows = {(row.model, row.labels["head_dim"]): row for row in timed(sweep.store.all_rows())}
    assert len(rows) == len(cells)
    assert "Tried to allocate 96 GiB" in rows["transformer", 32].error
    assert rows["sliding-window", 32].value > 0 and rows["ham", 16].value > 0


def test_numbers_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseLayer, "_attend", lambda layer: layer.q_BHK * torch.nan)
    sweep = make_sweep()
    wanted = Choice(["mixer_decode"], ["transformer"], [64], [1])
    sweep.run(choose_cells(SMOKE, wanted)[1], **CEILINGS)
    assert all("not finite" in row.error for row in timed(sweep.store.all_rows()))


def test_a_lost_gpu_ends_the_run_and_leaves_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise GpuLostError(RuntimeError("illegal memory access"))

    monkeypatch.setattr(run_module, "measure_cell", lose)
    sweep = make_sweep()
    with pytest.raises(GpuLostError):
        sweep.run(choose_cells(SMOKE, FIRST)[1], **CEILINGS)
    (row,) = timed(sweep.store.all_rows())
    assert "illegal memory access" in row.error


def test_a_killed_sweep_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.rows.jsonl"
    cells = choose_cells(SMOKE, FIRST)[1]
    measure, seen = run_module.measure_cell, []

    def third_kills(cell: Cell, sweep: Sweep) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(cell)
        return measure(cell, sweep)

    monkeypatch.setattr(run_module, "measure_cell", third_kills)
    with pytest.raises(KeyboardInterrupt):
        make_sweep(SweepStore(path, COMMON)).run(cells, **CEILINGS)
    assert len(timed(read_rows(path))) == 2

    def only_new(cell: Cell, sweep: Sweep) -> Any:
        assert cell not in seen
        return measure(cell, sweep)

    monkeypatch.setattr(run_module, "measure_cell", only_new)
    assert make_sweep(SweepStore(path, COMMON)).run(cells, **CEILINGS) == 0
    rows = read_rows(path)
    assert len(timed(rows)) == len(cells) and len(rows) == len(cells) + 3, "ceilings once"
    with pytest.raises(ConfigError, match="code_fingerprint 'code', now 'other'"):
        SweepStore(path, {**COMMON, "code_fingerprint": "other"})
    assert not SweepStore(path, COMMON, overwrite=True).all_rows()


def test_failed_cells_are_tried_again_on_request(tmp_path: Path) -> None:
    path = tmp_path / "sweep.rows.jsonl"
    cells = choose_cells(SMOKE, FIRST)[1][:1]
    make_sweep(SweepStore(path, COMMON), free=lambda device: 0).run(cells, **CEILINGS)
    assert SweepStore(path, COMMON).has(cell_key(cells[0]))
    store = SweepStore(path, COMMON, retry_errors=True)
    assert not store.has(cell_key(cells[0]))
    make_sweep(store).run(cells, **CEILINGS)
    (row,) = timed(read_rows(path))
    assert row.error is None


def test_a_budget_leaves_the_rest_for_later() -> None:
    sweep = make_sweep(budget_seconds=1e-9)
    cells = choose_cells(SMOKE, FIRST)[1]
    assert sweep.run(cells, **CEILINGS) == len(cells)


def test_the_command_measures_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "sweep.rows.jsonl"
    words = ["sweep", "run", "--device", "cpu", "--rows", str(rows)]
    words += ["--experiments", "mixer_decode", "--models", "transformer", "--contexts", "64"]
    arguments = build_parser().parse_args(words)
    assert command.measure_on(arguments, CPU, **CEILINGS) == 0
    assert "0 failed; 0 cells left" in capsys.readouterr().out
    manifest = read_manifest(manifest_path(rows))
    assert manifest["measured"]["ceilings"]["copy_gb_per_second"] > 0
    assert manifest["config"]["dtype"] == "float32"
    assert main(["sweep", "report", str(rows), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report/sweep.md").is_file()
    assert main([*words, "--budget-seconds", "0"]) == 2
    assert "--budget-seconds must be above 0, not 0" in capsys.readouterr().err


def test_the_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "list", "--device", "cuda", "--experiments", "mixer_decode", "--quick"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "2.00",
        "GiB",
        "mixer_decode",
        "transformer",
        "T32768",
        "B16",
        "D64",
    ]
    assert lines[-1] == "4 cells"


@torch.inference_mode()
def test_a_transformer_with_a_short_convolution_decodes_what_the_model_decodes(
    tiny_model: Callable[..., Any],
) -> None:
    model, session, state = prefilled(
        "transformer", 40, None, lambda mixer: tiny_model(mixer, short_conv=4)
    )
    for layer, held in zip(session.layers, state.layers, strict=True):
        layer.k_BHTK[:, :, :40] = held.cache.k_BTHK[:, :40].transpose(1, 2)
        layer.v_BHTV[:, :, :40] = held.cache.v_BTHV[:, :40].transpose(1, 2)
        layer.history_BWC.copy_(held.history_BWC)
        assert layer.state_bytes() == held.history_BWC.nbytes
    compare_step(model, session, state)
