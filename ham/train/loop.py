"""The training loop: the same for every architecture, resumable at any step.

Each optimiser step is a pure function of the state before it and of (seed, step), so a run that
was killed and resumed ends with the same weights, bit for bit on a CPU, as one left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ham.config import Config
from ham.device import processes_on_gpu
from ham.errors import ConfigError
from ham.job import Job
from ham.measure.cost import TRAINING_PASSES
from ham.measure.device import model_flops_utilisation
from ham.model.calibration import calibrate, realised_fractions, thresholds
from ham.model.checkpoint import save_model
from ham.model.language_model import flops_labels
from ham.model.model_config import ModelConfig
from ham.model.precision import precision_context
from ham.model.sizing import model_config
from ham.progress import ProgressReporter
from ham.report.manifest import device_name
from ham.report.rows import ROUTING_SEED, RowWriter
from ham.report.statistics import mean
from ham.routing.router import Router
from ham.train.batches import BatchSampler
from ham.train.clock import StepClock
from ham.train.interrupt import StopRequest
from ham.train.optimiser import learning_rate, make_optimiser
from ham.train.shards import TokenShard
from ham.train.state import load_state, random_state, restore_random_state, save_state
from ham.train.step import OptimiserStep, StepResult
from ham.train.tokenizer import load_tokenizer
from ham.train.tuning import LABEL
from ham.train.validation import mean_loss, mixture_loss

HELD_OUT_SEED = 0
TRAINING_TEXT = "training_text"
"""Task of the loss on text that was trained on, without recall documents: beside the validation
loss it says how far a model has learned its corpus by heart."""
STATE_ROOT = Path("results/.state")


def expected_rows(steps: int) -> list[dict[str, Any]]:
    """Coordinates of the main rows of a training run that ended after `steps`."""
    where = {"experiment": "train", "metric": "loss_nats", "x_name": "step", "x_value": steps}
    return [{**where, "task": task} for task in ("train", "validation")]


class Trainer:
    """Trains one arm with one seed.

    Args:
        job: Arm, seed, configuration and device.
        data_folder: Folder made by `ham prepare`.
        state_root: Where the resumable state lies, outside every workflow output.
    """

    def __init__(self, job: Job, data_folder: Path, state_root: Path = STATE_ROOT):
        self.job = job
        self.config: Config = job.config
        self.settings = job.config.training(job.arm)
        self.data_folder = data_folder
        key = f"{job.arm.name}-seed{job.seed}-{job.config_hash}-{job.code_fingerprint}"
        self.state_path = state_root / key / "state.pt"
        self.tokenizer = load_tokenizer(self.config.data.tokenizer, data_folder)
        self.batches = self._sampler("train", self.config.data.recall_fraction, job.seed)
        torch.manual_seed(job.seed)
        described = model_config(self.config, job.arm, self.tokenizer.vocabulary_size)
        if isinstance(described, ModelConfig):
            described = dataclasses.replace(described, seed=job.seed)
        self.model = described.build().to(job.device)
        with self._autocast():
            self.model.check_trains()
        self.optimiser = make_optimiser(self.model, self.settings)
        self.optimiser_step = OptimiserStep(self.model, self.optimiser, self.settings)
        self.step = 0
        self.clock = StepClock()
        self.log: list[dict[str, Any]] = []
        self.calibrated: list[float] | None = None
        self._stop_request = StopRequest()

    def run(self, out_folder: Path | None) -> RowWriter:
        """Train to the end, write `out_folder/checkpoint`, return the rows.

        Args:
            out_folder: None for a run that leaves no checkpoint.

        Raises:
            SystemExit: With status 128 + n after signal n, once the state is saved.
            ConfigError: If the loss is no longer finite.
            RoutingError: If a routing score is not.
        """
        self._restore()
        self._count_tokens()
        self.model.train()
        with self._stop_request.listening(), self._progress() as progress:
            last_save = time.monotonic()
            while self.step < self.settings.steps:
                loss, fractions = self._advance()
                self._record(loss, fractions)
                progress.advance(note=self._note(loss, fractions))
                saved = time.monotonic() - last_save >= self.settings.checkpoint_seconds
                if saved or self._stop_request.signal is not None:
                    self._save()
                    last_save = time.monotonic()
                if self._stop_request.signal is not None:
                    self._stop_request.leave(self.step)
        return self._finish(out_folder)

    def losses(self) -> Iterator[StepResult]:
        """Train to the end, and neither log, validate nor save anything.

        Yields:
            After each optimiser step the mean loss and the routed fraction of each layer. They
            stay on the device: reading one waits for it.
        """
        self._count_tokens()
        self.model.train()
        while self.step < self.settings.steps:
            yield self._advance()

    @property
    def freeze_step(self) -> int:
        """The step before which routing thresholds are calibrated and frozen."""
        return self.settings.steps - math.ceil(self.settings.steps * self.settings.freeze_fraction)

    def _sampler(self, split: str, recall_fraction: float, seed: int) -> BatchSampler:
        # Hashing a full-scale training shard (100 GB) takes minutes; its size is always checked.
        verify = split != "train" or self.config.data.source == "public_domain"
        shard = TokenShard.open(self.data_folder / f"{split}.tokens", verify=verify)
        return BatchSampler(
            shard,
            self.tokenizer,
            self.config.data.context,
            self.settings.batch_size,
            recall_fraction,
            seed,
        )

    def _advance(self) -> StepResult:
        """One optimiser step, timed, after freezing the thresholds where it is time to."""
        if self.step == self.freeze_step:
            self._freeze()
        begin = time.perf_counter()
        batch = self.batches.batch(self.step)
        inputs_BT, targets_BT = (torch.as_tensor(x) for x in (batch.inputs_BT, batch.targets_BT))
        rate = learning_rate(self.step, self.settings)
        result = self.optimiser_step(inputs_BT, targets_BT, rate)
        self.step += 1
        if self._logs_now and self.job.device.type == "cuda":
            # What is queued belongs into the time of the steps that queued it.
            torch.cuda.synchronize(self.job.device)
        self.clock.add(time.perf_counter() - begin, waited=self._logs_now)
        return result

    @property
    def _logs_now(self) -> bool:
        done, settings = self.step, self.settings
        return done % settings.log_every == 0 or done == 1 or done == settings.steps

    def _autocast(self) -> contextlib.AbstractContextManager:
        return precision_context(self.job.device, self.settings.precision)

    def _record(self, loss: Tensor, fractions: list[Tensor]) -> None:
        if self._logs_now:
            value = float(loss)
            if not math.isfinite(value):
                raise ConfigError(
                    f"the loss of arm {self.job.arm.name!r} is {value} at step {self.step}; "
                    f"lower train.learning_rate (now {self.settings.learning_rate})"
                )
            self.model.check_scores()
            self._log("loss_nats", value, task="train")
            for layer, fraction in zip(self.model.routing_layers, fractions, strict=True):
                self._log("kv_fraction", float(fraction), task="train", layer=layer)
            for layer, threshold in zip(
                self.model.routing_layers, thresholds(self.model), strict=True
            ):
                if math.isfinite(threshold):
                    self._log("threshold", threshold, layer=layer)
        if self.step % self.settings.validation_every == 0 or self.step == self.settings.steps:
            self._validate()
        if self.step == self.settings.steps:
            self._log("loss_nats", self._mean_loss("train", 0.0), task=TRAINING_TEXT)

    def _log(self, metric: str, value: float, task: str | None = None, **labels: int) -> None:
        self.log.append(
            {"metric": metric, "value": value, "task": task, "step": self.step, "labels": labels}
        )

    def _validate(self) -> None:
        """Log the losses on held-out text and, where recall documents are read, on those."""
        text = self._mean_loss("validation", recall_fraction=0.0)
        self._log("loss_nats", text, task="validation")
        share = self.config.data.recall_fraction
        if share:
            recall = self._mean_loss("validation", recall_fraction=1.0)
            self._log("loss_nats", recall, task="recall")
            self._log("loss_nats", mixture_loss(text, recall, share), task="mixture")

    def _mean_loss(self, split: str, recall_fraction: float) -> float:
        """Mean loss in nats per target on rows of a split, the same ones for every arm."""
        sampler = self._sampler(split, recall_fraction, HELD_OUT_SEED)
        batches, precision = self.settings.validation_batches, self.settings.precision
        return mean_loss(self.model, sampler, batches, precision)

    def _freeze(self) -> None:
        """Set every routing threshold on a held-out split; the closed loop ends.

        Done once more with the final weights: the scores go on moving while the weights do.
        """
        if not self.model.routes:
            return
        batches = self._held_out("calibration", self.settings.calibration_batches)
        with self._autocast():
            self.calibrated = calibrate(self.model, batches)

    def _held_out(self, split: str, count: int) -> list[Tensor]:
        """Micro-batches `tokens_BT` of windows spread over a split; the same for every arm.

        Args:
            split: Which.
            count: Batches; fewer come where the split has no more.
        """
        shard = TokenShard.open(self.data_folder / f"{split}.tokens")
        batch = self.settings.batch_size
        windows_NT = torch.from_numpy(shard.even_windows(self.config.data.context, count * batch))
        return list(windows_NT.to(self.job.device).split(batch // self.settings.accumulate))

    def _count_tokens(self) -> None:
        """Tell routers that score rarity how often each token occurs in the training text."""
        if self.step == 0 and self.model.needs_unigram_counts:
            self.model.set_unigram_counts(torch.from_numpy(self.batches.shard.count_tokens()))

    def _routing_facts(self) -> dict[str, Any]:
        """What the routers were asked for and what they do on validation text, by layer.

        No target where none is followed, no threshold where it is infinite or not used.
        """
        if self.freeze_step < self.settings.steps:
            self._freeze()
        self.model.eval()
        count = max(self.settings.validation_batches, self.settings.calibration_batches)
        with self._autocast():
            shares = realised_fractions(self.model, self._held_out("validation", count))
        self.model.check_scores()
        for layer, share in shares.items():
            self._log("kv_fraction", share, task="validation", layer=layer)
        finite = [value if math.isfinite(value) else None for value in thresholds(self.model)]
        targets = [
            controller.target if controller.control in ("loop", "share") else None
            for controller in self.model.controllers
        ]
        return {
            "layers": list(shares),
            "targets": targets,
            "thresholds": finite,
            "calibration_fractions": self.calibrated,
            "validation_fractions": list(shares.values()),
        }

    def _trained_fraction(self) -> float | None:
        """Routed share of the logged training steps, mean over layers; None without routing."""
        shares = [
            entry["value"]
            for entry in self.log
            if (entry["metric"], entry["task"]) == ("kv_fraction", "train")
        ]
        return mean(shares) if shares else None

    def _restore(self) -> None:
        state = load_state(self.state_path, self.job.device)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        restore_random_state(state["random"])
        self.step = state["step"]
        self.clock.seconds = state["train_seconds"]
        self.log = state["log"]
        print(f"resuming {self.job.arm.name} at step {self.step}", file=sys.stderr)

    def _save(self) -> None:
        save_state(
            self.state_path,
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "random": random_state(),
                "step": self.step,
                "train_seconds": self.clock.seconds,
                "log": self.log,
            },
        )

    def _finish(self, out_folder: Path | None) -> RowWriter:
        tokens = self.settings.steps * self.settings.batch_size * self.config.data.context
        facts: dict[str, Any] = {"steps": self.step, "tokens": tokens, "seed": self.job.seed}
        matched = getattr(self.model.config, "matched", None)
        if matched is not None:
            facts["parameters_matched"] = matched
        if self.model.routes:
            facts["routing"] = self._routing_facts()
        if out_folder is not None:
            save_model(out_folder / "checkpoint", self.model, self.data_folder, facts)
        if self.optimiser_step.note is not None:
            print(f"ham: warning: {self.optimiser_step.note}", file=sys.stderr)
        writer = self.job.writer(self.model, self.optimiser_step.launch_mode)
        for entry in self.log:
            writer.add(
                "train",
                entry["metric"],
                entry["value"],
                task=entry["task"],
                x_name="step",
                x_value=entry["step"],
                labels=entry["labels"],
            )
        fraction = self._trained_fraction()
        per_sequence = self.model.forward_flops(
            self.config.data.context, 1.0 if fraction is None else fraction
        )
        flops = TRAINING_PASSES * per_sequence * self.settings.steps * self.settings.batch_size
        labels = flops_labels(self.model)
        writer.add("train", "training_flops", flops, kv_fraction=fraction, labels=labels)
        writer.add("train", LABEL, self.settings.learning_rate)
        for seed in {each.seed for each in self.model.modules() if isinstance(each, Router)}:
            writer.add("train", ROUTING_SEED, seed)
        shared = shared_gpu_labels()
        writer.add("train", "tokens_per_second", tokens / self.clock.seconds, labels=shared)
        writer.add("train", "wall_seconds", self.clock.seconds, labels=shared)
        texts = self.settings.steps * self.settings.batch_size
        texts *= 1 - self.config.data.recall_fraction
        writer.add("train", "corpus_epochs", texts / self.batches.windows)
        self._add_steady_speed(writer)
        writer.add("train", "peak_memory_bytes", peak_memory_bytes(self.job.device))
        return writer

    def _add_steady_speed(self, writer: RowWriter) -> None:
        """Speed and share of the peak without what is paid once; nothing after a short run."""
        clock = self.clock
        if not clock.steady_steps:
            return
        step_seconds = clock.steady_seconds / clock.steady_steps
        tokens = self.settings.batch_size * self.config.data.context
        shared = shared_gpu_labels()
        writer.add("train", "steady_tokens_per_second", tokens / step_seconds, labels=shared)
        per_sequence = self.model.forward_flops(
            self.config.data.context, self.model.target_fraction
        )
        flops = TRAINING_PASSES * per_sequence * self.settings.batch_size
        share = model_flops_utilisation(flops, step_seconds, device_name(self.job.device.type))
        if share is not None:
            labels = {**flops_labels(self.model), **shared}
            writer.add("train", "mfu_fraction", share, labels=labels)

    def discard_state(self) -> None:
        """Remove the resumable state of a run whose outputs are written."""
        shutil.rmtree(self.state_path.parent, ignore_errors=True)

    def _progress(self) -> ProgressReporter:
        title = f"train {self.job.arm.name} seed {self.job.seed}"
        return ProgressReporter(title, self.settings.steps, done=self.step)

    def _note(self, loss: Tensor, fractions: list[Tensor]) -> str:
        """Loss, speed and routed fraction; read from the device only when a line will be shown."""
        if self.step % self.settings.log_every and self.step != self.settings.steps:
            return self._last_note
        tokens = self.settings.batch_size * self.config.data.context * self.step
        note = f"loss {float(loss):.3f}  {tokens / self.clock.seconds:,.0f} tokens/s"
        if fractions:
            note += f"  kv {float(torch.stack(fractions).mean()):.3f}"
        self._last_note = note
        return note

    _last_note = ""


def shared_gpu_labels() -> dict[str, Any]:
    """What marks a speed that other processes on the same GPU have slowed down."""
    processes = processes_on_gpu()
    return {"gpu_processes": processes} if processes > 1 else {}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated device memory, or of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
