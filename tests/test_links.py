"""Links between files of the repository lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def markdown_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # Outside a checkout (an unpacked archive) the files are found by name.
    found = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.glob("*.md")]
    return sorted(found)


@pytest.mark.parametrize("name", markdown_files())
def test_local_links_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [first or second for first, second in LINK.findall(text)]
    local = [t.partition("#")[0] for t in targets if not t.startswith(("http", "#", "mailto:"))]
    missing = [target for target in local if not ((ROOT / name).parent / target).exists()]
    assert not missing
