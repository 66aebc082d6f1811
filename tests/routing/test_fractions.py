"""After the freeze every score routes the share it was asked for, on text it never saw.

The bounds are those that the project states: the mean over layers within 0.01 of the target, each
layer within 0.03 unless all layers share one threshold. Real text, a tiny model, 60 steps.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ham.config import Config
from ham.config_files import parse_config
from ham.job import Job
from ham.model.calibration import thresholds
from ham.model.checkpoint import load_model, read_description
from ham.train.loop import Trainer
from ham.train.prepare import prepare_data

TARGET = 0.25
ARMS = {
    "cosine": {"score": "cosine"},
    "committed": {"score": "committed"},
    "l2": {"score": "l2"},
    "post-update": {"score": "post_update"},
    "learned": {"score": "learned"},
    "random": {"score": "random"},
    "periodic": {"score": "periodic"},
    "lexical": {"score": "lexical"},
    "per-head": {"score": "cosine", "reduction": "per_head"},
    "global": {"score": "committed", "scope": "global"},
}
CONFIG = {
    "name": "fractions",
    "device": "cpu",
    "data": {"context": 128},
    "model": {
        "layers": 2,
        "width": 32,
        "heads": 2,
        "max_positions": 256,
        "match_parameters": False,
    },
    "arms": [
        {"name": name, "mixer": "ham", "options": {"target": TARGET, "gain": 0.5, **options}}
        for name, options in ARMS.items()
    ],
    "train": {
        "steps": 60,
        "batch_size": 8,
        "learning_rate": 0.003,
        "validation_every": 1000,
        "validation_batches": 64,
        "calibration_batches": 32,
    },
    "evaluate": {"language_modelling": None, "needle": None},
    "measure": None,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config = parse_config(CONFIG)
    folder = tmp_path_factory.mktemp("fractions")
    prepare_data(config.data, folder / "data")
    return config, folder


def job_of(config: Config, arm: str) -> Job:
    manifest = {"gpus": [], "manifest_id": "0" * 12}
    return Job("train", config, config.arm(arm), 0, torch.device("cpu"), "0", "0", manifest)


@pytest.mark.parametrize("arm", ARMS)
def test_the_validation_share_after_training_is_the_target(prepared, arm) -> None:
    config, folder = prepared
    trainer = Trainer(job_of(config, arm), folder / "data", folder / "state")
    writer = trainer.run(folder / arm)
    checkpoint = folder / arm / "checkpoint"
    facts = read_description(checkpoint)["facts"]["routing"]
    shares = facts["validation_fractions"]
    assert abs(sum(shares) / len(shares) - TARGET) <= 0.01, shares
    if arm != "global":
        assert max(abs(share - TARGET) for share in shares) <= 0.03, shares
    else:
        assert facts["thresholds"][0] == facts["thresholds"][1]

    assert facts["layers"] == [0, 1] and facts["targets"] == [TARGET] * 2
    assert facts["thresholds"] == thresholds(load_model(checkpoint))
    assert abs(sum(facts["calibration_fractions"]) / 2 - TARGET) <= 0.005
    logged = {
        row.labels["layer"]: row.value
        for row in writer.rows
        if (row.metric, row.task) == ("kv_fraction", "validation")
    }
    assert logged == dict(enumerate(shares))
    assert all(math.isfinite(value) for value in shares)


def test_a_bad_score_in_training_stops_with_the_layer_and_the_count(prepared) -> None:
    from ham.errors import RoutingError

    config, folder = prepared
    trainer = Trainer(job_of(config, "random"), folder / "data", folder / "bad-state")
    trainer.model.blocks[1].mixer.controller.count_bad(torch.tensor([0.0, math.nan]))
    with pytest.raises(RoutingError, match=r"1 in layer 1 \(score random\)"):
        trainer.run(folder / "bad")
    assert not (folder / "bad").exists()
