"""Write `environment.yml` from `pyproject.toml`: `python ham/envfile.py > environment.yml`.

Needs the standard library only, so that it also runs before anything is installed.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

HEADER = """\
# Generated from pyproject.toml by `make environment.yml`; do not edit.
# Only the pip installation (`make test`) is tested. conda's own resolution was not.
#   conda env create -f environment.yml && conda activate ham-bench && pip install --no-deps -e .
"""


def environment_text(pyproject: Path) -> str:
    """The content of `environment.yml` for a `pyproject.toml`."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    python = project["requires-python"]
    requirements = project["dependencies"] + project["optional-dependencies"]["test"]
    lines = [
        "name: ham-bench",
        "channels: [conda-forge, nodefaults]",
        "dependencies:",
        f'  - "python {python}"',
        "  - pip",
        "  - pip:",
        *(f'      - "{requirement}"' for requirement in requirements),
    ]
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(environment_text(Path(__file__).resolve().parent.parent / "pyproject.toml"), end="")
