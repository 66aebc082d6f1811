"""The files that set the project up: requirements, environment, Makefile, CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from ham.envfile import environment_text
from ham.fingerprint import repository_root

ROOT = repository_root()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REQUIREMENTS = [
    Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_environment_file_is_the_generated_one():
    assert (ROOT / "environment.yml").read_text() == environment_text(ROOT / "pyproject.toml"), (
        "run `make environment.yml`"
    )


def test_environment_file_has_the_requirements_of_the_project():
    text = (ROOT / "environment.yml").read_text()
    python, _, pip = yaml.safe_load(text)["dependencies"]
    assert python == f"python {PROJECT['requires-python']}"
    assert [Requirement(one) for one in pip["pip"]] == REQUIREMENTS
    assert "conda's own resolution was not" in text


def test_environment_file_needs_nothing_installed():
    done = subprocess.run(
        ["python3", "-I", "-S", str(ROOT / "ham/envfile.py")], capture_output=True, text=True
    )
    assert done.stdout == (ROOT / "environment.yml").read_text()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda one: one.name)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement):
    if requirement.name == "torch":
        assert Version("2.13.0") in requirement.specifier
    else:
        assert pins()[requirement.name.lower()] in requirement.specifier


def test_builds_that_depend_on_the_machine_are_not_pinned():
    assert not {"torch", "triton", "ham-bench"} & pins().keys()


def test_every_package_folder_is_installed():
    mapped = PYPROJECT["tool"]["setuptools"]["package-dir"]
    found = set()
    for package, folder in mapped.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.fixture
def bare_copy(tmp_path: Path) -> Path:
    """What make looks at, before anything is installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def planned(folder: Path, target: str) -> str:
    """The commands that make would run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", target], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["test", "reproduce", "lint", "gate", "bench"])
def test_targets_install_torch_before_everything_else(bare_copy: Path, target: str):
    commands = planned(bare_copy, target)
    order = [
        commands.index("-m venv .venv"),
        commands.index("torch==2.13.0"),
        commands.index("triton==3.6.0"),
        commands.index("-e '.[test]'"),
    ]
    assert order == sorted(order)
    installs = [line for line in commands.splitlines() if " install " in line]
    assert len(installs) == 3
    assert all("-c constraints.txt" in line for line in installs)


def test_targets_do_not_install_twice(bare_copy: Path):
    stamp = bare_copy / ".venv/.installed"
    stamp.parent.mkdir()
    stamp.touch()
    newest = max((bare_copy / name).stat().st_mtime for name in ("pyproject.toml", "Makefile"))
    os.utime(stamp, (newest + 10, newest + 10))
    assert " install " not in planned(bare_copy, "test")
    os.utime(bare_copy / "constraints.txt", (newest + 20, newest + 20))
    assert " install " in planned(bare_copy, "test")


def test_help_names_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    named = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {"help", "reproduce", "test", "lint", "gate", "bench", "clean"} <= named


def run_ci(tmp_path: Path, failing: str) -> subprocess.CompletedProcess[str]:
    """`.ci/run` with a `make` that only prints, and fails for one target."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    fake = tmp_path / "bin/make"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/bash\necho "made $1"\n[ "$1" != test ] || echo "3 passed in 0.1s"\n'
        f'[ "$1" != "{failing}" ]\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("failing", ["test", "reproduce", "lint", "gate"])
def test_ci_fails_with_any_of_its_steps(tmp_path: Path, failing: str):
    assert run_ci(tmp_path, failing).returncode != 0


def test_ci_runs_all_steps_and_ends_with_the_line_of_pytest(tmp_path: Path):
    done = run_ci(tmp_path, failing="")
    assert done.returncode == 0
    made = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("made ")]
    assert set(made) == {"test", "reproduce", "lint", "gate"}
    assert made[0] == "test"
    assert done.stdout.splitlines()[-1] == "3 passed in 0.1s"


def test_github_runs_both_pythons_and_the_gpu_tests():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["cpu"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert any(step.get("run") == ".ci/run" for step in jobs["cpu"]["steps"])
    assert jobs["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    assert any("-m gpu" in step.get("run", "") for step in jobs["gpu"]["steps"])


def test_citation_names_the_paper_and_this_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["title"] == "Hybrid Associative Memories"
    families = [author["family-names"] for author in paper["authors"]]
    assert families == ["Lufkin", "Figliolia", "Millidge", "Krishnamurthy"]
    assert "2603.22325" in str(paper["identifiers"])


def test_licence_is_the_declared_one():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
