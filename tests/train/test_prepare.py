"""Preparing data: once, from the corpus or a data set, or a clear error."""

from __future__ import annotations

import json

import pytest

from ham.cli import main
from ham.config import DataConfig, HubDataConfig
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import read_json
from ham.train import corpus, prepare
from ham.train.corpus_build import write_corpus
from ham.train.hub import split_of_text
from ham.train.prepare import prepare_data
from ham.train.shards import TokenShard
from ham.train.tokenizer import load_tokenizer

SPLITS = corpus.SPLITS


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """Replace the corpus by 40 short documents."""
    made = [
        corpus.Document(
            f"part/{i:02d}", "part", "T", f"Text number {i}. " * 30 + "é\n", SPLITS[i % 4]
        )
        for i in range(40)
    ]
    file = tmp_path / "corpus" / "small.jsonl.xz"
    write_corpus(made, file)
    load = corpus.load_documents
    monkeypatch.setattr(corpus, "CORPUS_FILE", file)
    monkeypatch.setattr(corpus, "load_documents", lambda split=None: load(split, file))
    return made


@pytest.fixture
def data_set(tmp_path):
    """A local data set: 600 texts in two files, every tenth a duplicate, some empty."""
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [f"Page {i - i % 10 if i % 10 == 9 else i} says something. " * 5 for i in range(600)]
    for part in range(2):
        lines = [json.dumps({"text": text, "url": "u"}) for text in texts[part * 300 :][:300]]
        lines.append(json.dumps({"text": "  ", "url": "u"}))
        (folder / f"part{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def hub_config(folder, tokenizer="byte", **changes) -> DataConfig:
    hub = {"dataset": str(folder), "train_tokens": 20_000, "held_out_tokens": 1_500, **changes}
    return DataConfig(source="hub", hub=HubDataConfig(**hub), tokenizer=tokenizer)


def texts_of(folder, tokenizer="byte") -> dict[str, list[str]]:
    loaded = load_tokenizer(tokenizer, folder)
    return {
        split: [
            loaded.decode(tokens)
            for tokens in TokenShard.open(folder / f"{split}.tokens").documents()
        ]
        for split in SPLITS
    }


def modified(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe-4096"])
def test_shards_hold_the_documents_of_their_split(small_corpus, tmp_path, tokenizer) -> None:
    folder = tmp_path / "data"
    prepare_data(DataConfig(tokenizer=tokenizer), folder)
    for split, texts in texts_of(folder, tokenizer).items():
        assert texts == [one.text for one in small_corpus if one.split == split]
        byte_count = TokenShard.open(folder / f"{split}.tokens").byte_count
        assert byte_count == sum(len(text.encode()) for text in texts)
    summary = read_json(folder / "data.json")
    assert summary["tokenizer"]["name"] == tokenizer
    assert summary["splits"]["test"] == read_json(folder / "test.json")


def test_bpe_is_trained_on_the_training_split_alone(small_corpus, tmp_path, monkeypatch) -> None:
    asked = []
    train = prepare.train_bpe
    monkeypatch.setattr(
        prepare, "train_bpe", lambda texts: train(asked.append(t) or t for t in texts)
    )
    prepare_data(DataConfig(tokenizer="bpe-4096"), tmp_path / "data")
    assert asked == [one.text for one in small_corpus if one.split == "train"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe-4096"])
def test_a_second_call_does_nothing(small_corpus, tmp_path, tokenizer) -> None:
    config = DataConfig(tokenizer=tokenizer)
    prepare_data(config, tmp_path / "data")
    before = modified(tmp_path / "data")
    prepare_data(
        DataConfig(tokenizer=tokenizer, context=64, recall_fraction=0.5), tmp_path / "data"
    )
    assert modified(tmp_path / "data") == before


@pytest.mark.parametrize("damaged", ["train.tokens", "test.json", "tokenizer.json", "data.json"])
@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_damage_is_repaired(small_corpus, tmp_path, damaged, how) -> None:
    config = DataConfig(tokenizer="bpe-4096")
    folder = tmp_path / "data"
    prepare_data(config, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if how == "removed":
        (folder / damaged).unlink()
    else:
        (folder / damaged).write_bytes(before[damaged][:-3])
    prepare_data(config, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_configuration_replaces_the_data(small_corpus, tmp_path) -> None:
    folder = tmp_path / "data"
    prepare_data(DataConfig(tokenizer="bpe-4096"), folder)
    prepare_data(DataConfig(tokenizer="byte"), folder)
    assert TokenShard.open(folder / "train.tokens").tokenizer_name == "byte"
    assert read_json(folder / "data.json")["made_from"]["tokenizer"] == "byte"


def test_a_damaged_corpus_leaves_earlier_data_untouched(small_corpus, tmp_path) -> None:
    folder = tmp_path / "data"
    prepare_data(DataConfig(), folder)
    before = modified(folder)
    file = corpus.CORPUS_FILE
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match="truncated"):
        prepare_data(DataConfig(tokenizer="bpe-4096"), folder)
    assert modified(folder) == before


@pytest.mark.parametrize("tokenizer", ["byte", "bpe-4096"])
def test_a_data_set_is_split_by_documents(data_set, tmp_path, tokenizer) -> None:
    wanted = {"train_tokens": 3_000, "held_out_tokens": 300}
    config = hub_config(data_set, tokenizer, **wanted)
    prepare_data(config, tmp_path / "a")
    prepare_data(config, tmp_path / "b")
    texts = texts_of(tmp_path / "a", tokenizer)
    assert texts == texts_of(tmp_path / "b", tokenizer)
    sets = {split: set(found) for split, found in texts.items()}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values()))
    for split in SPLITS:
        count = len(TokenShard.open(tmp_path / "a" / f"{split}.tokens").tokens)
        least = wanted["train_tokens"] if split == "train" else wanted["held_out_tokens"]
        longest = 200
        assert least <= count < least + longest
    assert all(text.strip() for found in texts.values() for text in found)


def test_equal_texts_are_in_one_split(data_set) -> None:
    hub = hub_config(data_set).hub
    lines = [
        json.loads(line)["text"]
        for path in sorted(data_set.iterdir())
        for line in path.read_text().splitlines()
    ]
    shares = {split: 0 for split in SPLITS}
    for text in lines:
        shares[split_of_text(text, hub)] += 1
    assert len(set(lines)) < len(lines)
    for split in ("calibration", "validation", "test"):
        assert 0.02 < shares[split] / len(lines) < 0.15


def test_a_data_set_that_is_too_small_is_refused(data_set, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match=r"ended before every split was full: asked for .*9000000"
    ):
        prepare_data(hub_config(data_set, train_tokens=9_000_000), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_wrong_names_inside_a_data_set(data_set, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"text_field 'body' .*known: text, url"):
        prepare_data(hub_config(data_set, text_field="body"), tmp_path / "data")
    with pytest.raises(ConfigError, match=r"split 'dev'"):
        prepare_data(hub_config(data_set, split="dev"), tmp_path / "data")


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingDataError, match=r"cannot read data set 'no/such-set'.*network"):
        prepare_data(hub_config("no/such-set"), tmp_path / "data")


def test_a_damaged_file_inside_a_data_set(data_set, tmp_path) -> None:
    (data_set / "part0.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(MissingDataError, match="cannot read data set"):
        prepare_data(hub_config(data_set), tmp_path / "data")


def test_prepare_command(small_corpus, tmp_path, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("name: small\narms: [{name: a, mixer: transformer}]\n")
    arguments = ["prepare", str(config), "--out", str(tmp_path / "data")]
    assert main([*arguments, "--set", "data.tokenizer=bpe-4096"]) == 0
    out = capsys.readouterr().out
    assert "train" in out and "10 documents" in out
    assert main([*arguments, "--set", "data.tokenizer=words"]) == 2
    assert "known: byte, bpe-4096, hub:NAME" in capsys.readouterr().err
