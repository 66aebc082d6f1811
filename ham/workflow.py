"""What the Snakemake rules need to know: paths, hashes and fingerprints of each stage.

Kept out of the rule files so that it can be tested without Snakemake. Loads no torch: a dry run
reads nothing but the configuration and the project's sources.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ham.config import ArmConfig, Config
from ham.config_files import parse_config
from ham.device import uses_gpu, visible_gpus
from ham.errors import DeviceError, unknown_choice
from ham.failure import read_failure
from ham.files import stable_hash, write_text
from ham.fingerprint import PROJECT, fingerprint, repository_root
from ham.model.outside import announced
from ham.report.manifest import manifest_path

STAGES = ("prepare", "tune", "train", "evaluate", "measure", "inspect", "report")
SPLITS = ("train", "calibration", "validation", "test")
RESULTS = "results/runs"
REPORTS = "reports"
CONFIG_COPY = "config.yaml"
INSPECTED_MIXER = "ham"


def parse_workflow_config(values: Mapping[str, Any]) -> Config:
    """Validate the map that Snakemake merged from all configuration files.

    Mixer names are checked too; their options are checked by the jobs, which load torch.

    Raises:
        ConfigError: One message with every fault.
    """
    config = parse_config(dict(values))
    known = mixer_files()
    for arm in config.arms:
        for name in arm.mixers:
            if name not in known:
                raise unknown_choice("mixer", name, known)
    return config


def write_config(config: Config, path: str) -> None:
    """Write the merged and validated configuration as YAML, as every job reads it."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def run_folder(config: Config) -> str:
    """Where the results of this configuration lie, relative to the working directory."""
    return f"{RESULTS}/{config.name}"


def report_folder(config: Config) -> str:
    """Where the report of this configuration lies."""
    return f"{REPORTS}/{config.name}"


def rows_files(config: Config) -> list[str]:
    """The row files of all jobs: training and evaluation per seed, measurement per arm."""
    models = f"{run_folder(config)}/models"
    rows = [
        f"{models}/{arm.name}/seed{seed}/{stage}.rows.jsonl"
        for arm in config.arms
        for seed in config.seeds_of(arm)
        for stage in (["train", "evaluate"] if arm.trained else ["evaluate"])
    ]
    if config.measure:
        rows += [
            f"{models}/{arm.name}/seed{config.seeds_of(arm)[0]}/measure.rows.jsonl"
            for arm in config.arms
        ]
    return rows + tuning_rows_files(config)


def tuning_rates(config: Config) -> list[str]:
    """The learning rates that every arm is tried at, as paths name them; none without tuning."""
    return [] if config.tuning is None else [repr(rate) for rate in config.tuning.learning_rates]


def tuning_folder(config: Config, arm: str, rate: str) -> str:
    """Where the rows of one tuning run lie."""
    return f"{run_folder(config)}/tuning/{arm}/lr{rate}"


def tuning_rows_files(config: Config, arm: str | None = None) -> list[str]:
    """The row files of the tuning runs, of one arm or of all."""
    return [
        f"{tuning_folder(config, one.name, rate)}/tuning.rows.jsonl"
        for one in config.arms
        for rate in tuning_rates(config)
        if one.trained and one.tuned_like is None and arm in (None, one.name)
    ]


def tuned_file(config: Config, arm: str) -> list[str]:
    """The file with the learning rate that was chosen for an arm; none without tuning."""
    if config.tuning is None:
        return []
    source = config.tuned_as(config.arm(arm)).name
    return [f"{run_folder(config)}/tuning/{source}/chosen.json"]


def checkpoint_folder(config: Config, arm: str, seed: int | str) -> str:
    """The checkpoint that the jobs of an arm read: its own, or the one that it names."""
    elsewhere = config.arm(arm).checkpoint
    if elsewhere is not None:
        return elsewhere
    source = config.arm(arm).checkpoint_of or arm
    return f"{run_folder(config)}/models/{source}/seed{seed}/checkpoint"


def failed_arms(config: Config) -> list[str]:
    """Why training gave no model of an arm, and what to do, a line each."""
    lines = []
    for arm in config.arms:
        for seed in config.seeds_of(arm):
            folder = Path(run_folder(config)) / "models" / arm.name / f"seed{seed}"
            reason = read_failure(folder / "checkpoint")
            if reason:
                lines.append(f"{arm.name}, seed {seed}, failed: {reason}")
                lines.append(f"  to try again: rm -r {folder}")
    return lines


def inspection_pages(config: Config) -> list[str]:
    """The pages of kept tokens that a report links: of the first HAM arm, or none."""
    arms = [arm for arm in config.arms if arm.mixer == INSPECTED_MIXER]
    return [
        f"{report_folder(config)}/inspect/{arm.name}-seed{config.seeds_of(arm)[0]}.html"
        for arm in arms[:1]
    ]


def inspection_files(config: Config) -> list[str]:
    """What the inspection may leave: its page, and rows with their manifest beside it.

    An arm that failed has the page alone.
    """
    rows = [
        str(PurePosixPath(page).with_suffix(".rows.jsonl")) for page in inspection_pages(config)
    ]
    return [*inspection_pages(config), *rows, *(str(manifest_path(path)) for path in rows)]


def inspection_options(config: Config) -> list[str]:
    """Options of `ham inspect` besides those of every arm: rows, and what decoding agrees on.

    Decisions can be compared where a threshold makes them, in every other cache not.
    """
    arm = next((arm for arm in config.arms if arm.mixer == INSPECTED_MIXER), None)
    if arm is None:
        return []
    compared = arm.options.get("budget", "threshold") == "threshold"
    return ["--rows", inspection_files(config)[1], *(["--agreement"] if compared else [])]


def mixer_files(root: Path | None = None) -> dict[str, str]:
    """Module of every registered mixer by name, without importing any.

    Read from the sources in `baselines/` and from the entry points of installed packages.
    """
    found = dict(announced())
    for path in sorted(((root or repository_root()) / "baselines").glob("*.py")):
        for name in _registered_names(path, path.stat().st_mtime_ns):
            found[name] = f"ham.baselines.{path.stem}"
    return found


@functools.cache
def _registered_names(path: Path, mtime_ns: int) -> list[str]:
    """The names given to `@register_baseline(...)` in one file; `mtime_ns` keys the cache."""
    names = []
    for node in ast.parse(path.read_bytes(), filename=str(path)).body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else []:
            if isinstance(decorator, ast.Call) and decorator.args:
                function, argument = decorator.func, decorator.args[0]
                called = getattr(function, "attr", None) or getattr(function, "id", None)
                if called == "register_baseline" and isinstance(argument, ast.Constant):
                    names.append(argument.value)
    return names


def stage_modules(
    stage: str, code: str | Sequence[str] | None = None, root: Path | None = None
) -> list[str]:
    """The modules whose code decides the result of a stage.

    Args:
        stage: One of `STAGES`.
        code: `ArmConfig.code`: the registered mixers of the arm, whose files alone count among the
            baselines, and packages by their dotted names.
        root: The repository; that of this file when None.

    Raises:
        ConfigError: For an unknown stage or mixer.
    """
    if stage not in STAGES:
        raise unknown_choice("stage", stage, STAGES)
    modules = [f"ham.cli.{stage}"]
    names = [code] if isinstance(code, str) else code or []
    known = mixer_files(root) if names else {}
    for name in names:
        if name.startswith(f"{PROJECT}."):
            modules.append(name)
            continue
        if name not in known:
            raise unknown_choice("mixer", name, known)
        modules.append(known[name])
    return modules


def stage_fingerprint(
    stage: str, code: str | Sequence[str] | None = None, root: Path | None = None
) -> str:
    """Fingerprint of the code behind a stage, for the `ArmConfig.code` of one arm.

    Installed baselines whose sources cannot be read count with the reason: their own jobs report
    it, and no other job is touched.
    """
    modules = stage_modules(stage, code, root)
    try:
        return fingerprint(*modules, root=root)
    except (ModuleNotFoundError, SyntaxError) as error:
        own = [name for name in modules if name.partition(".")[0] == PROJECT]
        if own == modules:
            raise
        return stable_hash([fingerprint(*own, root=root), f"{type(error).__name__}: {error}"])


def stage_hash(config: Config, stage: str, arm: str | None = None) -> str:
    """Hash of the part of the configuration that a stage reads.

    A changed evaluation setting must not retrain, and a changed arm must not touch the others.
    """
    return stable_hash(_stage_values(config, stage, config.arm(arm) if arm else None))


def _stage_values(config: Config, stage: str, arm: ArmConfig | None) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    data = values["data"]
    if stage == "prepare":
        return {key: data[key] for key in ("source", "hub", "tokenizer")}
    if stage == "report":
        return {key: value for key, value in values.items() if key != "workflow"}
    assert arm is not None
    # More seeds of an arm leave those that it has as they are.
    own = {"arm": arm.model_dump(mode="json", exclude={"seeds"}), "device": config.device}
    if stage == "tune":
        return {"arm": arm.name, "tuning": values["tuning"]}
    if stage == "train":
        tuned = {} if config.tuning is None else {"tuning": values["tuning"]}
        reference = config.reference.model_dump(mode="json", exclude={"seeds"})
        budget = reference if config.model.match_parameters else None
        return {
            **own,
            "data": data,
            "model": values["model"],
            "train": values["train"],
            "sized_like": budget,
            **tuned,
        }
    if stage == "inspect":
        return own
    return {**own, stage: values[stage]}


def require_device(config: Config) -> None:
    """Stop before the first job when this machine lacks the GPU that the configuration needs.

    Raises:
        DeviceError: Names the device asked for and what to do.
    """
    if config.device == "cuda" and not visible_gpus():
        raise DeviceError(
            f"configuration {config.name!r} asks for device 'cuda', but this machine shows no "
            "NVIDIA GPU; run it where one is, or overlay a file with `device: cpu` "
            "(legal: auto, cpu, cuda)"
        )


def gpus_per_job(config: Config) -> int:
    """Shares of a GPU that a job takes that has one to itself; 0 where none is used."""
    return config.workflow.processes_per_gpu * int(uses_gpu(config.device))


def limit_gpus(workflow: Any, processes: int = 1) -> int:
    """Let as many GPU jobs run at once as there are GPUs, unless the user set a limit.

    Without a limit Snakemake ignores a resource. It has no documented call for this; service
    rules use the same one.

    Args:
        processes: Jobs that may share a GPU; one that may not takes as many shares.

    Returns:
        How many shares of a GPU are in use at once.
    """
    from snakemake.resources import Resource

    if "gpu" not in list(workflow.global_resources):
        workflow.register_resource("gpu", Resource("gpu", processes * max(1, len(visible_gpus()))))
    return int(workflow.global_resources["gpu"].value)


def timing_threads(cores: int, gpus: int) -> int:
    """Cores that a job with timings asks for, so that no further job runs beside it.

    Args:
        cores: Of the machine.
        gpus: GPU jobs that run at once: each gets an equal share of the cores. 0 on a CPU, where
            such a job has them all.
    """
    return max(1, cores // max(1, gpus))
