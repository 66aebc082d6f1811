"""Threats to validity, each computed from the rows, the configuration and the manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ham.report import formats
from ham.report.aggregate import Results
from ham.report.answer import FEWEST_SEEDS
from ham.report.formats import join_words
from ham.report.needle_seeds import FEW, bimodal, seeds_that_find
from ham.report.provenance import Manifest
from ham.report.rows import ROUTING_SEED
from ham.train.tuning import best_rate, edge_of, last_losses

PAPER_SCALE = "800M parameters and 50B tokens"


def threats(
    results: Results, settings: Mapping[str, Any], manifests: Mapping[str, Manifest]
) -> str:
    """One text."""
    sizes = [size for size in map(results.parameters, results.models) if size]
    parts = []
    if sizes:
        parts.append(
            f"Scale: {formats.parameters(max(sizes))} parameters; the paper has {PAPER_SCALE}, "
            "where what is true here may not be."
        )
    if settings["data"].get("source") == "public_domain":
        parts.append(
            "Corpus: 25 MB of English books, plays and speeches, which are read several times."
        )
    parts += [_epochs(results), _edges(results)]
    few = [model for model in results.reported_models if len(results.seeds(model)) < FEWEST_SEEDS]
    if few:
        parts.append(f"Fewer than three seeds, which decide nothing: {join_words(few)}.")
    parts += [_one_hash(results, settings, manifests), _two_kinds_of_seeds(results)]
    parts.append("Seeds vary data order and weights, not the corpus or the machine.")
    return " ".join(filter(None, parts))


def _epochs(results: Results) -> str:
    passes, gaps = [], []
    for model in results.models:
        cell = results.cell("train", "corpus_epochs", model=model)
        passes += [cell.value] if cell.value is not None else []
        ends = [
            results.series("train", "loss_nats", model=model, task=task)
            for task in ("training_text", "validation")
        ]
        values = [points[-1].cell.value for points in ends if points]
        if len(values) == 2 and None not in values:
            gaps.append(values[1] - values[0])
    if not passes:
        return ""
    text = f"Repetition: the text was read {formats.significant(max(passes))} times"
    if gaps:
        low, high = formats.signed_bits(min(gaps)), formats.signed_bits(max(gaps))
        text += f"; held-out text costs {low} to {high} nats a token more than text that was read"
    return f"{text}."


def _edges(results: Results) -> str:
    at_edge = []
    for model in results.models:
        losses = {rate: row.value for rate, row in last_losses(results.rows, model).items()}
        best = best_rate(losses)
        if best is not None and edge_of(best, losses):
            at_edge.append(model)
    if not at_edge:
        return ""
    return f"Tuning: the best rate of {join_words(at_edge)} is at an end of those tried."


def _one_hash(
    results: Results, settings: Mapping[str, Any], manifests: Mapping[str, Manifest]
) -> str:
    """Arms that route at random by the same hash whatever the seed of the run."""
    same = [
        model
        for model in results.reported_models
        if len(results.seeds(model)) > 1 and len(_hashes(results, model, settings, manifests)) == 1
    ]
    if not same:
        return ""
    return (
        f"Control: {join_words(same)} route by one hash of the positions for every seed (option "
        "routing_seed), so their spread over seeds leaves out which tokens chance picks."
    )


def _hashes(
    results: Results, model: str, settings: Mapping[str, Any], manifests: Mapping[str, Manifest]
) -> set[int]:
    """The seeds of the routing hash of an arm that routes at random, over its jobs."""
    recorded = {row.seed: row.value for row in results.find("train", ROUTING_SEED, model=model)}
    jobs = {(row.manifest_id, row.seed) for row in results.find("train", "loss_nats", model=model)}
    found = set()
    for manifest, seed in jobs:
        config = manifests.get(manifest, {}).get("config") or settings
        for arm in config.get("arms", []):
            options = arm.get("options") or {}
            if arm["name"] == model and options.get("score") == "random":
                found.add(recorded.get(seed, options.get("routing_seed", 0)))
    return found


def _two_kinds_of_seeds(results: Results) -> str:
    models = bimodal(results)
    if not models:
        return ""
    counts = [f"{model} {seeds_that_find(results, model).words}" for model in models]
    return (
        "Needles: seeds are of two kinds, so means and t intervals describe no single model. Seeds "
        f"that find more than half of the needles at the shortest length: {join_words(counts)}; "
        f"others of the same model find fewer than {formats.share(FEW)}."
    )
