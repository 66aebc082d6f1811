"""Training with each provider: losses, error rows, and the provider that rows name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ham.cli import main
from ham.config_files import load_config
from ham.errors import ConfigError
from ham.job import used_providers
from ham.kernels.registry import find_operation
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import Row, read_rows
from ham.train import compare_kernels
from ham.train.compare_kernels import Variant, choose_variants, other_rounding

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny configuration and its prepared data."""
    from ham.train.prepare import prepare_data

    folder = tmp_path_factory.mktemp("experiment")
    values = {
        "name": "tiny",
        "device": "cpu",
        "data": {"context": 100, "recall_fraction": 0.0},
        "model": {"layers": 2, "width": 32, "heads": 2, "max_positions": 128},
        "arms": [{"name": "ham", "mixer": "ham"}],
        "train": {
            "batch_size": 2,
            "learning_rate": 0.01,
            "validation_batches": 1,
            "calibration_batches": 1,
        },
        "evaluate": {"language_modelling": None, "needle": None},
        "measure": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    prepare_data(load_config(folder / "config.yaml").data, folder / "data")
    return folder


@pytest.fixture
def compare(experiment: Path, tmp_path: Path) -> Callable[..., tuple[int, list[Row]]]:
    """Run `ham kernels train`; returns its status and its rows."""

    def run(*flags: str) -> tuple[int, list[Row]]:
        rows = tmp_path / "kernel_training.rows.jsonl"
        command = ["kernels", "train", str(experiment / "config.yaml"), "--arm", "ham"]
        command += ["--seed", "0", "--data", str(experiment / "data"), "--rows", str(rows)]
        status = main([*command, *flags])
        found = read_rows(rows)
        identity = read_manifest(manifest_path(rows))["manifest_id"]
        assert {row.manifest_id for row in found} == {identity}
        return status, found

    return run


def losses_of(rows: list[Row], variant: str) -> list[float | None]:
    """Losses of the steps of one variant, in order."""
    return [
        row.value
        for row in rows
        if row.metric == "loss_nats" and row.labels["variant"] == variant and row.x_name == "step"
    ]


def numbers_of(rows: list[Row], metric: str) -> dict[str, float | None]:
    """Value of one metric by variant."""
    return {str(row.labels["variant"]): row.value for row in rows if row.metric == metric}


def count_calls(monkeypatch: pytest.MonkeyPatch, operation: str, name: str) -> list[None]:
    """A list that grows by one with each call of a provider."""
    calls: list[None] = []
    providers = find_operation(operation).providers
    function = providers[name].function

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setitem(providers, name, dataclasses.replace(providers[name], function=counted))
    return calls


def test_torch_and_reference_give_the_same_losses(
    compare: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls = count_calls(monkeypatch, "gated_delta_rule", "reference")
    status, rows = compare("--steps", "5")
    assert status == 0
    # Two layers; freezing calls each of them twice on its one batch.
    assert len(calls) == 2 * 5 + 2 * 2
    base, reference = losses_of(rows, "torch"), losses_of(rows, "reference")
    assert len(base) == 5 and base[-1] < base[0]
    assert reference == pytest.approx(base, abs=1e-4)
    # On a CPU no matrix product is rounded in another way.
    assert losses_of(rows, "torch-other-rounding") == base
    assert {row.provider for row in rows} == {"torch", "reference"}
    assert all(row.kv_fraction is not None for row in rows)
    differences = numbers_of(rows, "loss_difference_nats")
    assert differences["torch-other-rounding"] == 0.0
    expected = [abs(one - other) for one, other in zip(reference, base, strict=True)][2:]
    assert differences["reference"] == pytest.approx(sum(expected) / 3)
    assert set(numbers_of(rows, "smoothed_loss_difference_nats")) == set(differences)
    assert all(value > 0 for value in numbers_of(rows, "tokens_per_second").values())
    assert "the losses of reference differ from those of torch by" in capsys.readouterr().out


def test_losses_are_those_of_plain_training(
    compare: Callable, experiment: Path, tmp_path: Path
) -> None:
    """Learning rates, batches and freezing as in `ham train`, whose rows name the provider too."""
    _, rows = compare("--steps", "12", "--variants", "torch")
    command = ["train", str(experiment / "config.yaml"), "--arm", "ham", "--seed", "0"]
    command += ["--data", str(experiment / "data"), "--out", str(tmp_path / "out")]
    command += ["--state", str(tmp_path / "state"), "--set", "train.steps=12"]
    assert main([*command, "--set", "train.log_every=1", "--set", "model.kernels=torch"]) == 0
    trained = read_rows(tmp_path / "out" / "train.rows.jsonl")
    expected = [r.value for r in trained if r.metric == "loss_nats" and r.task == "train"]
    assert losses_of(rows, "torch") == expected
    assert {row.provider for row in trained} == {"torch"}


def test_a_variant_that_fails_leaves_a_row_and_the_others_go_on(
    compare: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, rows = compare("--steps", "2", "--variants", "triton", "torch-other-rounding")
    assert status == 1
    (failed,) = (row for row in rows if row.labels["variant"] == "triton")
    assert failed.value is None and failed.provider == "triton"
    assert "cannot run on cpu" in failed.error
    assert len(losses_of(rows, "torch-other-rounding")) == 2
    assert "variant triton failed: DeviceError" in capsys.readouterr().err


def test_without_torch_there_is_nothing_to_differ_from(
    compare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> AbstractContextManager:
        raise RuntimeError("out of memory\nmore words")

    variants = {**compare_kernels.VARIANTS, "torch": Variant("torch", broken)}
    monkeypatch.setattr(compare_kernels, "VARIANTS", variants)
    status, rows = compare("--steps", "2", "--variants", "torch-other-rounding")
    assert status == 1
    errors = {row.metric: row.error for row in rows if row.error is not None}
    assert errors["loss_nats"] == "RuntimeError: out of memory"
    assert errors["loss_difference_nats"] == "no losses of torch: RuntimeError: out of memory"


def test_choice_of_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["torch", "torch-other-rounding"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_variants(None, CPU) == [*two, "reference"]
    assert choose_variants(None, torch.device("cuda")) == [*two, "triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_variants(None, CPU) == [*two, "triton"]
    assert choose_variants(["reference", "torch"], CPU) == ["torch", "reference"]
    with pytest.raises(ConfigError, match="unknown variant 'fast'"):
        choose_variants(["fast"], CPU)


def test_other_rounding_ends_with_its_block() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(ZeroDivisionError), other_rounding(CPU):
        assert matmul.allow_bf16_reduced_precision_reduction is not before
        raise ZeroDivisionError
    assert matmul.allow_bf16_reduced_precision_reduction is before


def test_rows_name_the_providers_that_a_model_uses(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("ham")
    assert used_providers(model) == "torch"
    assert used_providers(tiny_model("transformer")) == "torch"

    def find(operation: str, name: str, device: torch.device) -> Any:
        assert (name, device) == ("auto", CPU)
        return SimpleNamespace(name="triton" if operation == "gated_delta_rule" else "torch")

    monkeypatch.setattr("ham.kernels.registry.find_provider", find)
    assert used_providers(model) == "triton+torch"
