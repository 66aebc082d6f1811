"""Task names are checked cheaply; task files point to absolute paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ham.errors import ConfigError
from ham.evaluate.tasks import (
    OFFLINE_TASKS,
    REAL_SETS,
    check_task_names,
    known_tasks,
    write_task_folder,
)


def test_every_known_name_is_legal() -> None:
    check_task_names(known_tasks())
    assert len(set(known_tasks())) == len(OFFLINE_TASKS) + len(REAL_SETS) == 17


def test_names_of_the_hub_and_paths_of_files_are_legal(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match=r"mine.yaml does not exist"):
        check_task_names([str(file)])
    file.write_text("")
    check_task_names(["hub:wikitext", "piqa", "hub:piqa", str(file)])
    (tmp_path / "piqa.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"'piqa' and '.*piqa.yaml' have the same name in rows"):
        check_task_names(["piqa", str(tmp_path / "piqa.yaml")])


def test_an_unknown_name_lists_the_legal_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        check_task_names(["held_out_last_word", "helaswag"])
    assert "'helaswag'" in str(caught.value)
    assert all(name in str(caught.value) for name in known_tasks())


def test_checking_names_imports_neither_lm_eval_nor_torch() -> None:
    code = (
        "import sys; from ham.evaluate.tasks import check_task_names; "
        "check_task_names(['hellaswag']); "
        "sys.exit(any(m in sys.modules for m in ('lm_eval', 'torch', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_offline_task_files_include_the_packaged_ones(tmp_path: Path) -> None:
    write_task_folder(tmp_path, OFFLINE_TASKS, "/unused")
    for name in OFFLINE_TASKS:
        written = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert written["task"] == name and Path(written["include"]).is_file()


def test_real_task_files_inherit_and_replace(tmp_path: Path) -> None:
    write_task_folder(tmp_path, REAL_SETS, "/lm_eval/tasks", "/cache/evals")
    boolq = yaml.safe_load((tmp_path / "boolq.yaml").read_text())
    assert boolq["include"] == "/lm_eval/tasks/super_glue/boolq/default.yaml"
    assert boolq["doc_to_target"] == "{{answer|int}}"
    assert boolq["dataset_kwargs"] == {"data_files": {"validation": "/cache/evals/boolq.arrow"}}
    assert boolq["test_split"] is None and boolq["validation_split"] == "validation"
    lambada = yaml.safe_load((tmp_path / "lambada_openai_flat.yaml").read_text())
    assert lambada["task"] == "lambada_openai_flat" and lambada["dataset_path"] == "json"
    assert lambada["test_split"] == "test" and lambada["validation_split"] is None


def test_a_real_task_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the folder of its data"):
        write_task_folder(tmp_path, ["piqa"], "/lm_eval/tasks")
