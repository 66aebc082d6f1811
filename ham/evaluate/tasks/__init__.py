"""The lm-eval tasks of this project: which names are legal and where their files are.

Checking a name is cheap: nothing here imports lm-eval. Four families exist. The offline tasks are
made from held-out documents of the shipped corpus. The real sets are downloaded once by
`ham fetch-evals` and run through lm-eval's own task files. `hub:NAME` is any task of lm-eval, its
data from the Hugging Face hub. A path that ends in `.yaml` is a task file of one's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ham.errors import ConfigError, unknown_choice
from ham.files import write_text

OFFLINE_TASKS = ("held_out_last_word", "held_out_continuation", "held_out_perplexity")
HUB_PREFIX = "hub:"
OWN_SUFFIX = ".yaml"


@dataclass(frozen=True)
class RealSet:
    """A published data set and the lm-eval task file that scores it.

    Attributes:
        task_file: Path of the task file inside `lm_eval/tasks/`.
        data_file: Path of the data in the cache folder.
        split: The split it is declared as.
        data_format: Builder of `datasets` that reads it: `arrow` or `json`.
        changes: Keys of the task file that are replaced.
    """

    task_file: str
    data_file: str
    split: str = "validation"
    data_format: str = "arrow"
    changes: tuple[tuple[str, str], ...] = ()


REAL_SETS: Mapping[str, RealSet] = {
    "hellaswag": RealSet("hellaswag/hellaswag.yaml", "hellaswag.arrow"),
    "piqa": RealSet("piqa/piqa.yaml", "piqa.arrow"),
    "winogrande": RealSet("winogrande/default.yaml", "winogrande.arrow"),
    "arc_easy": RealSet("arc/arc_easy.yaml", "arc_easy.arrow"),
    "arc_challenge": RealSet("arc/arc_challenge.yaml", "arc_challenge.arrow"),
    # These files carry the answer as a boolean instead of the `label` that the task file reads;
    # without this change lm-eval reports an accuracy of exactly 0 and no error.
    "boolq": RealSet(
        "super_glue/boolq/default.yaml",
        "boolq.arrow",
        changes=(("doc_to_target", "{{answer|int}}"),),
    ),
    "openbookqa": RealSet("openbookqa/openbookqa.yaml", "openbookqa.arrow"),
    "sciq": RealSet("sciq/sciq.yaml", "sciq.arrow"),
    "social_iqa": RealSet("siqa/siqa.yaml", "social_iqa.arrow"),
    "commonsense_qa": RealSet("commonsense_qa/default.yaml", "commonsense_qa.arrow"),
    "copa": RealSet("super_glue/copa/default.yaml", "copa.arrow"),
    "rte": RealSet("glue/rte/default.yaml", "rte.arrow"),
    "sst2": RealSet("glue/sst2/default.yaml", "sst2.arrow"),
    # White space of this copy was flattened, so it must not carry the name of the original.
    "lambada_openai_flat": RealSet(
        "lambada/lambada_openai.yaml",
        "lambada_openai_flat.jsonl",
        split="test",
        data_format="json",
    ),
}


def known_tasks() -> tuple[str, ...]:
    """Every task that has a name of its own here."""
    return (*OFFLINE_TASKS, *REAL_SETS)


def is_hub_task(name: str) -> bool:
    """Whether a task reads its data from the Hugging Face hub."""
    return name.startswith(HUB_PREFIX)


def is_own_task(name: str) -> bool:
    """Whether a name is the path of a task file."""
    return name.endswith(OWN_SUFFIX)


def task_label(name: str) -> str:
    """What rows call a task: the name itself, of a file its stem."""
    return Path(name).stem if is_own_task(name) else name


def check_task_names(names: Iterable[str]) -> None:
    """Check that every name can be a task; whether lm-eval has a `hub:` task shows when it loads.

    Raises:
        ConfigError: For the first unknown name, with the legal ones, for a task file that does not
            exist, or for two tasks that rows would call the same.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(task_label(name), name)
        if other != name:
            raise ConfigError(f"lm-eval tasks {other!r} and {name!r} have the same name in rows")
        if is_hub_task(name):
            continue
        if is_own_task(name):
            if not Path(name).is_file():
                raise ConfigError(f"the task file {name} does not exist")
        elif name not in known_tasks():
            legal = (*known_tasks(), f"{HUB_PREFIX}NAME", f"your/file{OWN_SUFFIX}")
            raise unknown_choice("lm-eval task", name, legal)


def write_task_folder(
    folder: str | os.PathLike,
    names: Iterable[str],
    lm_eval_tasks: str | os.PathLike,
    data_folder: str | os.PathLike | None = None,
    hub_files: Mapping[str, str | os.PathLike] | None = None,
) -> None:
    """Write one task file per name, each of which includes the real task file by absolute path.

    A dictionary given to lm-eval 0.4.13 does not inherit from a registered task, and paths of
    data are relative to the current directory there; generated files avoid both.

    Args:
        folder: Where to write; give it to lm-eval as its include path.
        names: Tasks to write.
        lm_eval_tasks: The `tasks` folder of the installed lm-eval.
        data_folder: The verified cache of `ham fetch-evals`; needed for real sets.
        hub_files: Task files of lm-eval by `hub:` name; needed for these.
    """
    import yaml

    for name in names:
        if name in (hub_files or {}):
            values = {"include": str((hub_files or {})[name]), "task": name}
        else:
            values = _task_file(name, Path(lm_eval_tasks), data_folder)
        label = task_label(name)
        text = yaml.safe_dump(values, sort_keys=False)
        write_text(Path(folder) / f"{label.replace(':', '-')}.yaml", text)


def _task_file(
    name: str, lm_eval_tasks: Path, data_folder: str | os.PathLike | None
) -> dict[str, Any]:
    if name in OFFLINE_TASKS:
        return {"include": str(Path(__file__).parent / f"{name}.yaml"), "task": name}
    if is_own_task(name):
        return {"include": str(Path(name).resolve()), "task": task_label(name)}
    real = REAL_SETS[name]
    if data_folder is None:
        raise ValueError(f"task {name!r} needs the folder of its data")
    others = {"validation_split": None, "test_split": None}
    return {
        "include": str(lm_eval_tasks / real.task_file),
        "task": name,
        "dataset_path": real.data_format,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {real.split: str(Path(data_folder) / real.data_file)}},
        "training_split": None,
        "fewshot_split": None,
        **others,
        f"{real.split}_split": real.split,
        **dict(real.changes),
    }
