"""All lm-eval tasks of one model in one process, as result rows.

Nothing here needs a network: the tasks are made from the shipped corpus or read from the verified
cache of `ham fetch-evals`. Beside each accuracy stands that of a model which gives every token the
same probability: it prefers the shortest option, so it is not 1 / options.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ham.evaluate.fetch_evals import cache_folder, check_evals, evals_folder
from ham.evaluate.part import EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.tasks import REAL_SETS, held_out, write_task_folder
from ham.report.statistics import wilson_interval

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from ham.config import LmEvalConfig
    from ham.evaluate.lm_eval_adapter import HamLM

EXPERIMENT = "lm_eval"
METRIC_NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}
_KEPT_KEYS = ("doc_id", "doc", "target", "resps", "doc_hash", "prompt_hash", "target_hash")


def cells(subject: Subject) -> list[Cell]:
    """One cell for all tasks: they share one process, one model and one batch of requests.

    Raises:
        MissingDataError, CorruptFileError: If a real set is asked for and not in the cache.
    """
    settings = subject.config.evaluate.lm_eval
    if settings is None or not settings.tasks:
        return []
    require_data(settings.tasks)
    expected = [
        {"experiment": EXPERIMENT, "metric": metric, "task": task}
        for task in settings.tasks
        for metric in main_metrics(task)
    ]
    return [Cell("lm-eval tasks", expected, lambda: _measure(subject, settings))]


def main_metrics(task: str) -> tuple[str, ...]:
    """The metrics by which a task is judged."""
    return ("bits_per_byte",) if task == "held_out_perplexity" else ("accuracy",)


def require_data(tasks: Sequence[str]) -> Path | None:
    """The verified folder of the real sets, or None when no task needs it.

    Raises:
        MissingDataError, CorruptFileError: If a task needs it and it is not there or damaged.
    """
    if not any(task in REAL_SETS for task in tasks):
        return None
    folder = evals_folder()
    check_evals(folder)
    return folder


def _measure(subject: Subject, settings: LmEvalConfig) -> list[Fields]:
    go_offline()
    from ham.evaluate.lm_eval_adapter import HamLM

    lm = HamLM(
        subject.model,
        batch_size=settings.batch_size,
        tokenizer=subject.tokenizer,
        precision=subject.config.train.precision,
        on_batch=subject.on_batch,
    )
    results, tasks = evaluate_tasks(lm, settings.tasks, settings.limit)
    subject.samples.extend(sample_records(results["samples"]))
    rows = []
    for name in settings.tasks:
        record = lm.records[name]
        common = {
            "experiment": EXPERIMENT,
            "task": name,
            "kv_fraction": subject.kv_fraction(record.routing, lm.max_length),
            "labels": {"truncated": record.truncated},
        }
        count = results["n-samples"][name]["effective"]
        rows += task_rows(results["results"][name], count, common)
        rows += chance_rows(tasks[name], results["samples"][name], lm, common)
    return rows


def evaluate_tasks(
    lm: HamLM, names: Sequence[str], limit: int | None
) -> tuple[dict[str, Any], dict[str, Task]]:
    """Run tasks of this project; returns lm-eval's results and the task objects by name."""
    import lm_eval.tasks
    from lm_eval.evaluator import evaluate

    with _quiet(), tempfile.TemporaryDirectory(prefix="ham-tasks-") as folder:
        write_task_folder(folder, names, Path(lm_eval.tasks.__file__).parent, require_data(names))
        manager = lm_eval.tasks.TaskManager(
            include_path=folder,
            include_defaults=False,
            metadata={"seed": held_out.SEED},
        )
        loaded = manager.load(list(names))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=EVALUATION_SEED)
        results = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    return results, loaded["tasks"]


def task_rows(metrics: Mapping[str, Any], count: int, common: Fields) -> list[Fields]:
    """Rows of lm-eval's `"<metric>,<filter>": value` entries; accuracies get Wilson intervals."""
    rows = []
    for key, value in metrics.items():
        name, _, _ = key.partition(",")
        if "," not in key or name.endswith("_stderr"):
            continue
        row = {**common, "metric": METRIC_NAMES.get(name, name), "value": value, "n": count}
        if name in METRIC_NAMES:
            spread = wilson_interval(round(value * count), count)
            row |= {"low": spread.low, "high": spread.high, "interval": spread.interval}
        rows.append(row)
    return rows


def chance_rows(
    task: Task, samples: Sequence[Mapping[str, Any]], lm: HamLM, common: Fields
) -> list[Fields]:
    """Accuracies of a uniform model on the same documents, by the task's own scoring."""
    lengths = lm.records[task.config.task].continuation_tokens
    totals: dict[str, list[float]] = {}
    for sample in samples:
        if any(len(arguments) != 2 for arguments in sample["arguments"]):
            return []
        uniform = [
            (-float(lengths[tuple(arguments)]), False)
            for arguments in sample["arguments"]
            if tuple(arguments) in lengths
        ]
        if len(uniform) != len(sample["arguments"]):
            return []
        for metric, value in task.process_results(sample["doc"], uniform).items():
            if metric in METRIC_NAMES:
                totals.setdefault(metric, []).append(float(value))
    without_routing = {key: value for key, value in common.items() if key != "kv_fraction"}
    return [
        {
            **without_routing,
            "metric": f"chance_{METRIC_NAMES[metric]}",
            "value": sum(values) / len(values),
            "n": len(values),
        }
        for metric, values in totals.items()
    ]


def sample_records(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every question with the model's answers and scores, without the prompts built from it."""
    for task, records in samples.items():
        for record in records:
            kept = {key: record[key] for key in _KEPT_KEYS if key in record}
            scores = {metric: record[metric] for metric in record["metrics"]}
            yield {"task": task, **kept, **scores}


def go_offline() -> None:
    """Keep `datasets` off the network and out of the user's cache; call before it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache_folder() / "datasets"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's notes and progress bars, which are not warnings."""
    import datasets
    import lm_eval.api.task

    # Its bar over documents has no switch, and tqdm reads TQDM_DISABLE when torch imports it.
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
        datasets.enable_progress_bars()
