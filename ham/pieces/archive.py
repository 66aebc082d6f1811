"""A piece: what one machine has finished of an experiment, in one small file.

`ham pack` writes it, `ham unpack` lays its files where another machine goes on with the rest, `ham
merge` puts pieces together for publication. A piece is a `tar.xz` whose first member, `piece.json`,
has the checksum of every other; the paths are those of the checkout (`results/runs/NAME/...`), so a
piece says by itself where it belongs. Only whole jobs go in: rows, manifest, key, and the answers
behind lm-eval's scores; of studies rows and manifest of each run.

Machines that give back files of limited size get a piece cut into parts (`x.tar.xz.001`, ...).
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from ham.batch.keys import key_path
from ham.batch.studies import study_files
from ham.batch.tasks import Task, Tasks
from ham.config import Config
from ham.config_files import parse_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import atomic_writer, stable_hash
from ham.report.samples import answers_of_job
from ham.workflow import CONFIG_COPY, RESULTS, run_folder

FORMAT = 1
LISTING = "piece.json"
FIRST_PART = ".001"
MEBIBYTE = 1 << 20

Checkpoints = Literal["none", "needed", "all"]


@dataclass
class Piece:
    """Finished jobs of one experiment, in memory.

    Attributes:
        source: Where they are from, for messages.
        files: Content by path in the checkout.
    """

    source: str
    files: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def config(self) -> Config:
        """The configuration under which they were made.

        Raises:
            CorruptFileError: If the piece has none, or one of several.
            ConfigError: If today's code refuses it.
        """
        found = [path for path in self.files if PurePosixPath(path).name == CONFIG_COPY]
        if len(found) != 1:
            raise CorruptFileError(f"{self.source} holds {len(found)} configurations; expected 1")
        return parse_config(yaml.safe_load(self.files[found[0]]))

    @property
    def config_hash(self) -> str:
        """Hash of the configuration, but for how jobs share processes."""
        return stable_hash(self.config.model_dump(mode="json", exclude={"workflow"}))

    @cached_property
    def tasks(self) -> Tasks:
        """The jobs of the whole experiment."""
        return Tasks(self.config, f"{run_folder(self.config)}/{CONFIG_COPY}")

    def has(self, task: Task) -> bool:
        """Whether the job was finished."""
        return all(path in self.files for path in self.tasks.files(task))


def piece_of_run(folder: Path, checkpoints: Checkpoints = "none") -> Piece:
    """What a folder of a run, `results/runs/NAME`, has finished.

    Args:
        folder: The folder.
        checkpoints: Which trained weights to take along: of no job, of jobs whose checkpoint a
            job that is not finished will read, or of all.

    Raises:
        MissingDataError: If the folder holds no configuration, so that no run was started there.
        ConfigError: If it does not lie in a `results/runs`.
    """
    place = folder.resolve()
    if place.parent.parts[-2:] != Path(RESULTS).parts:
        raise ConfigError(f"expected a folder of {RESULTS}, received {folder}")
    root = place.parents[2]
    piece = Piece(str(folder))
    _take(piece, root, f"{RESULTS}/{place.name}/{CONFIG_COPY}")
    if not piece.files:
        raise MissingDataError(f"{folder} holds no {CONFIG_COPY}: no run was started there")
    for task in piece.tasks.all:
        wanted = piece.tasks.files(task)
        if all((root / path).is_file() for path in wanted):
            key = str(key_path(piece.tasks.result(task)))
            for path in (*wanted, key, *piece.tasks.extras(task)):
                _take(piece, root, path)
            if task.stage == "evaluate":
                piece.files |= answers_of_job(root, piece.tasks.result(task))
    piece.files |= study_files(piece.config, root)
    for task in piece.tasks.all:
        readers = piece.tasks.readers(task)
        unread = any(not piece.has(reader) for reader in readers)
        if readers and (checkpoints == "all" or (checkpoints == "needed" and unread)):
            for path in sorted((root / piece.tasks.checkpoint(task)).glob("*")):
                _take(piece, root, path.relative_to(root).as_posix())
    return piece


def _take(piece: Piece, root: Path, path: str) -> None:
    if (root / path).is_file():
        piece.files[path] = (root / path).read_bytes()


def write_piece(piece: Piece, out: Path, part_mebibytes: float | None = None) -> list[Path]:
    """Write a piece, whole or in parts of at most so many MiB; returns the files."""
    listing = {
        "format": FORMAT,
        "experiment": piece.config.name,
        "config_hash": piece.config_hash,
        "files": {path: sha256(content).hexdigest() for path, content in piece.files.items()},
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=6) as archive:
        _add(archive, LISTING, json.dumps(listing, indent=1, sort_keys=True).encode())
        for path, content in sorted(piece.files.items()):
            _add(archive, path, content)
    content = packed.getvalue()
    size = len(content) if part_mebibytes is None else round(part_mebibytes * MEBIBYTE)
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    written = [out]
    if part_mebibytes is not None and len(pieces) > 1:
        written = [out.with_name(f"{out.name}.{n:03d}") for n in range(1, len(pieces) + 1)]
    for path, part in zip(written, pieces, strict=True):
        with atomic_writer(path, "wb") as handle:
            handle.write(part)
    return written


def _add(archive: tarfile.TarFile, path: str, content: bytes) -> None:
    # Neither times nor owners: the same jobs make the same piece.
    member = tarfile.TarInfo(path)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def read_piece(path: Path) -> Piece:
    """Read a piece; of one in parts, name the first.

    Raises:
        MissingDataError: If it is not there, or a part is missing.
        CorruptFileError: If it is no piece, or damaged.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_content(path)), mode="r:xz") as archive:
            files = {
                member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive.getmembers()
                if member.isfile()
            }
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise CorruptFileError(f"{path} is no piece of `ham pack`, or damaged: {error}") from error
    listing = files.pop(LISTING, None)
    _check(path, files, {} if listing is None else json.loads(listing))
    return Piece(str(path), files)


def open_piece(path: Path) -> Piece:
    """A piece from a file of `ham pack` or from the folder of a run."""
    return piece_of_run(path) if path.is_dir() else read_piece(path)


def _content(path: Path) -> bytes:
    if not path.name.endswith(FIRST_PART):
        if not path.is_file():
            raise MissingDataError(f"{path} does not exist")
        return path.read_bytes()
    parts = sorted(path.parent.glob(f"{path.name.removesuffix(FIRST_PART)}.[0-9][0-9][0-9]"))
    numbers = [int(part.name.rpartition(".")[2]) for part in parts]
    if numbers != list(range(1, len(parts) + 1)) or not parts:
        raise MissingDataError(f"parts of {path} are missing; found: {numbers}")
    return b"".join(part.read_bytes() for part in parts)


def _check(path: Path, files: Mapping[str, bytes], listing: Mapping[str, Any]) -> None:
    if listing.get("format") != FORMAT:
        raise CorruptFileError(
            f"{path} is no piece of format {FORMAT} (received {listing.get('format')!r})"
        )
    if files.keys() != listing["files"].keys():
        raise CorruptFileError(f"{path} does not hold the files that it lists")
    for name, content in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise CorruptFileError(f"{path} holds {name!r}, which leads out of the checkout")
        if sha256(content).hexdigest() != listing["files"][name]:
            raise CorruptFileError(f"{path}: {name} was changed: its SHA-256 is not the recorded")


def unpack(pieces: Iterable[Piece], root: Path = Path()) -> list[str]:
    """Lay the files of pieces where a run goes on with the rest; returns those that are new.

    Raises:
        ConfigError: If a file is there already with other content; nothing is written then.
    """
    new: dict[str, bytes] = {}
    for piece in pieces:
        for path, content in piece.files.items():
            target = root / path
            there = new.get(path, target.read_bytes() if target.is_file() else None)
            if there is not None and there != content:
                raise ConfigError(f"{target} exists and is not the one of {piece.source}")
            if there is None:
                new[path] = content
    for path, content in new.items():
        with atomic_writer(root / path, "wb") as handle:
            handle.write(content)
    return list(new)
