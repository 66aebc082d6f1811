"""Invented rows in the shape of real ones, to test and to preview the report.

Every number comes from a formula below; none was measured. The device says so in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ham.report.rows import Row, RowWriter
from ham.report.statistics import wilson_interval

MANIFEST_ID = "synthetic000"
DEVICE = "synthetic device (invented numbers)"
MODELS = {
    "transformer": "transformer",
    "sliding-window": "sliding-window",
    "gated-delta-rule": "gated-delta-rule",
    "mamba2": "mamba2",
    "ham-cosine": "ham",
    "ham-committed": "ham",
}
QUALITY = {
    "transformer": 2.30,
    "sliding-window": 2.38,
    "gated-delta-rule": 2.36,
    "mamba2": 2.41,
    "ham-cosine": 2.32,
    "ham-committed": 2.335,
}
KV_FRACTION = {"transformer": 1.0, "ham-cosine": 0.25, "ham-committed": 0.24}
RECALL = {
    "transformer": 0.9,
    "sliding-window": 0.35,
    "gated-delta-rule": 0.5,
    "mamba2": 0.4,
    "ham-cosine": 0.8,
    "ham-committed": 0.75,
}
SLOPE = {"transformer": 1.0, "sliding-window": 0.1}
UNIGRAM = 4.52
CLASSES = {
    "recall": (0.3, -0.4),
    "other": (0.7, 0.2),
    "recall_rare": (0.05, 0.6),
    "rare": (0.25, 1.4),
    "frequent": (0.75, -0.5),
}
CONTEXTS = (128, 256, 512, 1024)
CONFIG = {
    "name": "synthetic",
    "title": "Synthetic preview",
    "scale": "smoke",
    "seeds": [0],
    "data": {"context": 512},
    "arms": [
        {
            "name": name,
            "mixer": mixer,
            "options": {"target": 0.25} if mixer == "ham" else {},
        }
        for name, mixer in MODELS.items()
    ],
}


def make_rows(
    seeds: Sequence[int] = (0,),
    models: Sequence[str] = tuple(MODELS),
    *,
    failures: bool = True,
    omit: Sequence[str] = (),
    steps: int = 200,
) -> list[Row]:
    """Rows of every experiment.

    Args:
        seeds: Seeds; numbers differ a little between them.
        models: Arms; unknown names get the numbers of `mamba2`.
        failures: Whether some cells failed.
        omit: Experiments to leave out.
        steps: Training steps.
    """
    rows: list[Row] = []
    for model in models:
        for seed in seeds:
            rows += _model_rows(model, seed, failures, steps)
    return [row for row in rows if row.experiment not in omit]


def _model_rows(model: str, seed: int, failures: bool, steps: int) -> list[Row]:
    known = model if model in QUALITY else "mamba2"
    writer = RowWriter(
        model=model,
        mixer=MODELS.get(model, "custom"),
        parameters=640_000 + 1_000 * list(QUALITY).index(known),
        seed=seed,
        device=DEVICE,
        launch_mode="eager",
        config_hash="feedc0ffee00",
        manifest_id=MANIFEST_ID,
    )
    noise = np.random.default_rng([seed, len(model), ord(model[-1])])
    _train(writer, known, noise, steps)
    _language_modelling(writer, known, noise)
    _lm_eval(writer, known, noise)
    _needle(writer, known, noise, failures)
    _recall(writer, known, noise)
    _dial(writer, known, noise)
    _throughput(writer, known, noise, failures)
    _memory(writer, known, failures)
    if known in ("ham-cosine", "ham-committed"):
        _gates(writer)
        _agreement(writer)
    return writer.rows


def _train(writer: RowWriter, model: str, noise: np.random.Generator, steps: int) -> None:
    final = QUALITY[model] * math.log(2)
    for step in range(10, steps + 1, 10):
        curve = final + 3.6 * math.exp(-step / (0.22 * steps))
        add = dict(task="train", x_name="step", x_value=step)
        writer.add("train", "loss_nats", curve + noise.normal(0, 0.05), **add)
        if step % 50 == 0:
            add["task"] = "validation"
            writer.add("train", "loss_nats", curve + 0.03 + noise.normal(0, 0.01), **add)
            writer.add("train", "loss_nats", 0.5 * curve, **{**add, "task": "recall"})
        if model in ("ham-cosine", "ham-committed"):
            for layer in range(2):
                fraction = 0.25 + (0.5 - 0.2 * layer) * math.exp(-step / 60) * math.cos(step / 25)
                where = dict(x_name="step", x_value=step, labels={"layer": layer})
                writer.add("train", "kv_fraction", fraction, task="train", **where)
                writer.add("train", "threshold", 0.4 + 0.1 * layer, **where)
    writer.add("train", "tokens_per_second", 21_000 + 900 * noise.random())
    writer.add("train", "wall_seconds", 38 + noise.random())
    writer.add("train", "peak_memory_bytes", 7e8)


def _language_modelling(writer: RowWriter, model: str, noise: np.random.Generator) -> None:
    kv = KV_FRACTION.get(model)
    task = "public_domain_test"
    for context in (256, 512):
        value = QUALITY[model] + (0.06 if context == 256 else 0) + noise.normal(0, 0.01)
        writer.add(
            "language_modelling",
            "bits_per_byte",
            value,
            task=task,
            x_name="context",
            x_value=context,
            n=24,
            low=value - 0.07,
            high=value + 0.06,
            interval="bootstrap95",
            kv_fraction=kv,
        )
        for index in range(8):
            position = context * (index + 0.5) / 8
            loss = 1.55 + 0.9 * math.exp(-position / 60) + 0.2 * (QUALITY[model] - 2.3) * index
            writer.add(
                "language_modelling",
                "loss_nats",
                loss + noise.normal(0, 0.01),
                task=task,
                x_name="position",
                x_value=position,
                labels={"context": context},
            )
            writer.add(
                "language_modelling",
                "position_bits_per_byte",
                loss / math.log(2),
                task=task,
                x_name="position",
                x_value=position,
                labels={"context": context},
            )
        for name, (share, extra) in CLASSES.items():
            where = dict(task=task, x_name="context", x_value=context, kv_fraction=kv)
            where["labels"] = {"token_class": name}
            writer.add("language_modelling", "class_bytes", 20_000 * share, n=24, **where)
            cost = value + extra - (0.3 * RECALL[model] if "recall" in name else 0)
            writer.add("language_modelling", "class_bits_per_byte", cost, n=24, **where)
        if model in ("ham-cosine", "ham-committed"):
            for layer in range(2):
                writer.add(
                    "language_modelling",
                    "kv_fraction",
                    kv + 0.02 * (layer - 0.5),
                    task=task,
                    x_name="context",
                    x_value=context,
                    labels={"layer": layer},
                )
    writer.add("language_modelling", "unigram_bits_per_byte", UNIGRAM, task=task)


def _gates(writer: RowWriter) -> None:
    """Attention opens with depth, from a fifth to two fifths; the recurrent memory stays."""
    for layer in range(2):
        where = dict(task="public_domain_test", x_name="layer", x_value=layer, n=4096)
        for branch, mean in (("recurrent", 0.7), ("attention", 0.2 * (layer + 1))):
            labels = {"branch": branch}
            writer.add("gates", "gate_mean", mean, labels=labels, **where)
            writer.add("gates", "gate_p5", mean / 2, labels=labels, **where)
            writer.add("gates", "gate_p95", mean + 0.1, labels=labels, **where)
        writer.add("gates", "branch_norm_ratio", 0.3 + 0.1 * layer, **where)


def _agreement(writer: RowWriter) -> None:
    """Steps differ from reading at once in 3 + 2 of 2 × 500 decisions, the farthest by 0.002."""
    for form, flips in (("pieces of 64", (0, 0)), ("steps", (3, 2))):
        labels = {"form": form, "against": "parallel in bfloat16", "precision": "bfloat16"}
        for layer in range(2):
            here = dict(n=500, labels={**labels, "layer": layer})
            writer.add("agreement", "flips", flips[layer], **here)
            writer.add("agreement", "flip_distance", 0.001 * layer * flips[layer], **here)
            writer.add("agreement", "near_threshold", 20 + layer, **here)
        writer.add("agreement", "logit_difference", 0.25, n=500, labels=labels)


def _share(writer: RowWriter, experiment: str, metric: str, p: float, n: int, **where) -> None:
    p = min(1.0, max(0.0, p))
    estimate = wilson_interval(round(p * n), n)
    writer.add(
        experiment,
        metric,
        estimate.value,
        n=n,
        low=estimate.low,
        high=estimate.high,
        interval=estimate.interval,
        **where,
    )


def _lm_eval(writer: RowWriter, model: str, noise: np.random.Generator) -> None:
    for task, chance, top in (
        ("held_out_last_word", 0.0, 0.2),
        ("held_out_continuation", 0.25, 0.45),
    ):
        p = top - 0.3 * (QUALITY[model] - 2.3) + noise.normal(0, 0.01)
        _share(writer, "lm_eval", "accuracy", p, 60, task=task)
        writer.add("lm_eval", "chance_accuracy", chance, task=task)
        writer.add("lm_eval", "untrained_accuracy", chance + 0.01, task=task, n=60)
    writer.add("lm_eval", "bits_per_byte", QUALITY[model] + 0.05, task="held_out_perplexity", n=8)


def _needle(writer: RowWriter, model: str, noise: np.random.Generator, failures: bool) -> None:
    for length in (256, 512, 1024):
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            where = dict(
                task="niah_single_2", x_name="length", x_value=length, labels={"depth": depth}
            )
            if failures and model == "mamba2" and length == 1024:
                error = "RuntimeError: invented failure of the needle at 1024 tokens"
                writer.add("needle", "accuracy", None, error=error, **where)
                continue
            p = RECALL[model] - 0.25 * (1 - depth) * length / 1024 + noise.normal(0, 0.05)
            _share(writer, "needle", "accuracy", p, 20, **where)
            writer.add("needle", "answer_loss_nats", 2 - 1.5 * p, **where)
            if model in ("ham-cosine", "ham-committed"):
                writer.add("needle", "kept_fraction", 0.3 + 0.5 * depth, **where)
        _needle_of_four(writer, model, length)


def _needle_of_four(writer: RowWriter, model: str, length: int) -> None:
    """Four answers a sample, so no depth; who routes also says which needles it kept."""
    where = dict(task="niah_multivalue", x_name="length", x_value=length)
    p = 0.5 * RECALL[model]
    _share(writer, "needle", "accuracy", p, 20, **where)
    _share(writer, "needle", "string_match_all", p, 80, **where)
    writer.add("needle", "samples_left_out", 5 * (length == 1024), n=25, **where)
    if model in ("ham-cosine", "ham-committed"):
        for least, routed in enumerate((1.0, 0.5, 0.25)):
            labels = {"min_layers": least}
            _share(writer, "needle", "needles_routed", routed, 80, labels=labels, **where)
            many = round(80 * routed)
            p = 0.4 + 0.2 * least
            _share(writer, "needle", "accuracy_if_routed", p, many, labels=labels, **where)
            if least:
                metric = "accuracy_if_not_routed"
                _share(writer, "needle", metric, 0.3, 80 - many, labels=labels, **where)


def _recall(writer: RowWriter, model: str, noise: np.random.Generator) -> None:
    for pairs in (2, 4, 8, 16):
        p = RECALL[model] * (1 - 0.11 * math.log2(pairs)) + noise.normal(0, 0.02)
        _share(writer, "recall", "accuracy", p, 80, task="pairs", x_name="pairs", x_value=pairs)


def _dial(writer: RowWriter, model: str, noise: np.random.Generator) -> None:
    if model not in ("ham-cosine", "ham-committed"):
        return
    for target in (0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0):
        value = QUALITY[model] + 0.08 * math.exp(-9 * target) + noise.normal(0, 0.002)
        where = dict(task="public_domain_test", x_name="target_fraction", x_value=target)
        where["kv_fraction"] = min(1.0, target * 0.97)
        spread = dict(n=12, low=value - 0.02, high=value + 0.02, interval="bootstrap95")
        writer.add("dial", "bits_per_byte", value, **where, **spread)
        for name in ("needle", "recall"):
            hits = RECALL[model] * (1 - 0.7 * math.exp(-6 * target))
            _share(writer, "dial", f"{name}_accuracy", hits, 40, **where)
        where["labels"] = {"context": CONTEXTS[-1]}
        writer.add("dial", "kv_bytes", 512_000 * target, **where)
        writer.add("dial", "cache_bytes_allocated", 40_000 + 512_000 * target, **where)
        times = dict(n=8, low=2.9 + target, high=3.2 + target, interval="p20_p80")
        writer.add("dial", "decode_ms", 3 + target, **where, **times)


def _throughput(writer: RowWriter, model: str, noise: np.random.Generator, failures: bool) -> None:
    for context in CONTEXTS:
        linear = 3 + 0.5 * len(model) / 10
        quadratic = context / 128 if model == "transformer" else 1 + 0.2 * context / 1024
        for task, metric, tokens, cost in (
            ("train", "training_step_ms", context, 3 * linear),
            ("prefill", "prefill_ms", context, linear),
            ("decode", "decode_ms", 1, 20 * linear),
        ):
            where = dict(task=task, x_name="context", x_value=context, labels={"batch_size": 1})
            if failures and model == "sliding-window" and context == 1024 and task == "train":
                error = "OutOfMemoryError: invented: tried to allocate 9 GiB"
                writer.add("throughput", metric, None, error=error, **where)
                writer.add("throughput", "tokens_per_second", None, error=error, **where)
                continue
            ms = cost * tokens / 128 * (0.8 + 0.2 * quadratic) * (1 + 0.03 * noise.random())
            spread = dict(n=5, low=ms * 0.97, high=ms * 1.05, interval="p20_p80")
            writer.add("throughput", metric, ms, **where, **spread)
            rate = 1000 * tokens / ms
            spread = dict(n=5, low=rate / 1.05, high=rate / 0.97, interval="p20_p80")
            writer.add("throughput", "tokens_per_second", rate, **where, **spread)


def _memory(writer: RowWriter, model: str, failures: bool) -> None:
    fraction = KV_FRACTION.get(model, 0.0)
    recurrent = 0 if model in ("transformer", "sliding-window") else 33_000
    window = 64 if model == "sliding-window" else 0
    for context in CONTEXTS:
        kv = 2048 * (max(fraction * context, min(window, context)))
        kinds = {
            "kv_bytes": kv,
            "positions_bytes": kv / 512,
            "page_table_bytes": 0.0,
            "recurrent_bytes": recurrent,
            "conv_bytes": 1536 if recurrent else 0,
        }
        used = sum(kinds.values())
        where = dict(task="decode", x_name="context", x_value=context)
        writer.add("memory", "cache_bytes_used", used, **where)
        writer.add("memory", "cache_bytes_allocated", used * 1.1, **where)
        writer.add("memory", "declared_bytes", used, **where)
        for metric, value in kinds.items():
            writer.add("memory", metric, value, **where)
        for task, factor in (("train", 40_000), ("prefill", 9_000)):
            where["task"] = task
            if failures and model == "sliding-window" and context == 1024 and task == "train":
                error = "OutOfMemoryError: invented: tried to allocate 9 GiB"
                writer.add("memory", "peak_memory_bytes", None, error=error, **where)
            else:
                writer.add("memory", "peak_memory_bytes", 3e6 + factor * context, **where)
    for position in range(64, 1025, 64):
        wave = 1 + 0.15 * math.sin(position / 90) if fraction < 1 else 1.0
        kv = 2048 * max(fraction * position * wave, min(window, position))
        writer.add("memory", "kv_bytes", kv, task="kv_growth", x_name="position", x_value=position)


@pytest.fixture(name="make_rows", scope="session")
def _make_rows() -> Callable[..., list[Row]]:
    """The function `make_rows`, for tests."""
    return make_rows


@pytest.fixture(name="config", scope="session")
def _config() -> dict:
    """A configuration that belongs to the rows."""
    return CONFIG


@pytest.fixture(scope="session")
def manifest() -> dict:
    """The manifest that the rows name."""
    return {
        "manifest_id": MANIFEST_ID,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": True,
        "dirty_hash": "beef",
        "cpu": "Imaginary CPU",
        "threads": 1,
        "gpus": [{"name": "Imaginary GPU", "driver": "1.2", "temperature_celsius": 40.0}],
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "command": ["ham", "train", "a config.yaml", "--arm", "transformer"],
        "wall_seconds": 41.25,
    }


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, manifest: dict) -> Path:
    """A whole report of one seed with failures."""
    from ham.report.build import build_report

    folder = tmp_path_factory.mktemp("report")
    build_report(make_rows(), folder, config=CONFIG, manifests=[manifest])
    return folder
