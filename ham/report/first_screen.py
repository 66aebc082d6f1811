"""The first screen of a full run's report: the answer, asked, done, found, threats, how to rerun.

Every sentence is made from the configuration, the rows and the judged claims; a smoke run has none,
because its numbers answer nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ham.claims.evidence import Evidence
from ham.report import formats
from ham.report.aggregate import Results
from ham.report.answer import answer, chance_words
from ham.report.formats import join_words
from ham.report.plots_cost import cache_cell
from ham.report.provenance import Manifest, rerun_command, stage_of
from ham.report.recall_words import windows_that_hold
from ham.report.rows import Row
from ham.report.speed_words import launch_words, measured_ratio
from ham.report.threats import threats
from ham.train.tuning import EXPERIMENT as TUNING

if TYPE_CHECKING:
    from ham.claims.judge import JudgedClaim

DECIDED = ("supported", "refuted")
SCORED = ("language_modelling", "recall", "needle", "dial", "lm_eval")
"""Experiments whose numbers a reference that learned nothing would make easy to beat."""
FLOPS = "training_flops"


def first_screen(
    results: Results,
    settings: Mapping[str, Any],
    judged: Sequence[JudgedClaim] | None,
    manifests: Mapping[str, Manifest],
    missing: Sequence[str],
    evidence: Evidence | None = None,
    pieces: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Topics and texts; empty for anything but a full run with its configuration.

    Args:
        results: The rows.
        settings: The configuration as plain values.
        judged: The claims with their verdicts, or None.
        manifests: By id.
        missing: Jobs of the configuration without rows.
        evidence: Rows beside those of the run.
        pieces: Packed state of the run, as a checkout has it.
    """
    described = settings.get("scale") == "full" and {"train", "data"} <= settings.keys()
    if not described or not results.models:
        return []
    topics = [
        *answer(results, settings, judged or (), evidence or Evidence()),
        ("Asked", _asked(judged or ())),
        ("Done", _done(results, settings)),
        ("Found", _found(results, settings, judged or ())),
        ("Numbers", _numbers(results, settings["data"]["context"])),
        ("Missing", _missing(missing)),
        ("Threats to validity", threats(results, settings, manifests)),
        ("Running a cell again", _rerun(results, manifests, settings, pieces)),
    ]
    return [(topic, text) for topic, text in topics if text]


def missing_jobs(
    settings: Mapping[str, Any],
    results: Results,
    manifests: Mapping[str, Manifest] | None = None,
) -> list[str]:
    """Arms, stages and seeds of a configuration that no row is from, in words."""
    there = {(row.model, _stage(row, manifests), row.seed) for row in results.rows}
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


def _stage(row: Row, manifests: Mapping[str, Manifest] | None) -> str:
    return TUNING if row.experiment == TUNING else stage_of(row, manifests)


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
    counts = results.seed_counts()
    spans = sorted({counts[0], counts[-1]}) if counts else [0]
    text = (
        f"{len(results.reported_models)} models, {formats.count(tokens)} training tokens each "
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
    text = f"{text}. On {join_words(results.devices())}."
    if results.tuned_only:
        text += f" Only learning rates were tried for {join_words(results.tuned_only)}."
    return text


def _found(results: Results, settings: Mapping[str, Any], judged: Sequence[JudgedClaim]) -> str:
    notes = {one.claim.id: _notes(results, settings, one) for one in judged}
    parts = []
    for verdict in DECIDED:
        texts = [
            f"{one.claim.id} ({one.claim.statement.rstrip('.')}){notes[one.claim.id]}"
            for one in judged
            if one.verdict == verdict
        ]
        parts.append(f"{verdict.capitalize()}: {join_words(texts) or 'none'}.")
    open_ones = [
        f"{one.claim.id}{notes[one.claim.id]}" for one in judged if one.verdict == "inconclusive"
    ]
    not_run = [one.claim.id for one in judged if one.verdict not in (*DECIDED, "inconclusive")]
    if open_ones:
        parts.append(
            f"Inconclusive: {join_words(open_ones)}; the ledger has the n that would settle it, "
            "where one can be told."
        )
    if not_run:
        parts.append(f"Not tested by this run: {join_words(not_run)}.")
    return " ".join(parts) if judged else ""


def _notes(results: Results, settings: Mapping[str, Any], judged: JudgedClaim) -> str:
    """What a verdict alone would hide, in brackets; empty where there is nothing."""
    notes = [
        *_weak_references(results, judged),
        *_whole_windows(results, settings, judged),
        *_measured_speed(results, judged),
    ]
    return f" [{'; '.join(notes)}]" if notes else ""


def _whole_windows(results: Results, settings: Mapping[str, Any], judged: JudgedClaim) -> list[str]:
    """Windows that hold the documents of a claim about recall, whatever bytes they have later."""
    pairs = max(results.x_values("recall", "accuracy"), default=None)
    holding = windows_that_hold(results, settings, pairs)
    compared = dict.fromkeys(
        side.model
        for one in judged.tests
        if one.test.where.experiment == "recall"
        for side in one.test.reference
        if side.model in holding
    )
    if not compared:
        return []
    return [f"{join_words(list(compared))} with a window that holds these documents whole"]


def _weak_references(results: Results, judged: JudgedClaim) -> list[str]:
    """Arms that a claim compares with and that have not learned to recall."""
    names = dict.fromkeys(
        side.model
        for one in judged.tests
        if one.test.where.experiment in SCORED
        for side in one.test.reference
    )
    return [words for name in names if (words := chance_words(results, name))]


def _measured_speed(results: Results, judged: JudgedClaim) -> list[str]:
    """Beside a claim about FLOPs, what a training step really takes."""
    ratios: dict[tuple[str, str], tuple[float, float]] = {}
    for one in judged.tests:
        if one.test.where.metric != FLOPS or not one.test.reference:
            continue
        for side in one.test.arms:
            pair = (side.model, one.test.reference[0].model)
            found = measured_ratio(results, *pair, "train")
            if found is not None:
                ratios[pair] = found
    if not ratios:
        return []
    words = [f"{arm} {ratio:.2f} times {other}" for (arm, other), (ratio, _) in ratios.items()]
    context = max(x for _, x in ratios.values())
    how = f"{launch_words(results)}, {context:,.0f} tokens"
    return [f"measured training speed: {join_words(words)} ({how})"]


def _numbers(results: Results, context: int) -> str:
    """Loss, recall and memory of every model, best loss first."""
    pairs = max(results.x_values("recall", "accuracy"), default=None)
    losses = {
        model: results.cell("language_modelling", "bits_per_byte", model=model, x=context)
        for model in results.models
    }
    known = {model: cell for model, cell in losses.items() if cell.value is not None}
    if not known:
        return ""
    texts = []
    for model in sorted(known, key=lambda name: known[name].value or 0.0):
        recall = results.cell("recall", "accuracy", model=model, x=pairs)
        parts = [formats.cell_text(known[model], formats.bits)]
        if recall.value is not None:
            parts.append(formats.cell_text(recall, formats.share))
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


def _rerun(
    results: Results,
    manifests: Mapping[str, Manifest],
    settings: Mapping[str, Any],
    pieces: Sequence[str],
) -> str:
    row = next((row for row in results.rows if row.experiment == "train"), results.rows[0])
    line = rerun_command(row, manifests, str(settings.get("name", "CONFIG")))
    first = _state(line, pieces)
    return (
        "A cell's command is its tooltip, and the list of jobs has them all. They name files that "
        f"a fresh clone lacks: {first} Then, for instance, with another folder after --out: "
        f"`{line}`. `ham diff` on both folders says whether curves and scores agree within their "
        "spread (README, “In pieces”)."
    )


def _state(command: str, pieces: Sequence[str]) -> str:
    """The commands that lay out what a recorded command reads."""
    words = command.split()
    config = next((word for word in words if word.endswith(".yaml")), "CONFIG")
    data = words[words.index("--data") + 1] if "--data" in words[:-1] else "DATA"
    prepare = f"at the commit named below, `ham prepare {config} --out {data}` writes the data"
    if pieces:
        # Pieces are younger than the commit of the run, so they are laid out before it is checked
        # out.
        unpack = f"`ham unpack {' '.join(pieces)}` lays out what was packed of the run"
        return f"{unpack}, and then, {prepare}."
    return (
        f"{prepare} (the configuration is the config.yaml beside the rows). What else a command "
        "reads, the jobs before it write."
    )
