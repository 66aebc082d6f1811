"""Arms that read the checkpoint of another one: what a configuration may say, and all jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ham import workflow as wf
from ham.cli import main
from ham.config_files import parse_config
from ham.conformance import small_model
from ham.conformance.subject import random_tokens
from ham.errors import ConfigError
from ham.matching.bench import Bench
from ham.matching.budgets import match_rival
from ham.model.arm import load_arm
from ham.model.checkpoint import load_model, save_model
from ham.plan import Plan
from ham.report.rows import read_rows

TRANSFORMER = {"name": "transformer", "mixer": "transformer"}
SNAPKV = {"policy": "snapkv", "fraction": 0.25}
EVICTED = {"name": "evicted", "checkpoint_of": "transformer", "eviction": SNAPKV}
PARTS: dict[str, Any] = {
    "language_modelling": {"tokens": 256, "contexts": [128], "position_bins": 2},
    "lm_eval": None,
    "needle": {"tasks": ["niah_single_1"], "lengths": [488], "depths": [0.5], "samples": 1},
    "recall": None,
    "dial": {"fractions": [0.5], "tokens": 256},
}


def values(*arms: dict, **sections: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "device": "cpu",
        "data": {"context": 128},
        "arms": list(arms) or [TRANSFORMER, EVICTED],
        "evaluate": PARTS,
        "measure": {"contexts": [96], "decode_tokens": 2, "repeats": 1, "warmup": 0},
        **sections,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eviction": {"policy": "h2o", "fraction": 0.5}}, "policy: Input should be 'random', "),
        ({"eviction": {"policy": "norm"}}, "either fraction or tokens; received fraction None"),
        ({"eviction": {**SNAPKV, "tokens": 64}}, "either fraction or tokens; .*0.25, tokens 64"),
        ({"eviction": {**SNAPKV, "fraction": 0}}, "eviction.fraction: .*greater than 0"),
        ({"eviction": {**SNAPKV, "sinks": 4}}, "sinks 4 is an option of policy 'streaming', not"),
        ({"eviction": {**SNAPKV, "kernel": 6}}, "kernel 6 is even; legal: 1, 3, 5"),
        ({"eviction": {**SNAPKV, "observation": 17}}, r"17 is more than the .*legal: 1..16"),
        (
            {"eviction": {"policy": "streaming", "tokens": 4}},
            "tokens 4 leaves no room beside the 4 .*at least 5",
        ),
        ({"eviction": {**SNAPKV, "windw": 4}}, "eviction.windw: unknown key; known: fraction"),
        ({"eviction": None}, "checkpoint_of and eviction go together; .*and no eviction"),
        ({"checkpoint_of": None}, "checkpoint_of and eviction go together; .*None and eviction"),
        ({"checkpoint_of": "missing"}, "'missing' is not a trained arm; known: transformer, ham"),
        ({"checkpoint_of": "evicted"}, "'evicted' is not a trained arm"),
        ({"checkpoint_of": "ham"}, "needs a plain transformer; arm 'ham' has mixer 'ham'; legal"),
        ({"checkpoint_of": "mixed"}, "arm 'mixed' has mixer 'transformer' in chosen layers"),
        (
            {"mixer": "transformer"},
            "mixer, options, placement and steps are those of arm 'transformer'",
        ),
        ({"options": {"kv_heads": 1}}, "legal beside checkpoint_of: name and eviction"),
    ],
)
def test_faults_name_key_value_and_legal_set(change: dict, message: str) -> None:
    between = {"every": 2, "between": {"mixer": "mamba2"}}
    mixed = {"name": "mixed", "mixer": "transformer", "placement": between}
    arms = [TRANSFORMER, {"name": "ham", "mixer": "ham"}, mixed, {**EVICTED, **change}]
    with pytest.raises(ConfigError, match=message):
        parse_config(values(*arms))


def test_an_arm_without_mixer_is_refused() -> None:
    with pytest.raises(ConfigError, match="arm 'x': mixer is missing"):
        parse_config(values({"name": "x"}))


def test_a_resolved_configuration_is_a_configuration() -> None:
    config = parse_config(values())
    assert parse_config(config.model_dump(mode="json")) == config


def test_jobs_use_the_checkpoint_of_the_same_seed_and_train_nothing() -> None:
    config = wf.parse_workflow_config(values(EVICTED, TRANSFORMER, seeds=[0, 1]))
    folder = "results/runs/test/models"
    for arm in ("evicted", "transformer"):
        found = wf.checkpoint_folder(config, arm, 1)
        assert found == f"{folder}/transformer/seed1/checkpoint"
    rows = wf.rows_files(config)
    assert [name for name in rows if "train" in name] == [
        f"{folder}/transformer/seed{seed}/train.rows.jsonl" for seed in (0, 1)
    ]
    assert f"{folder}/evicted/seed1/evaluate.rows.jsonl" in rows
    assert f"{folder}/evicted/seed0/measure.rows.jsonl" in rows
    assert config.reference.name == "transformer"


def test_the_plan_trains_and_stores_the_weights_once() -> None:
    alone, both = (Plan(parse_config(values(*arms)), 2) for arms in ((TRANSFORMER,), ()))
    stages = {stage.stage: stage for stage in both.stages}
    assert (stages["train"].jobs, stages["evaluate"].jobs, stages["measure"].jobs) == (1, 2, 2)
    assert both.checkpoint_bytes == alone.checkpoint_bytes
    assert both.state_bytes == alone.state_bytes
    whole, evicted = both.arms
    assert (whole.parameters, whole.mlp_width) == (evicted.parameters, evicted.mlp_width)
    assert evicted.train_flops == 0 and evicted.measure_flops < whole.measure_flops / 2
    assert evicted.cache_bytes < 0.5 * whole.cache_bytes


def test_ham_match_sets_the_tokens_that_stay() -> None:
    ham = {"name": "ham", "mixer": "ham", "options": {"target": 0.5}}
    config = parse_config(values(ham, TRANSFORMER, EVICTED))
    parameters, held = match_rival(Bench(config, "ham"), config.arm("evicted"), [512])
    assert parameters.matched and held.matched and held.knob == "eviction.tokens"
    layers, heads, width = 2, 4, 128
    slot = 2 * width * 4 + heads * (4 + 4)
    assert held.got == layers * (held.value + 16) * slot
    assert held.arm.eviction.tokens == held.value and held.arm.eviction.fraction is None


@pytest.fixture
def run(tmp_path: Path, data_folder: Path) -> Callable[..., int]:
    """Run `ham evaluate` or `ham measure` on the checkpoint of a tiny transformer."""
    save_model(tmp_path / "checkpoint", small_model("transformer"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values()))

    def command(name: str, arm: str = "evicted", out: str = "--rows") -> int:
        arguments = [name, tmp_path / "config.yaml", "--arm", arm, "--seed", "0"]
        arguments += ["--data", data_folder, out, tmp_path / f"{name}.{arm}.rows.jsonl"]
        if name != "train":
            arguments += ["--checkpoint", tmp_path / "checkpoint"]
        return main([str(argument) for argument in arguments])

    return command


def test_an_evicted_arm_is_evaluated_as_any_other(run, tmp_path: Path) -> None:
    rows = {}
    for arm in ("evicted", "transformer"):
        assert run("evaluate", arm) == 0
        rows[arm] = read_rows(tmp_path / f"evaluate.{arm}.rows.jsonl")
        assert not [row.error for row in rows[arm] if row.error]
    found = {row.metric: row for row in rows["evicted"] if row.experiment == "language_modelling"}
    assert found["bits_per_byte"].kv_fraction == 0.25
    assert {(row.model, row.mixer, row.seed) for row in rows["evicted"]} == {
        ("evicted", "transformer_evicted", 0)
    }
    whole = {row.metric: row for row in rows["transformer"] if row.x_value == 128}
    assert whole["bits_per_byte"].kv_fraction == 1.0
    assert found["bits_per_byte"].parameters == whole["bits_per_byte"].parameters
    assert found["bits_per_byte"].value != whole["bits_per_byte"].value
    (needle,) = [row for row in rows["evicted"] if row.metric == "answer_loss_nats"]
    # 488 tokens end between two evictions: 120 of 480, and the 8 read since.
    assert needle.kv_fraction == pytest.approx((120 + 8) / 488)


def test_an_evicted_arm_is_measured_without_a_training_step(run, tmp_path: Path) -> None:
    assert run("measure") == 0
    rows = read_rows(tmp_path / "measure.evicted.rows.jsonl")
    assert {row.task for row in rows} == {"prefill", "decode", "kv_growth"}
    found = {row.metric: row.value for row in rows if (row.task, row.x_value) == ("decode", 96)}
    assert found["cache_bytes_allocated"] == found["declared_bytes"]
    # Two layers; 24 tokens of 96 and room for 16: keys and values, then a position and an
    # attention in each of two heads.
    assert found["kv_bytes"] == 2 * (24 + 16) * 2 * 32 * 4
    assert found["positions_bytes"] == 2 * (24 + 16) * 2 * (4 + 4)


def test_an_evicted_arm_is_not_trained(run, capsys: pytest.CaptureFixture) -> None:
    assert run("train", out="--out") == 2
    assert (
        "arm 'evicted' is not trained: it reads the checkpoint of 'transf"
        in capsys.readouterr().err
    )


def test_a_checkpoint_of_another_arm_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "ham", small_model("ham"))
    config = parse_config(values())
    with pytest.raises(ConfigError, match="with arm 'ham'; the configuration asks for 'transf"):
        load_arm(config, config.arm("evicted"), tmp_path / "ham", torch.device("cpu"))


def test_the_weights_are_those_of_the_transformer(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", small_model("transformer"))
    config = parse_config(values())
    loaded = load_arm(config, config.arm("evicted"), tmp_path / "checkpoint", torch.device("cpu"))
    source = load_model(tmp_path / "checkpoint")
    assert loaded.config.arm == "evicted" and not loaded.training
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    tokens_BT = random_tokens(1, 100)
    different = (loaded(tokens_BT).logits_BTV != source(tokens_BT).logits_BTV).any(-1)[0]
    # The first eviction, after 16 tokens, leaves the 16 that were observed.
    assert not different[:32].any() and different[32:].any()


def test_an_inspection_shows_what_is_held_at_the_end(
    run, tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["inspect", tmp_path / "checkpoint", "--sample", data_folder / "test.tokens"]
    arguments += ["--max-tokens", 96, "--rows", tmp_path / "inspect.rows.jsonl", "--top", 1]
    named = [*arguments, "--config", tmp_path / "config.yaml", "--arm", "evicted"]
    assert main([str(one) for one in named]) == 0
    assert "share of the evictions after it that a token survived" in capsys.readouterr().out
    rows = [
        row
        for row in read_rows(tmp_path / "inspect.rows.jsonl")
        if row.labels["class"] == "all tokens"
    ]
    assert [(row.model, row.value) for row in rows] == [("evicted", 0.25)] * 2
    for extra, message in (
        ([*named, "--agreement"], "arm 'evicted' evicts by a schedule"),
        ([*named, "--layer", 5], "--layer 5 is not a layer that routes; legal: 0, 1"),
        ([*arguments, "--arm", "evicted"], "--config and --arm go together"),
        (arguments, "routes no tokens"),
    ):
        assert main([str(one) for one in extra]) == 2
        assert message in capsys.readouterr().err


def test_configurations_load_without_torch() -> None:
    import subprocess

    code = "import sys, ham.config, ham.workflow; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
