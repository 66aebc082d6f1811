from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ham.fingerprint import fingerprint, module_path, reachable_modules, repository_root

FILES = {
    "ham/__init__.py": "",
    "ham/job.py": "import ham.model.net\n\n\ndef go():\n    from ham import late\n",
    "ham/late.py": "VALUE = 1\n",
    "ham/unused.py": "VALUE = 1\n",
    "ham/model/__init__.py": "",
    "ham/model/net.py": '"""Net."""\nfrom . import blocks\nfrom ham.kernels.op import f\n',
    "ham/model/blocks.py": "SIZE = 2  # two\n",
    "ham/tasks/__init__.py": "",
    "ham/tasks/a.yaml": "key: 1\n",
    "ham/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ham.unused\n",
    "ham/lazy.py": 'NAMES = ["ham.late", "ham is not a module"]\n',
    "ham/reader.py": "import ham.tasks\n",
    "kernels/__init__.py": "",
    "kernels/op/__init__.py": "def f(x):\n    return x + 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def edited(tree: Path, name: str, old: str, new: str, *modules: str) -> bool:
    """Whether the fingerprint of `modules` changes by an edit of one file."""
    before = fingerprint(*modules, root=tree)
    path = tree / name
    text = path.read_text()
    assert old in text
    stamp = path.stat().st_mtime_ns
    path.write_text(text.replace(old, new))
    while path.stat().st_mtime_ns == stamp:
        path.touch()
    return fingerprint(*modules, root=tree) != before


def test_closure_follows_local_relative_and_mapped_imports(tree: Path):
    assert reachable_modules(["ham.job"], tree) == {
        "ham.job",
        "ham.late",
        "ham.model",
        "ham.model.net",
        "ham.model.blocks",
        "ham.kernels",
        "ham.kernels.op",
    }


def test_imports_for_type_checkers_do_not_count(tree: Path):
    assert reachable_modules(["ham.typed"], tree) == {"ham.typed"}


def test_module_names_in_strings_count(tree: Path):
    assert reachable_modules(["ham.lazy"], tree) == {"ham.lazy", "ham.late"}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kernels/op/__init__.py", "x + 1", "x - 1"),
        ("ham/model/blocks.py", "2  #", "3  #"),
        ("ham/late.py", "VALUE = 1", "VALUE = 1.0"),
        ("ham/late.py", "VALUE = 1", "VALUE = None"),
    ],
)
def test_changed_code_changes_the_fingerprint(tree: Path, name: str, old: str, new: str):
    assert edited(tree, name, old, new, "ham.job")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ham/model/blocks.py", "# two", "# a different comment"),
        ("ham/model/blocks.py", "SIZE = 2", "\n\nSIZE   =  2"),
        ("ham/model/net.py", '"""Net."""', '"""Another docstring, of\n\nthree lines."""'),
        ("ham/unused.py", "VALUE = 1", "VALUE = 2"),
    ],
)
def test_comments_layout_docstrings_and_other_modules_do_not(
    tree: Path, name: str, old: str, new: str
):
    assert not edited(tree, name, old, new, "ham.job")


def test_files_beside_a_package_count(tree: Path):
    assert edited(tree, "ham/tasks/a.yaml", "1", "2", "ham.reader")


def test_unknown_module_is_an_error(tree: Path):
    with pytest.raises(ModuleNotFoundError, match=r"ham\.absent"):
        fingerprint("ham.absent", root=tree)


def test_mapped_folders_are_found():
    root = repository_root()
    assert module_path("ham.kernels", root) == root / "kernels/__init__.py"
    assert module_path("ham.baselines", root) == root / "baselines/__init__.py"
    assert module_path("numpy", root) is None


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("ham", "kernels", "baselines"):
        ignored = shutil.ignore_patterns("__pycache__", "*.xz")
        shutil.copytree(repository_root() / name, tmp_path / name, ignore=ignored)
    return tmp_path


STAGES = ("train", "evaluate", "measure", "report")


def stages_changed_by(project: Path, name: str, mixer: str = "transformer") -> set[str]:
    """The stages that an added statement in one project file reruns."""
    from ham.workflow import stage_fingerprint

    def all_stages() -> dict[str, str]:
        return {
            stage: stage_fingerprint(stage, None if stage == "report" else mixer, project)
            for stage in STAGES
        }

    before = all_stages()
    path = project / name
    path.write_text(path.read_text() + "\nEDITED = True\n")
    after = all_stages()
    return {stage for stage in STAGES if before[stage] != after[stage]}


def test_editing_the_optimiser_retrains(project: Path):
    assert "train" in stages_changed_by(project, "ham/train/optimiser.py")


@pytest.mark.parametrize("module", ["plots_base", "plots_training", "formats", "palette"])
def test_editing_a_plot_reruns_the_report_alone(project: Path, module: str):
    assert stages_changed_by(project, f"ham/report/{module}.py") <= {"report"}


def test_editing_an_evaluation_does_not_retrain(project: Path):
    changed = stages_changed_by(project, "ham/evaluate/needle.py")
    assert "evaluate" in changed
    assert not changed & {"train", "measure", "report"}


def test_editing_a_baseline_touches_its_own_arm_only(project: Path):
    assert stages_changed_by(project, "baselines/mamba2.py", "transformer") == set()
    assert {"train", "evaluate", "measure"} <= stages_changed_by(
        project, "baselines/mamba2.py", "mamba2"
    )


def test_all_stages_take_less_than_a_third_of_a_second(tmp_path: Path):
    # Processor time of a fresh process: other jobs of the machine do not count. The first finds
    # nothing that was parsed before.
    code = (
        "import time; from ham.workflow import stage_fingerprint, STAGES; t = time.process_time();"
        "[stage_fingerprint(s, 'ham' if s in ('train', 'evaluate', 'measure') else None)"
        " for s in STAGES]; print(time.process_time() - t)"
    )
    environment = {**os.environ, "HAM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    seconds = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        seconds.append(float(done.stdout))
    (known,) = tmp_path.iterdir()
    assert seconds[0] < 0.005 * len(json.loads(known.read_text()))  # 2.2 ms a module
    assert seconds[1] < 0.3
    known.write_text("{ half a fi")
    subprocess.run(command, capture_output=True, check=True, env=environment)
    assert len(json.loads(known.read_text())) > 100
