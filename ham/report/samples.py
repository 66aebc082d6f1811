"""The answers behind lm-eval's scores: what travels with the rows and is published.

`ham evaluate` leaves every question with its text and the model's answers beside the rows
(`evaluate.samples.jsonl`). The published sets keep their own licences, so only answers go on: task,
number and hash of the question, log-likelihoods to `DECIMALS` decimals, scores. A piece has them by
job (`evaluate.answers.jsonl`), a published folder all of them in one file, `samples.jsonl.xz`, of
at most `MOST_BYTES`: the hashes of the questions, the same for all models, are then stored once.
"""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ham.errors import ConfigError, CorruptFileError
from ham.report.rows import Row

PUBLISHED_SAMPLES = "samples.jsonl.xz"
MOST_BYTES = 8 << 20
DECIMALS = 5
TEXTS = ("doc", "target", "prompt_hash", "target_hash")
"""What is left out; the hash of the question stays."""

SCORES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}
"""Scores of one sample whose mean over samples is a row's value."""

TOLERANCE = 1e-9


def samples_beside(rows: str) -> tuple[str, str]:
    """Paths of the samples and of their answers, of a job by the path of its rows."""
    stem = rows.removesuffix(".rows.jsonl")
    return f"{stem}.samples.jsonl", f"{stem}.answers.jsonl"


def answers_of_job(root: Path, rows: str) -> dict[str, bytes]:
    """The answers of a job by their path: made from its samples, or as another machine sent them.

    Nothing for a job without samples.
    """
    samples, answers = samples_beside(rows)
    if (root / samples).is_file():
        content = without_texts((root / samples).read_bytes())
    elif (root / answers).is_file():
        content = (root / answers).read_bytes()
    else:
        return {}
    return {answers: content} if content else {}


def without_texts(samples: bytes) -> bytes:
    """Samples without the texts of the questions, numbers rounded; JSON lines both."""
    records = (json.loads(line) for line in samples.decode().splitlines() if line.strip())
    return _lines(
        {name: _rounded(value) for name, value in record.items() if name not in TEXTS}
        for record in records
    )


def pack_samples(answers: Mapping[str, bytes]) -> bytes | None:
    """All answers in one compressed file, each with the model and seed that its path names.

    Args:
        answers: By path in the run, `.../models/ARM/seedN/evaluate.answers.jsonl`.

    Returns:
        None where there are none. The same answers give the same bytes with one liblzma.

    Raises:
        ConfigError: If they need more than `MOST_BYTES`.
    """
    records = []
    for path in sorted(answers):
        model, seed = PurePosixPath(path).parts[-3:-1]
        place = {"model": model, "seed": int(seed.removeprefix("seed"))}
        lines = answers[path].decode().splitlines()
        records += [{**json.loads(line), **place} for line in lines if line.strip()]
    if not records:
        return None
    packed = lzma.compress(_lines(records), preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > MOST_BYTES:
        raise ConfigError(
            f"the answers to lm-eval's questions take {len(packed):,} bytes, at most "
            f"{MOST_BYTES:,} are published; --no-samples publishes without them"
        )
    return packed


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The records of a published file.

    Raises:
        CorruptFileError: If it cannot be read.
    """
    try:
        text = lzma.decompress(path.read_bytes()).decode()
        return [json.loads(line) for line in text.splitlines()]
    except (lzma.LZMAError, ValueError) as error:
        raise CorruptFileError(f"{path} holds no samples: {error}") from error


def sample_faults(records: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> list[str]:
    """Accuracies of rows without samples of their model, seed and task, or not their mean."""
    scores: dict[tuple, list[float]] = defaultdict(list)
    for record in records:
        for name, metric in SCORES.items():
            if name in record:
                place = (record["model"], record["seed"], record["task"], metric)
                scores[place].append(float(record[name]))
    faults = []
    judged = [row for row in rows if row.experiment == "lm_eval" and row.metric in SCORES.values()]
    for row in judged:
        found = scores.get((row.model, row.seed, row.task, row.metric))
        if row.value is None:
            continue
        if found is None:
            faults.append(f"{row.model}, seed {row.seed}, {row.task}: {row.metric} has no samples")
            continue
        mean = sum(found) / len(found)
        if row.n != len(found) or abs(mean - row.value) > TOLERANCE:
            faults.append(
                f"{row.model}, seed {row.seed}, {row.task}: {row.metric} is {row.value:g} of "
                f"{row.n}, its samples give {mean:g} of {len(found)}"
            )
    return faults


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False) for record in records)
    return "".join(f"{line}\n" for line in lines).encode()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value
