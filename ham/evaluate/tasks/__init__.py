"""The lm-eval tasks of this project: which names are legal and where their files are.

Checking a name is cheap: nothing here imports lm-eval. Two families exist. The offline tasks are
made from held-out documents of the shipped corpus. The real sets are downloaded once by
`ham fetch-evals` and run through lm-eval's own task files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ham.errors import unknown_choice
from ham.files import write_text

OFFLINE_TASKS = ("held_out_last_word", "held_out_continuation", "held_out_perplexity")


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
    # White space of this copy was flattened, so it must not carry the name of the original.
    "lambada_openai_flat": RealSet(
        "lambada/lambada_openai.yaml",
        "lambada_openai_flat.jsonl",
        split="test",
        data_format="json",
    ),
}


def known_tasks() -> tuple[str, ...]:
    """Every legal task name."""
    return (*OFFLINE_TASKS, *REAL_SETS)


def check_task_names(names: Iterable[str]) -> None:
    """Check that every name is a task of this project.

    Raises:
        ConfigError: For the first unknown name; the message lists the legal ones.
    """
    for name in names:
        if name not in known_tasks():
            raise unknown_choice("lm-eval task", name, known_tasks())


def write_task_folder(
    folder: str | os.PathLike,
    names: Iterable[str],
    lm_eval_tasks: str | os.PathLike,
    data_folder: str | os.PathLike | None = None,
) -> None:
    """Write one task file per name, each of which includes the real task file by absolute path.

    A dictionary given to lm-eval 0.4.13 does not inherit from a registered task, and paths of
    data are relative to the current directory there; generated files avoid both.

    Args:
        folder: Where to write; give it to lm-eval as its include path.
        names: Tasks to write.
        lm_eval_tasks: The `tasks` folder of the installed lm-eval.
        data_folder: The verified cache of `ham fetch-evals`; needed for real sets.
    """
    import yaml

    for name in names:
        text = yaml.safe_dump(_task_file(name, Path(lm_eval_tasks), data_folder), sort_keys=False)
        write_text(Path(folder) / f"{name}.yaml", text)


def _task_file(
    name: str, lm_eval_tasks: Path, data_folder: str | os.PathLike | None
) -> dict[str, Any]:
    if name in OFFLINE_TASKS:
        return {"include": str(Path(__file__).parent / f"{name}.yaml"), "task": name}
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
