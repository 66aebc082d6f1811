"""What `ham measure` reports about a model, on a CPU."""

from __future__ import annotations

import pytest
import torch

from ham.config import MeasureConfig, TrainConfig
from ham.measure.throughput import Measurement
from ham.model.registry import registered_mixers
from ham.report.rows import RowWriter

SETTINGS = MeasureConfig(contexts=[32, 96], batch_size=2, decode_tokens=3, repeats=2, warmup=1)


def measure(
    model, settings: MeasureConfig = SETTINGS, tokens: int = 300, precision: str = "float32"
):
    writer = RowWriter(model=model.config.arm, mixer=model.config.mixer, device="test")
    text = torch.randint(0, 257, (tokens,), generator=torch.Generator().manual_seed(0))
    training = TrainConfig(precision=precision)
    Measurement(model, text, settings, training, writer, "unlisted device").run(lambda _: None)
    return writer.rows


def values(rows, metric: str, task: str) -> dict[float, float]:
    return {row.x_value: row.value for row in rows if (row.metric, row.task) == (metric, task)}


@pytest.mark.parametrize("mixer", sorted(registered_mixers()))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_context_is_measured_and_declared_bytes_are_real(
    tiny_model, mixer, precision
) -> None:
    model = tiny_model(mixer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = measure(model, precision=precision)
    assert not [row.error for row in rows if row.error]
    for metric, task in (
        ("training_step_ms", "train"),
        ("prefill_ms", "prefill"),
        ("decode_ms", "decode"),
    ):
        assert set(values(rows, metric, task)) == {32, 96}
        assert all(value > 0 for value in values(rows, metric, task).values())
    allocated = values(rows, "cache_bytes_allocated", "decode")
    assert allocated == values(rows, "declared_bytes", "decode")
    used = values(rows, "cache_bytes_used", "decode")
    assert all(0 < used[context] <= allocated[context] for context in allocated)
    growth = values(rows, "cache_bytes_allocated", "kv_growth")
    assert sorted(growth) == [64, 96]
    assert not [row for row in rows if row.metric == "mfu_fraction"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert not model.training


def test_memory_grows_only_where_it_should(tiny_model) -> None:
    for mixer, grows in (("transformer", True), ("gated_delta_rule", False), ("mamba2", False)):
        allocated = values(measure(tiny_model(mixer)), "cache_bytes_allocated", "decode")
        assert (allocated[96] > allocated[32]) is grows


def test_a_router_reports_what_it_really_kept(tiny_model) -> None:
    rows = measure(tiny_model("ham", target=0.3))
    shares = {row.kv_fraction for row in rows if row.task in ("prefill", "decode", "train")}
    assert all(0 < share < 1 for share in shares)
    assert {row.kv_fraction for row in measure(tiny_model("transformer"))} == {None}


def test_a_context_beyond_the_text_is_a_failed_row_and_the_rest_goes_on(tiny_model) -> None:
    rows = measure(tiny_model("mamba2"), tokens=60)
    failed = [row for row in rows if row.error]
    assert {(row.metric, row.x_value) for row in failed} == {
        ("prefill_ms", 96),
        ("decode_ms", 96),
        ("training_step_ms", 96),
        ("cache_bytes_allocated", 96),
    }
    assert all("the test text has 60 tokens" in row.error for row in failed)
    assert values(rows, "prefill_ms", "prefill")[32] > 0


def test_a_part_that_fails_halfway_leaves_only_its_error(tiny_model, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("ham.measure.throughput.peak_extra_bytes", refuse)
    rows = measure(tiny_model("transformer"))
    for metric, task in (("prefill_ms", "prefill"), ("training_step_ms", "train")):
        cells = [row for row in rows if (row.metric, row.task) == (metric, task)]
        assert [row.error for row in cells] == ["RuntimeError: out of memory"] * 2
        assert all(row.labels == {"batch_size": 2} for row in cells)
    assert not [row for row in rows if row.task == "prefill" and row.value is not None]
    assert set(values(rows, "decode_ms", "decode")) == {32, 96}
    assert "prefill at 32 tokens failed: RuntimeError: out of memory" in capsys.readouterr().err
