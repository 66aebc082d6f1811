"""Pieces of one experiment put together: checked for agreement, and what is missing named.

Numbers of two machines stand in one table only if the same configuration and the same code made
them. Pieces with different configurations are refused, and so are jobs of one arm and stage with
different hashes, and a job that two pieces have with different results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ham.batch.studies import ROWS_END, is_study_rows, study_parts
from ham.batch.tasks import Task, Tasks
from ham.compare.manifests import flatten
from ham.errors import ConfigError, CorruptFileError
from ham.files import stable_hash
from ham.pieces.archive import Piece
from ham.report.manifest import manifest_path
from ham.report.rows import Row
from ham.report.samples import samples_beside
from ham.workflow import inspection_files, inspection_pages

COMPARED = ("config_hash", "code_fingerprint")
MOST_KEYS = 5
# Value and source by what it is of; for tuning runs the rate is part of that.
Seen = dict[tuple[str, str, str], tuple[str, str]]


@dataclass
class Union:
    """All jobs of several pieces.

    Attributes:
        tasks: The jobs of the whole experiment.
        files: Rows and manifests by path in the checkout.
        missing: Jobs that no piece has.
        studies: Rows and manifests of the runs of studies.
        missing_runs: Runs of studies that no piece has, in words.
        commits: The commits behind the jobs; one, if the code was frozen.
        answers: Answers behind lm-eval's scores, by path in the checkout.
        pages: Pages of `ham inspect`, and rows with manifests beside them, by path in the checkout.
    """

    tasks: Tasks
    files: dict[str, bytes] = field(default_factory=dict)
    missing: list[Task] = field(default_factory=list)
    studies: dict[str, bytes] = field(default_factory=dict)
    missing_runs: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, bytes] = field(default_factory=dict)

    @property
    def missing_pages(self) -> list[str]:
        """Pages of kept tokens that no piece has."""
        return [path for path in inspection_pages(self.tasks.config) if path not in self.pages]

    @property
    def present(self) -> list[Task]:
        """The jobs that some piece has, of those with rows."""
        return [task for task in self.tasks.all if self.tasks.result(task) in self.files]


def unite(pieces: Sequence[Piece]) -> Union:
    """Put pieces together.

    Raises:
        ConfigError: If configurations, hashes or the results of a job disagree; names both values
            and the pieces that they are from.
    """
    first = pieces[0]
    for other in pieces[1:]:
        _require_same_config(first, other)
    union = Union(first.tasks)
    seen: Seen = {}
    owners: dict[str, str] = {}
    commits = set()
    for piece in pieces:
        commits |= _add_studies(union, seen, owners, piece)
        _add_pages(union, owners, piece)
        _add_answers(union, owners, piece)
        for task in union.tasks.all:
            result = union.tasks.result(task)
            if not result.endswith(".jsonl") or not piece.has(task):
                continue
            _require_same_code(seen, task, piece)
            manifest = str(manifest_path(result))
            if result not in union.files:
                owners[result] = piece.source
                union.files |= {path: piece.files[path] for path in (result, manifest)}
                commits.add(_commit(piece, manifest))
            else:
                _require_same_rows(task.name, union.files[result], owners[result], piece, result)
    union.missing = [
        task
        for task in union.tasks.all
        if union.tasks.result(task).endswith(".jsonl") and task not in union.present
    ]
    union.missing_runs = _missing_runs(union)
    union.commits = sorted(commits)
    return union


def _add_studies(union: Union, seen: Seen, owners: dict[str, str], piece: Piece) -> set[str]:
    """Take in the runs of studies of a piece; returns the commits behind them."""
    commits = set()
    for path in sorted(path for path in piece.files if is_study_rows(path)):
        manifest = str(manifest_path(path))
        if manifest not in piece.files:
            raise CorruptFileError(f"{piece.source}: {path} has no manifest beside it")
        folder, name = path.rsplit("/", 1)
        row = _rows(piece.files[path], piece.source)[0]
        config = stable_hash(json.loads(piece.files[manifest])["config"])
        _agree(seen, ("config", folder, ""), config, piece.source, f"{folder}, {name}")
        code = ("code_fingerprint", f"{folder} {row['model']}", "")
        _agree(seen, code, str(row["code_fingerprint"]), piece.source, name)
        if path not in union.studies:
            owners[path] = piece.source
            union.studies |= {one: piece.files[one] for one in (path, manifest)}
            commits.add(_commit(piece, manifest))
        else:
            _require_same_rows(name, union.studies[path], owners[path], piece, path)
    return commits


def _add_pages(union: Union, owners: dict[str, str], piece: Piece) -> None:
    """Take in the pages of kept tokens of a piece, and what lies beside them."""
    _add_files(union.pages, inspection_files(union.tasks.config), owners, piece)


def _add_answers(union: Union, owners: dict[str, str], piece: Piece) -> None:
    """Take in the answers of the evaluations of a piece."""
    evaluations = [task for task in union.tasks.all if task.stage == "evaluate"]
    paths = [samples_beside(union.tasks.result(task))[1] for task in evaluations]
    _add_files(union.answers, paths, owners, piece)


def _add_files(
    into: dict[str, bytes], paths: Sequence[str], owners: dict[str, str], piece: Piece
) -> None:
    for path in paths:
        if path not in piece.files:
            continue
        known = into.setdefault(path, piece.files[path])
        first = owners.setdefault(path, piece.source)
        if known != piece.files[path]:
            raise ConfigError(f"{path} is another one in {first} than in {piece.source}")


def _missing_runs(union: Union) -> list[str]:
    """Runs of the studies that the configuration names and no piece has."""
    config = union.tasks.config
    if not config.workflow.studies:
        return []
    # The study trains models, so importing it loads torch.
    from ham.study.plan import planned_runs

    return [
        f"study {part.study.name}: {run.name}"
        for part in study_parts(config)
        for run in planned_runs(part.chosen)
        if f"{part.rows}/{run.name}{ROWS_END}" not in union.studies
    ]


def _require_same_config(one: Piece, other: Piece) -> None:
    if one.config_hash == other.config_hash:
        return
    sides = [
        dict(flatten(piece.config.model_dump(mode="json", exclude={"workflow"})))
        for piece in (one, other)
    ]
    keys = [key for key in {**sides[0], **sides[1]} if sides[0].get(key) != sides[1].get(key)]
    listed = "; ".join(
        f"{key}: {sides[0].get(key)!r} and {sides[1].get(key)!r}" for key in keys[:MOST_KEYS]
    )
    raise ConfigError(
        f"{one.source} has configuration {one.config_hash}, {other.source} has "
        f"{other.config_hash}; they differ in {len(keys)} keys: {listed}"
    )


def _require_same_rows(name: str, known: bytes, owner: str, piece: Piece, path: str) -> None:
    if known != piece.files[path]:
        difference = _first_difference(known, piece.files[path], (owner, piece.source))
        raise ConfigError(f"{name} is in two pieces with different results: {difference}")


def _require_same_code(seen: Seen, task: Task, piece: Piece) -> None:
    """Jobs of one arm and stage, and of one rate where rates are tried, have the same hashes."""
    row = _rows(piece.files[piece.tasks.result(task)], piece.source)[0]
    for name in COMPARED:
        place = (name, f"{task.stage} {task.arm}", task.rate or "")
        _agree(seen, place, str(row.get(name)), piece.source, task.name)


def _agree(seen: Seen, place: tuple[str, str, str], value: str, source: str, job: str) -> None:
    """What must be one value wherever it stands."""
    known, first = seen.setdefault(place, (value, source))
    if known != value:
        name, what, _ = place
        raise ConfigError(
            f"{what} was made under different {name}s: {known} in {first}, {value} in {source} "
            f"({job})"
        )


def _first_difference(one: bytes, other: bytes, sources: tuple[str, str]) -> str:
    """The first row that differs, or the number of rows."""
    sides = [_rows(content, source) for content, source in zip((one, other), sources, strict=True)]
    for left, right in zip(*sides, strict=False):
        if left != right:
            names = [key for key in left if left[key] != right.get(key)]
            where = f"{left['metric']} at {left['x_name']} {left['x_value']}"
            values = " and ".join(
                str({name: row.get(name) for name in names}) for row in (left, right)
            )
            return f"{where}: {values} in {sources[0]} and {sources[1]}"
    return f"{len(sides[0])} rows in {sources[0]}, {len(sides[1])} in {sources[1]}"


def _rows(content: bytes, source: str) -> list[dict[str, Any]]:
    """The rows of a file, each checked against the schema."""
    try:
        rows = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
        for row in rows:
            Row.model_validate(row)
    except ValueError as error:
        raise CorruptFileError(f"{source} holds rows that are none: {error}") from error
    if not rows:
        raise CorruptFileError(f"{source} holds a job without rows")
    return rows


def _commit(piece: Piece, manifest: str) -> str:
    record = json.loads(piece.files[manifest])
    changes = f" with changes {record['dirty_hash']}" if record.get("dirty") else ""
    return f"{record.get('commit', 'unknown')}{changes}"
