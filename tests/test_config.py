from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ham.config_files import json_schema, load_config, parse_config
from ham.errors import ConfigError, MissingDataError
from ham.fingerprint import repository_root

FOLDER = repository_root() / "workflow/config"
OTHER_CLASSES = ("claims", "mqar", "mqar-demo")
SHIPPED = sorted(path.name for path in FOLDER.glob("*.yaml") if path.stem not in OTHER_CLASSES)
MINIMAL = {"name": "x", "arms": [{"name": "a", "mixer": "transformer"}]}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_valid(name: str):
    config = load_config(FOLDER / name).check_registry()
    assert config.name == Path(name).stem


@pytest.mark.parametrize(
    ("name", "tokens"), [("h100.yaml", 80_805_888), ("paper.yaml", 50_000_297_984)]
)
def test_token_budgets_are_the_stated_ones(name: str, tokens: int):
    config = load_config(FOLDER / name)
    assert config.train.steps * config.train.batch_size * config.data.context == tokens


def test_only_the_paper_configuration_says_that_it_was_not_run():
    assert {name: load_config(FOLDER / name).status for name in SHIPPED} == {
        name: "not run" if name == "paper.yaml" else "runnable" for name in SHIPPED
    }


def test_schema_file_is_the_generated_one():
    stored = json.loads((repository_root() / "workflow/schemas/config.schema.json").read_text())
    assert stored == json.loads(json.dumps(json_schema())), "run `ham config schema` again"


def test_schema_forbids_unknown_keys_everywhere():
    schema = json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) > 10
    assert all(one["additionalProperties"] is False for one in objects)


@pytest.mark.parametrize("name", SHIPPED)
def test_schema_accepts_what_the_classes_accept(name: str):
    import jsonschema

    values = yaml.safe_load((FOLDER / name).read_text())
    jsonschema.Draft202012Validator(json_schema()).validate(values)


def test_later_file_overlays_maps_and_replaces_lists(tmp_path: Path):
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text(yaml.safe_dump({**MINIMAL, "train": {"steps": 5, "batch_size": 2}}))
    above.write_text("train: {steps: 7}\nseeds: [3, 4]\n")
    config = load_config([below, above], ["train.batch_size=4"])
    assert (config.train.steps, config.train.batch_size, config.seeds) == (7, 4, [3, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"contxt": 5}}, "data.contxt: unknown key; known: context, hub"),
        (
            {"arms": [{"name": "a", "mixr": "x"}]},
            "arms.0.mixr: unknown key; .*mixer, name",
        ),
        ({"evaluate": {"lm_eval": {"limt": 3}}}, "evaluate.lm_eval.limt: unknown key"),
        ({"train": {"steps": "many"}}, "train.steps: .*integer.*received 'many'"),
        ({"train": {"steps": 1.5}}, r"train.steps: .*integer.*received 1\.5"),
        ({"train": {"warmup_fraction": 2}}, r"legal: 0\.\.1 \(received 2\)"),
        ({"evaluate": {"dial": {"fractions": [0.5, 1.2]}}}, r"fractions\.1: .*legal: 0\.\.1"),
        ({"device": "gpu"}, "'auto', 'cpu' or 'cuda' .received 'gpu'"),
        ({"data": {"tokenizer": "gpt2"}}, "unknown tokenizer 'gpt2'; known: byte, bpe-4096"),
        ({"data": {"context": 9000}}, "data.context asks for 9000 .*max_positions 8192"),
        (
            {"evaluate": {"needle": {"lengths": [9000]}}},
            "task niah_single_1, asks for 9000 .*max_positions 8192",
        ),
        ({"model": {"heads": 5}}, "width 128 is not a multiple of heads 5"),
        ({"train": {"batch_size": 6, "accumulate": 4}}, "6 is not a multiple of accumulate 4"),
        ({"seeds": [1, 1]}, "seeds must differ"),
    ],
)
def test_faults_name_key_value_and_legal_set(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})


@pytest.mark.parametrize("override", ["nonsense", "=3", "train.steps=[1"])
def test_bad_overrides(tmp_path: Path, override: str):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="--set"):
        load_config(path, [override])


@pytest.mark.parametrize(("text", "error"), [("a: [", ConfigError), ("- 1", ConfigError)])
def test_files_that_are_not_a_map(tmp_path: Path, text: str, error: type[Exception]):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(error, match=r"c\.yaml"):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "c.yaml")


def test_missing_file():
    with pytest.raises(MissingDataError, match=r"absent\.yaml"):
        load_config("absent.yaml")
