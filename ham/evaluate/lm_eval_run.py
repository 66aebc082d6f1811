"""All lm-eval tasks of one model in one process, as result rows.

Without a `hub:` task nothing here needs a network: the tasks are made from the shipped corpus or
read from the verified cache of `ham fetch-evals`. Beside each score stand those of a uniform and of
an untrained model (`ham.evaluate.lm_eval_chance`). Nothing is cached between runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ham.evaluate.lm_eval_chance import (
    UNIFORM,
    UNTRAINED,
    asked,
    metric_fields,
    reference_rows,
    uniform,
    untrained_twin,
)
from ham.evaluate.lm_eval_load import check_tasks, load_tasks, prepare_environment, quiet
from ham.evaluate.part import Cell, Fields, Subject
from ham.evaluate.tasks import task_label

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from ham.config import LmEvalConfig
    from ham.evaluate.lm_eval_adapter import HamLM
    from ham.model.language_model import LanguageModel

EXPERIMENT = "lm_eval"
_KEPT_KEYS = ("doc_id", "doc", "target", "resps", "doc_hash", "prompt_hash", "target_hash")
# Tasks that have no accuracy, by the end of their names.
_BY_BITS = ("held_out_perplexity", "wikitext")


def cells(subject: Subject) -> list[Cell]:
    """One cell for all tasks: they share one process, one model and one batch of requests.

    Raises:
        MissingDataError, CorruptFileError: If a real set is asked for and not in the cache, or the
            hub cannot be reached.
        ConfigError: For a task file with an unknown metric, or an unknown task of the hub.
    """
    settings = subject.config.evaluate.lm_eval
    if settings is None or not settings.tasks:
        return []
    check_tasks(settings.tasks)
    expected = [
        {"experiment": EXPERIMENT, "metric": metric, "task": task_label(task)}
        for task in settings.tasks
        for metric in main_metrics(task)
    ]
    return [Cell("lm-eval tasks", expected, lambda: _measure(subject, settings))]


def main_metrics(task: str) -> tuple[str, ...]:
    """The metrics by which a task is judged."""
    return ("bits_per_byte",) if task.endswith(_BY_BITS) else ("accuracy",)


def _measure(subject: Subject, settings: LmEvalConfig) -> list[Fields]:
    prepare_environment(settings.tasks)
    lm = _adapter(subject, settings, subject.model)
    results, tasks = evaluate_tasks(lm, settings.tasks, settings.limit)
    subject.samples.extend(sample_records(results["samples"]))
    untrained = None
    # How a model that was trained elsewhere began is not known.
    if settings.untrained and not subject.foreign:
        untrained = _adapter(subject, settings, untrained_twin(subject.model, subject.seed))
    rows = []
    for name, task in tasks.items():
        record = lm.records[name]
        common = {
            "experiment": EXPERIMENT,
            "task": name,
            "labels": {"truncated": record.truncated},
        }
        count = results["n-samples"][name]["effective"]
        _warn_of_cuts(name, record.truncated, lm)
        fraction = subject.kv_fraction(record.routing, lm.max_length)
        rows += task_rows(results["results"][name], count, {**common, "kv_fraction": fraction})
        rows += reference_rows(task, UNIFORM, uniform(lm, name), common)
        if untrained is not None:
            rows += reference_rows(task, UNTRAINED, asked(untrained), common)
    return rows


def _adapter(subject: Subject, settings: LmEvalConfig, model: LanguageModel) -> HamLM:
    from ham.evaluate.lm_eval_adapter import HamLM

    return HamLM(
        model,
        batch_size=settings.batch_size,
        tokenizer=subject.tokenizer,
        precision=subject.config.train.precision,
        on_batch=subject.on_batch,
    )


def _warn_of_cuts(task: str, truncated: int, lm: HamLM) -> None:
    """Say it where the run is watched; the rows carry it too."""
    if truncated:
        print(
            f"ham: warning: {task}: {truncated} requests are longer than {lm.max_length} tokens; "
            "the beginning of their context was cut, as their rows say",
            file=sys.stderr,
        )


def evaluate_tasks(
    lm: HamLM, names: Sequence[str], limit: int | None
) -> tuple[dict[str, Any], dict[str, Task]]:
    """Run tasks of this project; returns lm-eval's results and the tasks by their names in rows."""
    from lm_eval.evaluator import evaluate

    with quiet():
        tasks = load_tasks(names)
        results = evaluate(
            lm=lm,
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
        )
    return results, tasks


def task_rows(metrics: Mapping[str, Any], count: int, common: Fields) -> list[Fields]:
    """Rows of lm-eval's `"<metric>,<filter>": value` entries."""
    rows = []
    for key, value in metrics.items():
        name, _, _ = key.partition(",")
        if "," in key and not name.endswith("_stderr"):
            rows.append({**common, **metric_fields(name, value, count)})
    return rows


def sample_records(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every question with the model's answers and scores, without the prompts built from it."""
    for task, records in samples.items():
        for record in records:
            kept = {key: record[key] for key in _KEPT_KEYS if key in record}
            scores = {metric: record[metric] for metric in record["metrics"]}
            yield {"task": task, **kept, **scores}
