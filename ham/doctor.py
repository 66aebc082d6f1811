"""What this machine can run: one check per requirement, and which stages follow from them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ham.errors import HamError

DEMO_MEMORY_BYTES = 4 * 2**30
DEMO_DISK_BYTES = 1 * 2**30
SUPPORTED_PYTHONS = ((3, 11), (3, 12))


class Check(NamedTuple):
    """One requirement.

    Attributes:
        good: Whether it is met.
        detail: What was found, or what is missing and how to get it.
    """

    name: str
    good: bool
    detail: str


class Ability(NamedTuple):
    """Something one may want to run, and the names of the checks that stand in its way."""

    name: str
    description: str
    missing: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """Whether nothing is in the way."""
        return not self.missing


ABILITIES = {
    "demo": ("the demo: `make reproduce`", ("python", "packages", "memory", "disk", "corpus")),
    "h100": ("workflow/config/h100.yaml", ("python", "packages", "corpus", "cuda", "triton")),
    "kernels": ("Triton kernels on a GPU", ("cuda", "triton", "compiler")),
    "interpreter": ("Triton kernels in its interpreter, as the tests do", ("triton",)),
    "compile": ("torch.compile (`train.compile: true`)", ("compiler",)),
    "lm-eval sets": ("published evaluation sets in `ham lm-eval`", ("evaluation sets",)),
}


def examine(*names: str) -> list[Check]:
    """Run the checks called `names`, or every check; one that fails to run is not met."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("torch", _torch),
        ("cuda", _cuda),
        ("triton", _triton),
        ("compiler", _compiler),
        ("cores", _cores),
        ("memory", _memory),
        ("disk", _disk),
        ("corpus", _corpus),
        ("evaluation sets", _evaluation_sets),
    ]
    return [_guarded(name, check) for name, check in checks if not names or name in names]


def abilities(checks: list[Check]) -> list[Ability]:
    """What the checks allow."""
    failed = {check.name for check in checks if not check.good}
    return [
        Ability(name, description, tuple(need for need in needs if need in failed))
        for name, (description, needs) in ABILITIES.items()
    ]


def format_report(checks: list[Check]) -> str:
    """The checks and abilities as aligned text."""
    width = max(len(check.name) for check in checks)
    lines = [
        f"{'ok ' if check.good else 'no '} {check.name:<{width}}  {check.detail}"
        for check in checks
    ]
    lines.append("")
    for ability in abilities(checks):
        reason = "" if ability.possible else f": {', '.join(ability.missing)} missing"
        verdict = "can run   " if ability.possible else "cannot run"
        lines.append(f"{verdict}  {ability.description}{reason}")
    lines.append("never run   workflow/config/paper.yaml: complete, but far beyond one machine")
    return "\n".join(lines)


def _guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except (HamError, ImportError, OSError) as error:
        return Check(name, False, str(error))


def _python() -> tuple[bool, str]:
    legal = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHONS)
    found = platform.python_version()
    good = sys.version_info[:2] in SUPPORTED_PYTHONS
    return good, found if good else f"{found}; {legal} is needed"


def _packages() -> tuple[bool, str]:
    """Whether every requirement of this distribution is installed in a legal version."""
    from packaging.requirements import Requirement

    wrong = []
    for text in importlib.metadata.requires("ham-bench") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, needed {requirement.specifier}")
    return not wrong, "; ".join(wrong) or "all requirements met"


def _torch() -> tuple[bool, str]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return True, f"{torch.__version__} ({build})"


def _cuda() -> tuple[bool, str]:
    import torch

    from ham.device import why_no_cuda

    if not torch.cuda.is_available():
        return False, why_no_cuda()
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return True, "; ".join(names)


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "not installed; CPU builds of torch need `pip install triton==3.6.0` (Linux)"
    return True, importlib.metadata.version("triton")


def _compiler() -> tuple[bool, str]:
    """torch.compile and Triton's launcher build small extension modules."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        return False, "no C++ compiler (g++ or clang++) on PATH"
    if not header.is_file():
        return False, f"{header} is missing (Debian: python3-dev)"
    return True, f"{compiler}, {header}"


def _cores() -> tuple[bool, str]:
    usable = len(os.sched_getaffinity(0))
    return usable >= 2, f"{usable} usable" + ("" if usable >= 2 else "; the demo is timed on 2")


def _memory() -> tuple[bool, str]:
    import psutil

    free = psutil.virtual_memory().available
    return free >= DEMO_MEMORY_BYTES, _amount(free, DEMO_MEMORY_BYTES)


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(Path.cwd()).free
    return free >= DEMO_DISK_BYTES, f"{_amount(free, DEMO_DISK_BYTES)} in {Path.cwd()}"


def _amount(found: int, needed: int) -> str:
    return f"{found / 2**30:.1f} GiB free, the demo needs {needed / 2**30:.0f}"


def _corpus() -> tuple[bool, str]:
    from ham.train.corpus import verify_corpus

    return True, f"{verify_corpus()['documents']} documents, checksums agree"


def _evaluation_sets() -> tuple[bool, str]:
    from ham.evaluate.fetch_evals import check_evals, evals_folder

    folder = evals_folder()
    check_evals(folder)
    return True, f"in {folder}, checksums agree"
