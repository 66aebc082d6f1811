"""The corpus that comes with the project: long documents in the public domain.

One file, `data/public_domain.jsonl.xz`, holds one JSON object a line and document: `id`, `part`,
`title`, `split`, `text`, sorted by id. `data/public_domain.sha256.json` records the SHA-256 of the
file, of its uncompressed content, of every document and of the packages it was made from;
`data/LICENSES.md` says where each part comes from. `ham corpus build` makes the file again.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import lzma
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ham.errors import CorruptFileError, MissingDataError, unknown_choice
from ham.files import read_json
from ham.train.corpus_splits import SPLITS

__all__ = [
    "CORPUS_FILE",
    "SPLITS",
    "Document",
    "checksum_path",
    "load_documents",
    "parse_documents",
    "serialise_documents",
    "summarise",
    "verify_corpus",
]

CORPUS_FILE = Path(str(importlib.resources.files("ham.train.data"))) / "public_domain.jsonl.xz"


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Attributes:
        id: Unique, `part/name`, lower case.
        part: `austen`, `king_james_bible`, `milton`, `moby_dick`, `shakespeare` or
            `state_of_the_union`.
        title: For readers.
        text: NFC, "\\n" newlines.
        split: One of `SPLITS`.
    """

    id: str
    part: str
    title: str
    text: str
    split: str = "train"


def checksum_path(corpus_file: Path) -> Path:
    """Where the checksums of a corpus file are recorded: beside it."""
    return corpus_file.with_name(corpus_file.name.removesuffix(".jsonl.xz") + ".sha256.json")


def load_documents(split: str | None = None, corpus_file: Path = CORPUS_FILE) -> list[Document]:
    """The documents of one split, or of all, sorted by id.

    The file's SHA-256 is checked on every call (7 MB, a few milliseconds).

    Raises:
        ConfigError: If there is no such split.
        MissingDataError: If the file or its checksums are missing.
        CorruptFileError: If the file is truncated or changed.
    """
    if split is not None and split not in SPLITS:
        raise unknown_choice("split", split, SPLITS)
    recorded = read_json(checksum_path(corpus_file))["file"]
    compressed = _read(corpus_file)
    if len(compressed) < recorded["bytes"]:
        raise CorruptFileError(
            f"{corpus_file} is truncated: {len(compressed)} of {recorded['bytes']} bytes; "
            "restore it from the repository or run `ham corpus build`"
        )
    found = hashlib.sha256(compressed).hexdigest()
    if found != recorded["sha256"]:
        raise CorruptFileError(
            f"{corpus_file} was changed: sha256 {found}, expected {recorded['sha256']}; "
            "restore it from the repository or run `ham corpus build`"
        )
    documents = parse_documents(_decompress(compressed, corpus_file), corpus_file)
    return [one for one in documents if split is None or one.split == split]


def verify_corpus(corpus_file: Path = CORPUS_FILE, record: Path | None = None) -> dict[str, Any]:
    """Compare a corpus file with recorded checksums.

    The documents decide. The compressed file may differ where they agree, because its bytes depend
    on the version of liblzma.

    Args:
        corpus_file: File to examine.
        record: Checksums to compare with; those beside the file when None.

    Returns:
        `{"same_file": bool, "documents": int}`.

    Raises:
        MissingDataError: If a file is missing.
        CorruptFileError: If a document is missing, added or changed; names the first few.
    """
    recorded = read_json(record or checksum_path(corpus_file))
    compressed = _read(corpus_file)
    documents = parse_documents(_decompress(compressed, corpus_file), corpus_file)
    found = {document.id: document_sha256(document) for document in documents}
    wrong = sorted(
        name
        for name in found.keys() | recorded["documents"].keys()
        if found.get(name) != recorded["documents"].get(name)
    )
    if wrong:
        raise CorruptFileError(
            f"{corpus_file}: {len(wrong)} documents are missing, added or changed: "
            + ", ".join(wrong[:5])
        )
    same = hashlib.sha256(compressed).hexdigest() == recorded["file"]["sha256"]
    return {"same_file": same, "documents": len(found)}


def serialise_documents(documents: Iterable[Document]) -> bytes:
    """The uncompressed content of a corpus file: sorted by id, one JSON object a line."""
    ordered = sorted(documents, key=lambda document: document.id)
    lines = [json.dumps(asdict(one), sort_keys=True, ensure_ascii=False) for one in ordered]
    return "".join(line + "\n" for line in lines).encode("utf-8")


def parse_documents(content: bytes, name: Path) -> list[Document]:
    """The inverse of `serialise_documents`.

    Raises:
        CorruptFileError: If a line is not a document; `name` is the file named in the message.
    """
    try:
        return [Document(**json.loads(line)) for line in content.splitlines()]
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"{name} holds a line that is not a document: {error}") from error


def document_sha256(document: Document) -> str:
    """SHA-256 of a document's text and of what identifies it, split included."""
    return hashlib.sha256(serialise_documents([document])).hexdigest()


def summarise(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """Documents and UTF-8 bytes of every split."""
    summary = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    for document in documents:
        summary[document.split]["documents"] += 1
        summary[document.split]["bytes"] += len(document.text.encode("utf-8"))
    return summary


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MissingDataError(f"corpus file {path} does not exist") from error


def _decompress(compressed: bytes, path: Path) -> bytes:
    try:
        return lzma.decompress(compressed)
    except (lzma.LZMAError, EOFError) as error:
        raise CorruptFileError(f"{path} is not a complete xz file: {error}") from error
