"""One job of an experiment: an arm, a seed, a device, and the provenance of its rows.

`train`, `evaluate` and `measure` all run inside `open_job`, so that their rows and manifests agree.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ham.config import ArmConfig, Config
from ham.config_files import load_config
from ham.device import gpu_lease, resolve_device
from ham.errors import ConfigError
from ham.failure import reason_of
from ham.locks import sole_writer
from ham.report.manifest import collect_manifest, device_name, manifest_path, write_manifest
from ham.report.rows import RowWriter
from ham.workflow import stage_fingerprint, stage_hash

if TYPE_CHECKING:
    import torch

    from ham.model.language_model import LanguageModel

Made = TypeVar("Made")


@dataclass
class Job:
    """What a job knows about itself.

    Attributes:
        stage: `train`, `evaluate` or `measure`.
        device: Where it computes.
        config_hash: Hash of the part of the configuration that this stage reads.
        code_fingerprint: Hash of the code that this stage runs.
        keep_going: Whether a failure of the arm is to become error rows (`ham.failure`).
        failure: Why the arm failed, once it has.
    """

    stage: str
    config: Config
    arm: ArmConfig
    seed: int
    device: torch.device
    config_hash: str
    code_fingerprint: str
    manifest: dict[str, Any]
    keep_going: bool = False
    failure: str | None = None
    started: float = field(default_factory=time.perf_counter)

    def writer(self, model: LanguageModel | None, launch_mode: str = "eager") -> RowWriter:
        """A row writer with the fields that all rows of this job share; None: there is no model."""
        return RowWriter(
            model=self.arm.name,
            mixer=self.arm.architecture if model is None else model.config.mixer,
            parameters=None if model is None else model.count_parameters(),
            seed=self.seed,
            device=device_name(self.device.type, self.manifest["gpus"]),
            provider="torch" if model is None else used_providers(model),
            launch_mode=launch_mode,
            config_hash=self.config_hash,
            code_fingerprint=self.code_fingerprint,
            manifest_id=self.manifest["manifest_id"],
        )

    def attempt(self, make: Callable[[], Made], failed_before: str | None = None) -> Made | None:
        """What `make` returns; None where the arm fails and the job keeps going (`failure`).

        Args:
            make: Builds, loads or trains the model of the arm.
            failed_before: Why an earlier stage has left none, if so.
        """
        if not self.keep_going:
            return make()
        self.failure = failed_before
        try:
            if self.failure is None:
                self.config.check_arm(self.arm)
                return make()
        except Exception as error:
            self.failure = reason_of(error)
        return None

    def error_writer(self, expected: Iterable[Mapping[str, Any]]) -> RowWriter:
        """A writer with an error row at each of the coordinates, after an attempt that failed."""
        print(f"ham: warning: arm {self.arm.name!r} failed: {self.failure}", file=sys.stderr)
        writer = self.writer(None)
        for fields in expected:
            writer.add(**fields, value=None, error=self.failure)
        return writer

    def finish(self, writer: RowWriter, rows_path: str | Path) -> None:
        """Write the manifest, then the rows: a rows file never stands without its manifest."""
        seconds = time.perf_counter() - self.started
        write_manifest(manifest_path(rows_path), self.manifest, wall_seconds=seconds)
        writer.write(rows_path)


def used_providers(model: LanguageModel) -> str:
    """Providers of the operations that a model calls and of its attention, where its weights are.

    `auto` is resolved for the device alone; sizes that a provider refuses are not looked at.

    Returns:
        Their distinct names joined with "+"; `torch` for a mixer that names none, and the library
        for a model of another one.
    """
    from ham.kernels.registry import TORCH, find_provider

    library = getattr(model, "library", None)
    if library is not None:
        return library
    mixers = [block.mixer for block in model.blocks]
    operations = [
        find_provider(operation, mixer.shape.kernels, model.device).name
        for mixer in mixers
        for operation in mixer.operations
    ]
    attention = [mixer.attention_provider(model.device) for mixer in mixers]
    return "+".join(dict.fromkeys(filter(None, [*operations, *attention]))) or TORCH


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all three stages share."""
    parser.add_argument("config", nargs="+", help="YAML file; later ones overlay earlier ones")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    parser.add_argument("--arm", required=True, help="name of an arm in the configuration")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `ham prepare`")
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="if the arm fails, write error rows in the place of its results and end with status 0",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the stages that read a trained model and write rows."""
    add_job_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of the model (default: the arm's own `checkpoint`)"
    )
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to write")


@contextlib.contextmanager
def open_job(
    arguments: argparse.Namespace,
    stage: str,
    *,
    output: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Iterator[Job]:
    """Validate the request, take the device, collect the manifest.

    Args:
        arguments: Those of `add_job_arguments`, and `out` or `rows`.
        stage: `train`, `evaluate` or `measure`; also of a job that does a part of such a stage.
        output: What the job owns while it runs; that of the stage when None.
        extra: Further values for the manifest.

    Raises:
        ConfigError: If the configuration, the arm or the seed is not legal.
        DeviceError: If the configured device is not there.
    """
    config = load_config(arguments.config, arguments.overrides).check_tasks()
    arm = config.arm(arguments.arm)
    keep_going = getattr(arguments, "keep_going", False)
    if not keep_going:
        config.check_arm(arm)
    if arguments.seed not in config.seeds_of(arm):
        raise ConfigError(
            f"seed {arguments.seed} is not one of arm {arm.name!r}; known: {config.seeds_of(arm)}"
        )
    if stage == "train" and not arm.trained:
        raise ConfigError(
            f"arm {arm.name!r} is not trained: it reads the checkpoint "
            f"{arm.checkpoint or f'of {arm.checkpoint_of!r}'}"
        )
    output = output or (arguments.out if stage == "train" else arguments.rows)
    with sole_writer(output), gpu_lease(config.device):
        import torch

        device = resolve_device(config.device)
        torch.set_num_threads(config.threads_per_job)
        resolved = config.model_dump(mode="json")
        yield Job(
            stage=stage,
            config=config,
            arm=arm,
            seed=arguments.seed,
            device=device,
            config_hash=stage_hash(config, stage, arm.name),
            code_fingerprint=stage_fingerprint(stage, arm.code),
            manifest=collect_manifest(resolved, sys.argv, [arguments.seed], extra),
            keep_going=keep_going,
        )
