"""The process that imports Triton and compiles: one JSON object a line in, one out.

    python -m ham.kernels.gate.worker MODULE...

Compilers crash, and Triton decides once per process whether it interprets kernels, so all of it
happens here and never in the process of the command or of a test.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import triton

from ham.kernels.compile_cases import CompileCase
from ham.kernels.gate.figures import figures_of
from ham.kernels.gate.record import Launch, compile_launch, record
from ham.kernels.gate.targets import TARGETS


def operation_of(module: str) -> str:
    """`ham.kernels.ssd.compile_cases` is the list of ssd; elsewhere a module stands for itself."""
    return module.removeprefix("ham.kernels.").removesuffix(".compile_cases")


class Worker:
    """Answers requests.

    Args:
        modules: Modules with `COMPILE_CASES`.
    """

    def __init__(self, modules: Iterable[str]):
        self.cases: dict[tuple[str, str], CompileCase] = {}
        self.twice: list[tuple[str, str]] = []
        for module in modules:
            for case in importlib.import_module(module).COMPILE_CASES:
                key = (operation_of(module), case.name)
                if key in self.cases:
                    self.twice.append(key)
                self.cases[key] = case
        self.launches = cache(self._launches)

    def _launches(self, operation: str, name: str, target: str) -> list[Launch]:
        return record(self.cases[operation, name], TARGETS[target])

    def list(self, targets: list[str], everything: bool) -> dict[str, Any]:
        """All cases, with the launches of those to be compiled."""
        listed = []
        for (operation, name), case in self.cases.items():
            entry: dict[str, Any] = {"operation": operation, "name": name, "launches": {}}
            listed.append(entry)
            if (operation, name) in self.twice:
                entry["error"] = "is the name of more than one case"
                continue
            if not (everything or case.default):
                continue
            # All targets, so that a tile shipped for one of them only is not taken for a mistake.
            for target in TARGETS:
                try:
                    launches = self.launches(operation, name, target)
                except Exception as error:
                    entry["error"] = f"cannot be launched on {target}: {describe(error)}"
                    break
                entry["launches"][target] = [[each.kernel, each.key] for each in launches]
            if "error" not in entry and not any(entry["launches"].values()):
                entry["error"] = f"launches no kernel on {', '.join(TARGETS)}"
            entry["launches"] = {
                target: launches
                for target, launches in entry["launches"].items()
                if target in targets
            }
        return {"triton": triton.__version__, "cases": listed}

    def compile(self, operation: str, name: str, target: str, index: int) -> dict[str, Any]:
        """Figures of one launch."""
        launch = self.launches(operation, name, target)[index]
        return {"figures": figures_of(compile_launch(launch), TARGETS[target])}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What `list` or `compile` returns, or `{"error": ...}`."""
        try:
            return getattr(self, request.pop("do"))(**request)
        except Exception as error:
            return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """Kind and text of an error; of Triton's long ones with source, the last line says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def main() -> None:
    """Serve standard input; whatever compilers print goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
