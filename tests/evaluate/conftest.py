"""A small data folder and subjects made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import prose, write_shard

from ham.config_files import parse_config
from ham.evaluate.part import Subject
from ham.train.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of all splits: ten documents of 700 bytes each."""
    folder = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(("train", "calibration", "validation", "test")):
        rng = np.random.default_rng(seed)
        write_shard(folder / f"{split}.tokens", [prose(rng, 700) for _ in range(10)])
    return folder


@pytest.fixture
def make_subject(data_folder: Path) -> Callable[..., Subject]:
    """`make_subject(model, evaluate={...}, data={...})`: a subject on the small data folder."""

    def make(
        model: Any, evaluate: dict[str, Any], folder: Path = data_folder, **sections: Any
    ) -> Subject:
        parts = dict.fromkeys(("language_modelling", "lm_eval", "needle", "recall", "dial"))
        values = {
            "name": "test",
            "arms": [{"name": "ham", "mixer": "ham"}],
            "data": {"context": 128},
            "evaluate": {**parts, **evaluate},
            **sections,
        }
        return Subject(parse_config(values), model, ByteTokenizer(), folder)

    return make
