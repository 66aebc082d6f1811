"""Studies of a configuration: their parts, commands and published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ham.batch.studies import SHIPPED, published_study_files, study_parts
from ham.cli import build_parser
from ham.config_files import load_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.fingerprint import repository_root

H100 = repository_root() / "workflow/config/h100.yaml"


def test_parts_share_no_learning_rate_and_cover_the_study_once():
    parts = study_parts(load_config(H100))
    assert [part.name for part in parts] == ["random-d64", "blank-d64", "random-d128", "blank-d128"]
    assert len({part.hash for part in parts}) == len(parts)
    study = parts[0].study
    for width in study.widths:
        tasks = [task for part in parts if part.width == width for task in part.tasks]
        assert sorted(tasks) == sorted(map(str, study.reported_tasks))
    for part in parts:
        sources = {task.rates_from or str(task) for task in part.chosen.reported_tasks}
        assert [str(task) for task in part.chosen.tuned_tasks] == list(sources)


def test_commands_are_those_that_ham_understands():
    for part in study_parts(load_config(H100)):
        parsed = build_parser().parse_args(part.command)
        assert (parsed.tasks, parsed.widths) == (list(part.tasks), [part.width])
        assert (parsed.device, parsed.keep_going) == ("cuda", True)
        assert parsed.rows == Path(f"results/runs/h100/studies/mqar/{part.name}")


def test_the_shipped_study_belongs_to_configurations_without_one(tmp_path: Path):
    config = load_config(H100.with_name("paper.yaml"))
    assert {part.file for part in study_parts(config)} == {str(repository_root() / SHIPPED)}
    with pytest.raises(MissingDataError, match=r"nowhere\.yaml"):
        study_parts(load_config(H100, ["workflow.studies=[nowhere.yaml]"]))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"name": "wrong"}))
    with pytest.raises(ConfigError, match="learning_rates"):
        study_parts(load_config(H100, [f"workflow.studies=[{wrong}]"]))


def test_the_study_of_the_demo_is_one_process_with_three_seeds():
    (part,) = study_parts(load_config(H100.with_name("demo.yaml")))
    assert part.rows == "results/runs/demo/studies/mqar-demo/blank-d32"
    assert part.tasks == ("blank", "random") and len(part.study.seeds) == 3
    # One rate for all: no run is spent on choosing it.
    assert len(part.study.learning_rates) == 1
    assert {arm.mixer for arm in part.study.arms} == {"transformer", "gated_delta_rule", "ham"}


def test_runs_of_one_command_are_published_in_one_file():
    folder = "results/runs/x/studies/mqar/blank-d64"
    first, second = (json.dumps({"manifest_id": name}).encode() for name in ("one", "two"))
    files = {}
    for name, manifest in (("a", first), ("b", second), ("c", first)):
        files[f"{folder}/{name}.rows.jsonl"] = f"{name}\n".encode()
        files[f"{folder}/{name}.manifest.json"] = manifest
    assert published_study_files(files) == {
        "mqar-blank-d64-one.rows.jsonl": b"a\nc\n",
        "mqar-blank-d64-one.manifest.json": first,
        "mqar-blank-d64-two.rows.jsonl": b"b\n",
        "mqar-blank-d64-two.manifest.json": second,
    }
    del files[f"{folder}/b.manifest.json"]
    with pytest.raises(CorruptFileError, match=r"b\.rows\.jsonl has no manifest beside it"):
        published_study_files(files)
