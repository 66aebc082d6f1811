"""Models of other libraries as arms of an experiment, by their configuration alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_experiment import experiment, external_arm, run_stages
from transformers import AutoModelForCausalLM

from ham.cli import main
from ham.config_files import parse_config
from ham.errors import ConfigError, MissingDataError
from ham.external.configuration import check_external
from ham.failure import write_failure
from ham.fingerprint import reachable_modules, repository_root
from ham.model.checkpoint import load_model
from ham.model.sizing import model_config, parameter_count
from ham.plan import Plan, format_plan
from ham.workflow import stage_modules


def test_sizes_come_from_the_experiment_and_parameters_match() -> None:
    config = experiment(external_arm("gpt_neox", hidden_dropout=0.1))
    target = parameter_count(model_config(config, config.arms[0], 257))
    found = model_config(config, config.arms[1], 257)
    assert found.matched and abs(parameter_count(found) - target) <= 0.01 * target
    network = found.build().network
    assert parameter_count(found) == sum(one.numel() for one in network.parameters())
    own = network.config
    assert (own.hidden_size, own.num_hidden_layers, own.num_attention_heads) == (32, 2, 2)
    assert (own.max_position_embeddings, own.vocab_size, own.hidden_dropout) == (1024, 257, 0.1)
    # Overrides win, under either name; what depends on them follows.
    config = experiment(external_arm("gpt2", n_embd=64, num_hidden_layers=1))
    found = model_config(config, config.arms[1], 257)
    assert (found.values["n_embd"], found.values["n_layer"]) == (64, 1) and not found.matched
    config = experiment(external_arm("qwen3", num_attention_heads=4))
    values = model_config(config, config.arms[1], 257).values
    assert (values["num_key_value_heads"], values["head_dim"]) == (4, 8)


def test_an_arm_by_configuration_alone(data: Path, tmp_path: Path, write_config) -> None:
    rows = run_stages(write_config(experiment(external_arm("llama"))), data, tmp_path)
    everything = [row for stage in rows.values() for row in stage]
    assert not [row.error for row in everything if row.error]
    assert {(row.mixer, row.provider) for row in everything} == {
        ("transformers:llama", "transformers")
    }
    (bits,) = [row for row in rows["evaluate"] if row.metric == "bits_per_byte"]
    assert bits.kv_fraction == 1.0 and 7 < bits.value < 9
    measured = {row.metric for row in rows["measure"]}
    assert {"prefill_ms", "decode_ms", "training_step_ms", "kv_bytes"} <= measured
    assert "declared_bytes" not in measured
    model, theirs = load_model(tmp_path / "checkpoint"), tmp_path / "checkpoint"
    network = AutoModelForCausalLM.from_pretrained(theirs, local_files_only=True)
    tokens_BT = torch.arange(8)[None]
    torch.testing.assert_close(model(tokens_BT).logits_BTV, network(tokens_BT).logits)
    description = json.loads((tmp_path / "checkpoint" / "model.json").read_text())
    assert description["facts"]["parameters_matched"] is True
    assert main(["export", str(theirs), str(tmp_path / "hf")]) == 2
    # What an attempt that failed leaves beside older weights is not taken for a foreign model.
    write_failure(theirs, "diverged")
    with pytest.raises(MissingDataError, match="holds no model: training failed: diverged"):
        load_model(theirs)


def test_a_library_that_is_missing_is_an_error_row(
    data: Path, tmp_path: Path, write_config, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.models", None)
    config = experiment(external_arm("gla", library="fla"))
    path = write_config(config)
    rows = run_stages(path, data, tmp_path)
    for row in [*rows["train"], *rows["evaluate"], *rows["measure"]]:
        assert row.value is None and "need flash-linear-attention (pip install" in row.error
        assert row.mixer == "fla:gla"
    assert {"bits_per_byte", "accuracy"} <= {row.metric for row in rows["evaluate"]}
    assert {"prefill_ms", "training_step_ms"} <= {row.metric for row in rows["measure"]}
    assert "arm 'other' failed: models of library 'fla' need" in capsys.readouterr().err
    assert "need flash-linear-attention" in format_plan(Plan(config, cores=2))
    # Another machine may have it, so the configuration is valid.
    assert main(["config", "check", path]) == 0
    assert "arm 'other' cannot run here: models of library 'fla'" in capsys.readouterr().err
    # A command that is run alone ends with the message.
    common = ["--arm", "other", "--seed", "0", "--data", str(data)]
    assert main(["train", path, *common, "--out", str(tmp_path / "alone")]) == 2
    message = capsys.readouterr().err
    assert "need flash-linear-attention" in message and message.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", ["gla", "delta_net", "gated_deltanet"])
def test_flash_linear_attention(data: Path, tmp_path: Path, write_config, model_type: str) -> None:
    pytest.importorskip("fla.models", reason="needs flash-linear-attention")
    model = {"layers": 2, "width": 128, "heads": 2, "max_positions": 1024}
    config = experiment(external_arm(model_type, library="fla"), model=model)
    rows = run_stages(write_config(config), data, tmp_path)
    errors = [row.error for stage in rows.values() for row in stage if row.error]
    # The library refuses its own backward on some versions of Triton.
    if errors and all("Please upgrade Triton" in error for error in errors):
        pytest.skip(errors[0])
    assert not errors
    held = [row.value for row in rows["measure"] if row.metric == "recurrent_bytes"]
    assert held and len(set(held)) == 1


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (external_arm("lama"), "unknown model_type of library 'transformers' 'lama'.*llama"),
        (
            external_arm("llama", hiden_size=3),
            "unknown key of a 'llama' configuration.*hidden_size",
        ),
        (external_arm("llama", hidden_size="wide"), "a 'llama' configuration refuses"),
        (external_arm("llama", num_attention_heads=3, num_key_value_heads=3), "'llama'"),
    ],
)
def test_bad_values_are_refused(arm: dict, message: str) -> None:
    config = experiment(arm)
    with pytest.raises(ConfigError, match=message):
        check_external(config.arms[1])
        model_config(config, config.arms[1], 257).build()


def test_an_arm_is_of_one_kind() -> None:
    for arm, message in (
        ({"name": "a"}, "give one of mixer, external, checkpoint; received none"),
        ({"name": "a", "mixer": "ham", "checkpoint": "x"}, "received mixer and checkpoint"),
        ({"name": "a", "checkpoint": "x", "options": {"b": 1}}, "go with a mixer, not with check"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({"name": "x", "arms": [arm]})


def test_code_of_external_models_counts_for_them_alone() -> None:
    own, other = experiment(external_arm("llama")).arms
    for stage in ("train", "evaluate", "measure"):
        modules = {
            arm.name: reachable_modules(stage_modules(stage, arm.code), repository_root())
            for arm in (own, other)
        }
        assert "ham.external.model" in modules["other"]
        assert "ham.external.model" not in modules["own"]
