"""The first screen of a full run's report: asked, done, found, threats, how to run one cell again.

Every sentence is made from the configuration, the rows and the judged claims; a smoke run has none,
because its numbers answer nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ham.report import formats
from ham.report.aggregate import Results
from ham.report.formats import join_words
from ham.report.plots_cost import cache_cell
from ham.report.provenance import Manifest, rerun_command, stage_of
from ham.train.tuning import EXPERIMENT as TUNING
from ham.train.tuning import best_rate, edge_of, last_losses

if TYPE_CHECKING:
    from ham.claims.judge import JudgedClaim

PAPER_SCALE = "800M parameters and 50B tokens"
DECIDED = ("supported", "refuted")
FEWEST_SEEDS = 3
"""Fewer decide nothing."""


def first_screen(
    results: Results,
    settings: Mapping[str, Any],
    judged: Sequence[JudgedClaim] | None,
    manifests: Mapping[str, Manifest],
    missing: Sequence[str],
) -> list[tuple[str, str]]:
    """Topics and texts; empty for anything but a full run with its configuration.

    Args:
        results: The rows.
        settings: The configuration as plain values.
        judged: The claims with their verdicts, or None.
        manifests: By id.
        missing: Jobs of the configuration without rows.
    """
    described = settings.get("scale") == "full" and {"train", "data"} <= settings.keys()
    if not described or not results.models:
        return []
    topics = [
        ("Asked", _asked(judged or ())),
        ("Done", _done(results, settings)),
        ("Found", _found(judged or ())),
        ("Numbers", _numbers(results, settings["data"]["context"])),
        ("Missing", _missing(missing)),
        ("Threats to validity", _threats(results, settings)),
        ("Running a cell again", _rerun(results, manifests, settings)),
    ]
    return [(topic, text) for topic, text in topics if text]


def missing_jobs(settings: Mapping[str, Any], results: Results) -> list[str]:
    """Arms, stages and seeds of a configuration that no row is from, in words."""
    there = {(row.model, _stage(row), row.seed) for row in results.rows}
    tried = {
        (row.model, float(row.labels["learning_rate"]))
        for row in results.rows
        if row.experiment == TUNING
    }
    lines = []
    rates = (settings.get("tuning") or {}).get("learning_rates", [])
    for arm in settings.get("arms", []):
        name, trained = arm["name"], not arm.get("checkpoint_of")
        seeds = arm.get("seeds") or settings.get("seeds", [])
        if trained and not arm.get("tuned_like"):
            lines += [f"tuning {name} rate {r!r}" for r in rates if (name, r) not in tried]
        wanted = [("train", seed) for seed in seeds] if trained else []
        wanted += [("evaluate", seed) for seed in seeds]
        wanted += [("measure", seeds[0])] if settings.get("measure") and seeds else []
        lines += [
            f"{stage} {name} seed {seed}"
            for stage, seed in wanted
            if (name, stage, seed) not in there
        ]
    return lines


def _stage(row: Any) -> str:
    return TUNING if row.experiment == TUNING else stage_of(row)


def _asked(judged: Sequence[JudgedClaim]) -> str:
    if not judged:
        return ""
    statements = " ".join(f"{one.claim.id}: {one.claim.statement}" for one in judged[:4])
    more = f" And {len(judged) - 4} more." if len(judged) > 4 else ""
    when = "written before the runs unless the ledger says otherwise"
    return f"Do these claims, {when}, hold? {statements}{more}"


def _done(results: Results, settings: Mapping[str, Any]) -> str:
    train, data = settings["train"], settings["data"]
    tokens = train["steps"] * train["batch_size"] * data["context"]
    counts = [len(results.seeds(model)) for model in results.models]
    spans = sorted({min(counts), max(counts)})
    text = (
        f"{len(results.models)} models, {formats.count(tokens)} training tokens each "
        f"({data['tokenizer']} tokens, context {data['context']:,}), the same data order, "
        f"optimiser and, within 1 %, parameters; {' to '.join(map(str, spans))} seeds"
    )
    if data.get("recall_fraction"):
        text += f"; recall documents in {formats.share(data['recall_fraction'])} of the rows"
    tuning = settings.get("tuning")
    if tuning:
        text += (
            f"; {len(tuning['learning_rates'])} learning rates tried for every architecture on "
            f"seed {tuning['seed']}, which is not reported"
        )
    return f"{text}. On {join_words(results.devices())}."


def _found(judged: Sequence[JudgedClaim]) -> str:
    parts = []
    for verdict in DECIDED:
        claims = [one.claim for one in judged if one.verdict == verdict]
        texts = [f"{claim.id} ({claim.statement.rstrip('.')})" for claim in claims]
        parts.append(f"{verdict.capitalize()}: {join_words(texts) or 'none'}.")
    open_ones = [one.claim.id for one in judged if one.verdict == "inconclusive"]
    not_run = [one.claim.id for one in judged if one.verdict not in (*DECIDED, "inconclusive")]
    if open_ones:
        parts.append(
            f"Inconclusive: {join_words(open_ones)}; the ledger has the n that would settle each."
        )
    if not_run:
        parts.append(f"Not tested by this run: {join_words(not_run)}.")
    return " ".join(parts) if judged else ""


def _numbers(results: Results, context: int) -> str:
    """Loss, recall and memory of every model with three seeds, best loss first."""
    pairs = max(results.x_values("recall", "accuracy"), default=None)
    losses = {
        model: results.cell("language_modelling", "bits_per_byte", model=model, x=context)
        for model in results.models
    }
    known = {
        model: cell
        for model, cell in losses.items()
        if cell.value is not None and len(cell.by_seed) >= FEWEST_SEEDS
    }
    if not known:
        return ""
    texts = []
    for model in sorted(known, key=lambda name: known[name].value or 0.0):
        recall = results.cell("recall", "accuracy", model=model, x=pairs)
        parts = [formats.cell_text(known[model], formats.bits)]
        if recall.value is not None:
            parts.append(formats.share(recall.value))
        memory = cache_cell(results, model, context)
        if memory.value is not None:
            parts.append(formats.byte_size(memory.value))
        texts.append(f"{model} {', '.join(parts)}")
    recalled = f", share of {pairs:g} pairs recalled" if pairs else ""
    return f"Bits per byte{recalled} and decoding memory at {context:,} tokens: {'; '.join(texts)}."


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    shown = join_words(list(missing[:3]))
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{len(missing)} jobs have no rows: {shown}{more}; all are listed under “Not run”."


def _threats(results: Results, settings: Mapping[str, Any]) -> str:
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
    few = [model for model in results.models if len(results.seeds(model)) < FEWEST_SEEDS]
    if few:
        parts.append(f"Fewer than three seeds, which decide nothing: {join_words(few)}.")
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


def _rerun(results: Results, manifests: Mapping[str, Manifest], settings: Mapping[str, Any]) -> str:
    row = next((row for row in results.rows if row.experiment == "train"), results.rows[0])
    line = rerun_command(row, manifests, str(settings.get("name", "CONFIG")))
    return (
        "A cell's command is its tooltip, and the list of jobs has them all. For instance, at the "
        f"commit named below: {line}; then `ham diff` on both folders says whether curves and "
        "scores agree within their spread (README, “In pieces”)."
    )
