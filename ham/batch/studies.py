"""Studies that a configuration names: in which processes they run, and where their rows lie.

A study is cut where nothing is shared: tasks that take their learning rates from one task, at one
width, are a part; each part is a process (`ham mqar run`), so that several GPUs have work. Parts of
the first width come first, of these the longest. Loads no torch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from ham.config import Config
from ham.errors import CorruptFileError
from ham.files import stable_hash
from ham.fingerprint import fingerprint, repository_root
from ham.report.manifest import manifest_path
from ham.study.config import MqarConfig, load_mqar_config
from ham.workflow import mixer_files, run_folder

FOLDER = "studies"
SHIPPED = "workflow/config/mqar.yaml"
ROWS_END = ".rows.jsonl"


@dataclass(frozen=True)
class StudyPart:
    """What one process does of a study.

    Attributes:
        study: The whole study.
        file: Where its configuration is.
        tasks: Names of the tasks.
        width: Model width.
        folder: Of the run that it belongs to.
        jobs: Programs side by side.
        device: `auto`, `cpu` or `cuda`, as the run has it.
    """

    study: MqarConfig
    file: str
    tasks: tuple[str, ...]
    width: int
    folder: str
    jobs: int
    device: str

    @property
    def name(self) -> str:
        """In file names, e.g. `blank-d64`."""
        return f"{self.tasks[0]}-d{self.width}"

    @property
    def rows(self) -> str:
        """The folder of its row files."""
        return f"{self.folder}/{FOLDER}/{self.study.name}/{self.name}"

    @property
    def command(self) -> list[str]:
        """The arguments of `ham`; a run that fails leaves error rows."""
        where = ["mqar", "run", self.file, "--tasks", *self.tasks, "--widths", str(self.width)]
        how = ["--jobs", str(self.jobs), "--device", self.device, "--keep-going"]
        return [*where, "--rows", self.rows, *how]

    @cached_property
    def chosen(self) -> MqarConfig:
        """The configuration of this part alone."""
        return self.study.model_copy(update={"only": list(self.tasks), "widths": [self.width]})

    @property
    def code(self) -> str:
        """Fingerprint of the code behind its runs."""
        known = mixer_files()
        mixers = {arm.mixer for arm in self.study.arms}
        return fingerprint("ham.study.grid", *sorted(known[m] for m in mixers & known.keys()))

    @property
    def hash(self) -> str:
        """Hash of what it reads of the configuration."""
        return stable_hash(self.chosen.model_dump(mode="json"))


def study_parts(config: Config) -> list[StudyPart]:
    """The parts of all studies of a configuration, in the order in which they are to run.

    Of the shipped study where the configuration names none: it can be run beside any.

    Raises:
        MissingDataError: If the file of a study does not exist.
        ConfigError: If one is not valid.
    """
    parts = []
    for file in config.workflow.studies or [SHIPPED]:
        study = load_mqar_config(repository_root() / file)
        groups: dict[str, list[str]] = defaultdict(list)
        for task in study.reported_tasks:
            groups[task.rates_from or str(task)].append(str(task))
        parts += [
            StudyPart(
                study,
                str(repository_root() / file),
                tuple(tasks),
                width,
                run_folder(config),
                config.workflow.study_jobs,
                config.device,
            )
            for width in study.widths
            for tasks in sorted(groups.values(), key=len, reverse=True)
        ]
    return parts


def is_study_rows(path: str) -> bool:
    """Whether a path in the checkout is of the rows of a study's run."""
    return path.endswith(ROWS_END) and PurePosixPath(path).parts[3:4] == (FOLDER,)


def study_files(config: Config, root: Path = Path()) -> dict[str, bytes]:
    """Rows and manifests of the finished runs of studies, by path in the checkout."""
    files = {}
    for path in sorted((root / run_folder(config) / FOLDER).rglob(f"*{ROWS_END}")):
        for one in (path, manifest_path(path)):
            if one.is_file():
                files[one.relative_to(root).as_posix()] = one.read_bytes()
    return files


def published_study_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Rows and manifests of studies as they are published: one rows file for each command.

    A study has hundreds of runs; those of a command share its manifest.

    Raises:
        CorruptFileError: If rows have no manifest.
    """
    rows: dict[str, bytes] = {}
    manifests: dict[str, bytes] = {}
    for path in sorted(path for path in files if path.endswith(ROWS_END)):
        beside = str(manifest_path(path))
        if beside not in files:
            raise CorruptFileError(f"{path} has no manifest beside it")
        study, part = PurePosixPath(path).parts[-3:-1]
        name = f"{study}-{part}-{json.loads(files[beside])['manifest_id']}{ROWS_END}"
        rows[name] = rows.get(name, b"") + files[path]
        manifests[str(manifest_path(name))] = files[beside]
    return rows | manifests
