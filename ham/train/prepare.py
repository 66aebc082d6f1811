"""`ham prepare`: from a corpus to token shards that training and evaluation read.

`prepare_data` writes into one folder: a shard per split (`ham.train.shards`), the tokenizer, and
`data.json`, which says what the folder was made from. `data.json` comes last. A second call that
finds it, and finds every file as recorded, does nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ham.config import DataConfig, HubDataConfig
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import read_json, sha256_file, write_json
from ham.progress import ProgressReporter
from ham.train import corpus, hub
from ham.train.corpus_splits import SPLITS
from ham.train.shards import ShardWriter, TokenShard
from ham.train.tokenizer import BPE_NAME, TOKENIZER_FILE, Tokenizer, load_tokenizer, train_bpe

FORMAT = 1
SUMMARY_FILE = "data.json"
BPE_SAMPLE_BYTES = 32_000_000
_BATCH_CHARACTERS = 4_000_000

SplitText = tuple[str, str]


def prepare_data(config: DataConfig, folder: Path) -> None:
    """Write shards, tokenizer and `data.json` into `folder`, unless they are there.

    Args:
        config: What to read and how to tokenise it.
        folder: Created when missing. Files of an earlier configuration are replaced.

    Raises:
        ConfigError: If a data set of the hub is smaller than asked for or lacks what is named.
        MissingDataError: If a data set or tokenizer cannot be had.
        CorruptFileError: If the corpus file is truncated or changed.
        DiskFullError: If the disk is full; earlier files are untouched.
    """
    folder = Path(folder)
    made_from = _made_from(config)
    if is_prepared(folder, made_from):
        return
    tokenizer = _make_tokenizer(config)
    if config.hub is None:
        headers = _write_corpus(tokenizer, folder)
    else:
        headers = _write_hub(config.hub, tokenizer, folder)
    tokenizer.save(folder)
    write_json(
        folder / SUMMARY_FILE,
        {
            "format": FORMAT,
            "made_from": made_from,
            "tokenizer": {
                "name": tokenizer.name,
                "vocabulary_size": tokenizer.vocabulary_size,
                "sha256": _tokenizer_sha256(tokenizer.name, folder),
            },
            "splits": headers,
        },
    )


def is_prepared(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` holds what `prepare_data` would write, every file as recorded."""
    try:
        summary = read_json(folder / SUMMARY_FILE)
        if summary["made_from"] != made_from:
            return False
        for split in SPLITS:
            shard = TokenShard.open(folder / f"{split}.tokens")
            if shard.sha256 != summary["splits"][split]["sha256"]:
                return False
        recorded = summary["tokenizer"]
        return recorded["sha256"] == _tokenizer_sha256(recorded["name"], folder)
    except MissingDataError:
        return False
    except (CorruptFileError, KeyError, TypeError) as error:
        print(f"making the data again: {error}", file=sys.stderr)
        return False


def _made_from(config: DataConfig) -> dict[str, Any]:
    """Everything that decides the content of the folder."""
    is_corpus = config.hub is None
    checksums = read_json(corpus.checksum_path(corpus.CORPUS_FILE)) if is_corpus else None
    return {
        "source": config.source,
        "tokenizer": config.tokenizer,
        "corpus_sha256": checksums["content_sha256"] if checksums else None,
        "hub": config.hub.model_dump(mode="json") if config.hub else None,
    }


def _make_tokenizer(config: DataConfig) -> Tokenizer:
    if config.tokenizer != BPE_NAME:
        return load_tokenizer(config.tokenizer)
    if config.hub is not None:
        return train_bpe(_sample(config.hub))
    return train_bpe(document.text for document in corpus.load_documents("train"))


def _sample(source: HubDataConfig) -> Iterator[str]:
    progress = ProgressReporter("reading text for the tokenizer", BPE_SAMPLE_BYTES)
    with progress:
        for text in hub.training_sample(source, BPE_SAMPLE_BYTES):
            yield text
            progress.advance(len(text))


def _tokenizer_sha256(name: str, folder: Path) -> str | None:
    """SHA-256 of the tokenizer's file; None for bytes, which need none."""
    file = folder / TOKENIZER_FILE
    if name == "byte":
        return None
    return sha256_file(file) if file.exists() else ""


def _write_corpus(tokenizer: Tokenizer, folder: Path) -> dict[str, dict]:
    documents = corpus.load_documents()
    texts = ((document.split, document.text) for document in documents)
    progress = ProgressReporter("tokenising the corpus", len(documents))
    with _writers(tokenizer, folder) as writers, progress:
        for batch in _encoded(texts, tokenizer):
            for split, tokens, size in batch:
                writers[split].add(tokens, size)
            progress.advance(len(batch))
    return {split: writer.header() for split, writer in writers.items()}


def _write_hub(source: HubDataConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, dict]:
    wanted = {split: source.held_out_tokens for split in SPLITS} | {"train": source.train_tokens}
    texts = ((hub.split_of_text(text, source), text) for text in hub.stream_texts(source))
    progress = ProgressReporter(f"reading {source.dataset}", sum(wanted.values()))
    with _writers(tokenizer, folder) as writers, progress:
        for batch in _encoded(texts, tokenizer):
            for split, tokens, size in batch:
                missing = wanted[split] - writers[split].token_count
                if missing > 0:
                    writers[split].add(tokens, size)
                    progress.advance(min(missing, len(tokens) + 1))
            if _is_full(writers, wanted):
                break
        if not _is_full(writers, wanted):
            found = {split: writer.token_count for split, writer in writers.items()}
            raise ConfigError(
                f"data set {source.dataset!r} ended before every split was full: asked for "
                f"{wanted} tokens, found {found}; lower data.hub.train_tokens or held_out_tokens"
            )
    return {split: writer.header() for split, writer in writers.items()}


def _is_full(writers: dict[str, ShardWriter], wanted: dict[str, int]) -> bool:
    return all(writer.token_count >= wanted[split] for split, writer in writers.items())


@contextlib.contextmanager
def _writers(tokenizer: Tokenizer, folder: Path) -> Iterator[dict[str, ShardWriter]]:
    """One open writer a split; all shards appear when the block ends, or none."""
    with contextlib.ExitStack() as stack:
        yield {
            split: stack.enter_context(ShardWriter(folder / f"{split}.tokens", tokenizer))
            for split in SPLITS
        }


def _encoded(
    texts: Iterable[SplitText], tokenizer: Tokenizer
) -> Iterator[list[tuple[str, Any, int]]]:
    """`(split, tokens, UTF-8 bytes)` of every document, a few megabytes at a time."""
    for batch in _batched(texts):
        encoded = tokenizer.encode_documents([text for _, text in batch])
        yield [
            (split, tokens, len(text.encode("utf-8")))
            for (split, text), tokens in zip(batch, encoded, strict=True)
        ]


def _batched(texts: Iterable[SplitText]) -> Iterator[list[SplitText]]:
    batch: list[SplitText] = []
    size = 0
    for item in texts:
        batch.append(item)
        size += len(item[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
