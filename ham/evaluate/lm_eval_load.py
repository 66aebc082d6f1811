"""Loading lm-eval tasks by the names of this project, and the errors that lm-eval only logs."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ham.errors import ConfigError, MissingDataError
from ham.evaluate.fetch_evals import cache_folder, check_evals, evals_folder
from ham.evaluate.part import EVALUATION_SEED
from ham.evaluate.tasks import (
    HUB_PREFIX,
    REAL_SETS,
    held_out,
    is_hub_task,
    is_own_task,
    task_label,
    write_task_folder,
)

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def require_data(names: Sequence[str]) -> Path | None:
    """The verified folder of the real sets, or None when no task needs it.

    Raises:
        MissingDataError, CorruptFileError: If a task needs it and it is not there or damaged.
    """
    if not any(name in REAL_SETS for name in names):
        return None
    folder = evals_folder()
    check_evals(folder)
    return folder


def check_tasks(names: Sequence[str]) -> None:
    """Find out before anything runs whether these tasks can be asked.

    Those from the hub and from own files are loaded for that; what they download stays cached.

    Raises:
        MissingDataError, CorruptFileError: If data are missing or damaged, or the hub is away.
        ConfigError: For an unknown task of the hub or an unknown metric in a task file.
    """
    require_data(names)
    doubtful = [name for name in names if is_hub_task(name) or is_own_task(name)]
    if doubtful:
        prepare_environment(names)
        with quiet():
            load_tasks(doubtful)


def prepare_environment(names: Iterable[str]) -> None:
    """Keep `datasets` out of the user's cache, and off the network unless a task needs the hub.

    Call before it is imported.
    """
    if not any(map(is_hub_task, names)):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache_folder() / "datasets"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def load_tasks(names: Sequence[str]) -> dict[str, Task]:
    """lm-eval's task objects by their names in rows.

    Raises:
        ConfigError: For an unknown task of the hub, a task file that does not load, or one with an
            unknown metric.
        MissingDataError, CorruptFileError: If data cannot be had.
    """
    import lm_eval.tasks

    loaded: dict[str, Task] = {}
    with tempfile.TemporaryDirectory(prefix="ham-tasks-") as folder:
        write_task_folder(
            folder,
            names,
            Path(lm_eval.tasks.__file__).parent,
            require_data(names),
            _hub_files([name for name in names if is_hub_task(name)]),
        )
        for path in Path(folder).iterdir():
            check_metrics(path)
        manager = lm_eval.tasks.TaskManager(
            include_path=folder, include_defaults=False, metadata={"seed": held_out.SEED}
        )
        for name in names:
            loaded[task_label(name)] = _load(manager, name)
    for task in loaded.values():
        task.set_fewshot_seed(seed=EVALUATION_SEED)
    return loaded


def _load(manager: object, name: str) -> Task:
    label = task_label(name)
    try:
        return manager.load([label])["tasks"][label]
    except Exception as error:  # data sets and task files fail in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if is_hub_task(name):
            raise MissingDataError(
                f"lm-eval task {name} needs data of the Hugging Face hub, which failed: {reason}; "
                "check the network and HF_HUB_OFFLINE, or use a set of `ham fetch-evals`"
            ) from error
        if is_own_task(name):
            raise ConfigError(f"the task file {name} does not load: {reason}") from error
        raise


def check_metrics(path: Path) -> None:
    """Refuse metrics that lm-eval would leave out of its results with a line in its log.

    Args:
        path: A task file; what it includes counts.

    Raises:
        ConfigError: Names the task, the metric and the known metrics.
    """
    import lm_eval.api.metrics  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks._yaml_loader import load_yaml

    values = load_yaml(path, resolve_func=False)
    # A task with a function of its own names its metrics itself.
    if values.get("process_results") is not None:
        return
    for entry in values.get("metric_list") or ():
        metric = entry.get("metric")
        given = isinstance(metric, str) and not metric.startswith("!function")
        if given and not entry.get("hf_evaluate") and metric not in metric_registry:
            known = ", ".join(sorted(metric_registry.keys()))
            raise ConfigError(
                f"the file of task {values['task']!r} has an unknown metric {metric!r}; "
                f"known: {known}"
            )


def _hub_files(names: Sequence[str]) -> dict[str, Path]:
    """lm-eval's own task files. Its whole index is read for this: 5 seconds, so only if needed."""
    if not names:
        return {}
    import lm_eval.tasks

    index = lm_eval.tasks.TaskManager().task_index
    files = {}
    for name in names:
        plain = name.removeprefix(HUB_PREFIX)
        entry = index.get(plain)
        path = getattr(entry, "yaml_path", None)
        if path is None or "TASK" not in entry.kind.name:
            near = difflib.get_close_matches(plain, index, n=5, cutoff=0.5)
            raise ConfigError(
                f"lm-eval has no task {plain!r} with a file of its own (groups must be named task "
                f"by task); similar: {', '.join(near) or 'none'}; `ham lm-eval ls tasks` lists all"
            )
        files[name] = Path(path)
    return files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's notes and progress bars, which are not warnings."""
    import datasets
    import lm_eval.api.task

    # Its bar over documents has no switch, and tqdm reads TQDM_DISABLE when torch imports it.
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
        datasets.enable_progress_bars()
