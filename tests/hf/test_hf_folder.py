"""Exporting, reading back with and without transformers, and every fault a folder can have."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ham.cli import main
from ham.errors import ConfigError, CorruptFileError, DiskFullError, MissingDataError
from ham.hf import HamForCausalLM, export, folder, load, requirement
from ham.model.checkpoint import load_model, read_description, save_model
from ham.train.tokenizer import ByteTokenizer, train_bpe

TOKENS_BT = torch.arange(40).view(2, 20)


def edit_config(path: Path, **changes) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **changes}))


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_export_and_back(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The commands of this project work on what `ham export` wrote."""
    model = tiny_model("ham")
    save_model(tmp_path / "checkpoint", model, facts={"steps": 7})
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out" / "hf")]) == 0
    names = {path.name for path in (tmp_path / "out" / "hf").iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert os.listdir(tmp_path / "out") == ["hf"], "nothing is left beside it"
    assert "model.safetensors" in capsys.readouterr().out
    ours = load_model(tmp_path / "out" / "hf")
    expected = model(TOKENS_BT).logits_BTV
    assert torch.equal(ours(TOKENS_BT).logits_BTV, expected)
    assert torch.equal(load(tmp_path / "out" / "hf")(TOKENS_BT).logits, expected)
    assert read_description(tmp_path / "out" / "hf")["facts"] == {"steps": 7}
    texts = []
    for place in (tmp_path / "checkpoint", tmp_path / "out" / "hf"):
        assert main(["generate", str(place), "--prompt", "whale", "--tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_export_carries_a_trained_tokenizer(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("gated_delta_rule")
    tokenizer = train_bpe(["the whale and the sea " * 9], vocabulary_size=257)
    model.config = dataclasses.replace(model.config, tokenizer=tokenizer.name)
    tokenizer.save(tmp_path / "data")
    save_model(tmp_path / "checkpoint", model, tokenizer_folder=tmp_path / "data")
    export(tmp_path / "checkpoint", tmp_path / "hf")
    fast = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert fast.encode("the whale") == tokenizer.encode("the whale")
    assert main(["generate", str(tmp_path / "hf"), "--prompt", "the", "--tokens", "2"]) == 0


def test_export_leaves_what_is_there(tiny_model, tmp_path: Path, monkeypatch) -> None:
    model, target = tiny_model("gated_delta_rule"), tmp_path / "hf"
    target.mkdir()
    folder.save(model, ByteTokenizer(), target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists already; legal: a new or an empty folder"):
        folder.save(tiny_model("ham"), ByteTokenizer(), target)
    assert (target / "model.safetensors").read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HamForCausalLM, "save_pretrained", full)
    with pytest.raises(DiskFullError):
        folder.save(model, ByteTokenizer(), tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickles_are_never_loaded(saved, tmp_path: Path, name: str) -> None:
    path, sprung = saved("gated_delta_rule"), tmp_path / "sprung"
    (path / name).write_bytes(pickle.dumps(Trap(sprung)))
    AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    for loader in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(ConfigError, match=rf"holds weights in {name} only: pickles"):
            loader(path)
    with pytest.raises(MissingDataError):
        load_model(path)
    assert not sprung.exists()


def test_no_option_or_key_opens_a_pickle(saved, tmp_path: Path) -> None:
    path, sprung = saved("gated_delta_rule"), tmp_path / "sprung"
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ConfigError, match=r"adapter_model\.bin is a pickle"):
        AutoModelForCausalLM.from_pretrained(path)
    edit_config(path, transformers_weights="adapter_model.bin")
    with pytest.raises(ConfigError, match="sets transformers_weights to 'adapter_model"):
        AutoModelForCausalLM.from_pretrained(path)
    for name in ("use_safetensors", "weights_only"):
        with pytest.raises(ConfigError, match=f"{name}=False would load a pickle"):
            HamForCausalLM.from_pretrained(path, **{name: False})
    with pytest.raises(ConfigError, match="is a file; give the folder"):
        HamForCausalLM.from_pretrained(path / "adapter_model.bin")
    assert not sprung.exists()


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def scramble(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 5000)


FAULTS = {
    "truncated": (cut, CorruptFileError, "not a complete safetensors file"),
    "no safetensors": (scramble, CorruptFileError, "not a complete safetensors file"),
    "a weight missing": (
        lambda path: edit_weights(path, lambda tensors: tensors.pop("decoder.embedding.weight")),
        CorruptFileError,
        r"do not fit its config\.json: decoder\.embedding\.weight is missing",
    ),
    "a weight too many": (
        lambda path: edit_weights(path, lambda tensors: tensors.update(head=torch.zeros(1))),
        CorruptFileError,
        "head is not part of it",
    ),
    "another shape": (
        lambda path: edit_weights(
            path, lambda tensors: tensors.update({"decoder.final_norm.weight": torch.zeros(5)})
        ),
        CorruptFileError,
        r"decoder\.final_norm\.weight has shape \(5,\) instead of \(32,\)",
    ),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        MissingDataError,
        r"config\.json does not exist",
    ),
    "config no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        CorruptFileError,
        "not valid JSON",
    ),
    "another model": (
        lambda path: edit_config(path, model_type="llama"),
        ConfigError,
        "describes a model of type 'llama'",
    ),
    "no decoder": (
        lambda path: edit_config(path, ham=None),
        ConfigError,
        "legal: type 'ham-bench' and its configuration under 'ham'",
    ),
    "unknown key": (
        lambda path: edit_config(path, ham={"colour": "red"}),
        ConfigError,
        "not a model configuration: .*colour",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        MissingDataError,
        r"model\.safetensors does not exist",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_folders_have_one_message(saved, fault: str) -> None:
    path = saved("gated_delta_rule")
    change, error, message = FAULTS[fault]
    change(path)
    with pytest.raises(error, match=message):
        load(path)
    with pytest.raises((error, CorruptFileError)):
        load_model(path)


def test_sharded_weights(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("ham")
    HamForCausalLM.from_decoder(model).save_pretrained(tmp_path, max_shard_size=20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(load(tmp_path)(TOKENS_BT).logits, model(TOKENS_BT).logits_BTV)
    shards[1].unlink()
    with pytest.raises(MissingDataError, match="names files that are not there"):
        load(tmp_path)


def test_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirement, "OLDEST_TRANSFORMERS", (99, 1))
    with pytest.raises(ConfigError, match=r"transformers 5\.\S+ is installed; 99\.1 or newer"):
        requirement.require_transformers()
