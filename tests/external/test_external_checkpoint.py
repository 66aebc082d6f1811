"""Folders of Hugging Face as arms: evaluated in their own tokens, refused with one message."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experiment import checkpoint_arm, experiment, run_stages
from tokenizers import Tokenizer as Library
from transformers import AutoModelForCausalLM

from ham.cli import main
from ham.config_files import parse_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError, UnusableModelError
from ham.model.arm import load_arm
from ham.model.checkpoint import load_model, save_model
from ham.plan import Plan, format_plan
from ham.workflow import checkpoint_folder, rows_files


def test_a_checkpoint_is_evaluated_in_its_own_tokens(
    foreign: Path, data: Path, tmp_path: Path, write_config, texts, capsys
) -> None:
    evaluate = {
        "language_modelling": {"tokens": 100_000, "contexts": [32], "position_bins": 1},
        "needle": {"tasks": ["niah_single_1"], "depths": [0.5], "samples": 1},
        "lm_eval": None,
    }
    config = experiment(checkpoint_arm(foreign), evaluate=evaluate)
    path = write_config(config)
    rows = run_stages(path, data, tmp_path, checkpoint=False)
    (bits,) = [row for row in rows["evaluate"] if row.metric == "bits_per_byte"]
    # By hand: the library's own loss over every window of 32 targets.
    network = AutoModelForCausalLM.from_pretrained(foreign, local_files_only=True)
    library = Library.from_file(str(foreign / "tokenizer.json"))
    nats, size = 0.0, 0
    for text in texts:
        ids = library.encode(text).ids
        for start in range(0, len(ids) - 32, 32):
            window = torch.tensor([ids[start : start + 33]])
            nats += 32 * network(window, labels=window).loss.item()
            size += len(library.decode(window[0, 1:].tolist()).encode())
    assert bits.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert bits.mixer == "transformers:gpt_neox"
    assert not [row for row in rows["evaluate"] if row.metric.startswith("unigram")]
    # 512 tokens are beyond its 64 positions: those cells fail, the others stand.
    failed = {row.experiment for row in rows["evaluate"] if row.error}
    assert "needle" in failed and "language_modelling" not in failed
    assert not [row.error for row in rows["measure"] if row.error]
    train = ["train", path, "--arm", "other", "--seed", "0", "--data", str(data)]
    assert main([*train, "--out", str(tmp_path / "out")]) == 2
    assert "arm 'other' is not trained: it reads the checkpoint" in capsys.readouterr().err
    text = format_plan(Plan(config, cores=2))
    assert "transformers:gpt_neox" in text and "FLOPs by torch's flop counter" in text
    assert main(["generate", str(foreign), "--prompt", "the", "--tokens", "3"]) == 0
    sample = ["--sample", str(data / "test.tokens")]
    assert main(["inspect", str(foreign), *sample]) == 2
    assert "routes no tokens" in capsys.readouterr().err


def test_an_exported_ham_is_such_a_checkpoint(tiny_model, data: Path, tmp_path: Path) -> None:
    model = tiny_model("ham", target=0.5)
    save_model(tmp_path / "checkpoint", model)
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "hf")]) == 0
    config = experiment(checkpoint_arm(tmp_path / "hf"))
    loaded = load_arm(config, config.arms[1], tmp_path / "hf", torch.device("cpu"))
    tokens_BT = torch.arange(30)[None]
    torch.testing.assert_close(loaded(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)
    assert loaded.routes and loaded.config.arm == "other"


def test_the_workflow_knows_what_is_trained() -> None:
    values = {**experiment(checkpoint_arm(Path("p"))).model_dump(), "seeds": [0, 1]}
    config = parse_config(values)
    rows = [row for row in rows_files(config) if "/other/" in row]
    assert [row.rpartition("models/")[2] for row in rows] == [
        "other/seed0/evaluate.rows.jsonl",
        "other/seed0/measure.rows.jsonl",
    ]
    assert checkpoint_folder(config, "other", 0) == "p"
    assert checkpoint_folder(config, "own", 1).endswith("own/seed1/checkpoint")


def copied(foreign: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in foreign.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def only_pickles(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("gpt_neox.final_layer_norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINT_FAULTS = {
    "pickles": (only_pickles, ConfigError, r"weights in pytorch_model\.bin only: pickles"),
    "a key to pickles": (
        lambda folder: edit_config(folder, transformers_weights="pytorch_model.bin"),
        ConfigError,
        "sets transformers_weights",
    ),
    "unknown type": (
        lambda folder: edit_config(folder, model_type="lama"),
        (ConfigError, UnusableModelError),
        "unknown model_type of a checkpoint 'lama'; nearest of .* known: .*llama",
    ),
    "no type": (
        lambda folder: (folder / "config.json").write_text("{}"),
        CorruptFileError,
        "names no model_type",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        MissingDataError,
        r"tokenizer\.json does not exist; `AutoTokenizer",
    ),
    "a weight missing": (
        without_a_weight,
        CorruptFileError,
        r"do not fit its config\.json: gpt_neox\.final_layer_norm\.weight is missing",
    ),
    "other sizes": (
        lambda folder: edit_config(folder, intermediate_size=80),
        CorruptFileError,
        "the weights in .*copy",
    ),
    "another size altogether": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        CorruptFileError,
        r"describes 6,738,415,616 parameters: the files hold",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        CorruptFileError,
        "is not a complete safetensors file",
    ),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_faulty_checkpoint_has_one_message(foreign: Path, tmp_path: Path, fault: str) -> None:
    folder = copied(foreign, tmp_path)
    change, error, message = CHECKPOINT_FAULTS[fault]
    change(folder)
    with pytest.raises(error, match=message):
        load_model(folder)
