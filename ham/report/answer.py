"""The answer of a full run in plain sentences, chosen by numbers and verdicts.

Three questions: does HAM hold up at a quarter of the cache, does it matter which tokens are kept,
and what does it cost. Arms are found by what the configuration says of them, not by their names. A
difference counts as told only where the paired interval over three seeds or more leaves out zero
and no claim about the same two arms calls it inconclusive; everything else is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ham.claims.evidence import Evidence
from ham.report import formats
from ham.report.aggregate import Cell, Results, difference, kv_fraction_cell
from ham.report.formats import Formatter, join_words
from ham.report.needle_seeds import seeds_that_find
from ham.report.plots_cost import cache_cell
from ham.report.recall_words import windows_that_hold
from ham.report.speed_words import measured_words, swept_words
from ham.report.tables_tradeoff import TOLERANCE

if TYPE_CHECKING:
    from ham.claims.judge import Judged, JudgedClaim

Arm = Mapping[str, Any]

QUARTER = 0.25
CHANCE = 0.1
"""A model that recalls less has not learned the task: being better than it says nothing."""
FEWEST_SEEDS = 3
"""Fewer decide nothing."""
LEGEND = (
    "(In brackets: the other's value; the difference paired by seed, with half of its 95 % t "
    "interval; claims about it.)"
)
TEXT, RECALL = ("language_modelling", "bits_per_byte"), ("recall", "accuracy")


@dataclass(frozen=True)
class Answer:
    """What the sentences are made from.

    Attributes:
        arm: The arm that routes a quarter of the tokens by the recurrent memory's error.
        context: Tokens at which bits per byte and memory are read.
        pairs: Most pairs of the recall task, or None where it was not run.
        tests: Judged tests, to which a difference is held.
    """

    results: Results
    settings: Mapping[str, Any]
    arm: str
    context: int
    pairs: float | None
    tests: tuple[Judged, ...]

    def text(self, model: str) -> Cell:
        """Bits per byte of a model."""
        return self.results.cell(*TEXT, model=model, x=self.context)

    def recall(self, model: str) -> Cell:
        """Share of the most pairs that a model recalls."""
        if self.pairs is None:
            return Cell(None)
        return self.results.cell(*RECALL, model=model, x=self.pairs)

    def known(self, models: Sequence[str]) -> list[str]:
        """Those of the models that have bits per byte."""
        return [model for model in models if self.text(model).value is not None]

    def claims_on(self, experiment: str, other: str) -> list[Judged]:
        """Tests that compare the arm with another one in an experiment."""
        return [
            one
            for one in self.tests
            if one.test.where.experiment == experiment
            and [side.name for side in one.test.arms] == [self.arm]
            and other in [side.name for side in one.test.reference]
        ]


def answer(
    results: Results,
    settings: Mapping[str, Any],
    judged: Sequence[JudgedClaim],
    evidence: Evidence,
) -> list[tuple[str, str]]:
    """Topics and texts; empty where no arm routes a quarter of the tokens.

    Args:
        results: The rows.
        settings: The configuration as plain values.
        judged: The claims with their verdicts.
        evidence: Rows beside those of the run, for the speed of sweeps.
    """
    routed = [arm["name"] for arm in _at_a_quarter(settings) if _option(arm, "score") != "random"]
    context = settings["data"]["context"]
    pairs = max(results.x_values(*RECALL), default=None)
    tests = tuple(test for one in judged for test in one.tests)
    arm = next((name for name in routed if results.find(*TEXT, model=name, x=context)), None)
    if arm is None:
        return []
    about = Answer(results, settings, arm, context, pairs, tests)
    if about.text(arm).value is None:
        return []
    topics = [
        ("Quality", _quality(about)),
        ("Which tokens", _choice(about)),
        ("Cost", _cost(about, evidence)),
    ]
    return [(topic, text) for topic, text in topics if text]


def _quality(about: Answer) -> str:
    """Against the transformers in text, recall and needles."""
    whole = about.known(_names(about.settings, _is_transformer))
    if not whole:
        return ""
    text = join_words([_text_words(about, model) for model in whole])
    parts = [
        f"With a quarter of the tokens in its cache, {about.arm} needs "
        f"{formats.bits(about.text(about.arm).value)} bits per byte: {text}."
    ]
    own = about.recall(about.arm).value
    if own is not None:
        fair = [model for model in whole if not _at_chance(about.recall(model))]
        against = join_words([_recall_words(about, model, model) for model in fair])
        end = f": {against}" if fair else ""
        parts.append(f"It recalls {formats.share(own)} of {about.pairs:g} pairs{end}.")
        weak = [chance_words(about.results, model) for model in whole if model not in fair]
        parts += [f"{words}, so it is no yardstick there." for words in weak]
    parts += [_needles(about, [about.arm, *whole, *_at_random(about)]), LEGEND]
    return " ".join(filter(None, parts))


def _needles(about: Answer, models: Sequence[str]) -> str:
    counts = {model: seeds_that_find(about.results, model) for model in models}
    parts = [f"{model} {seeds.words}" for model, seeds in counts.items() if seeds.whole]
    if not parts:
        return ""
    found = join_words(parts)
    return f"Seeds that find more than half of the needles at the shortest length: {found}."


def _choice(about: Answer) -> str:
    """Against random tokens, and against the last tokens in as many bytes."""
    rivals = {model: "random tokens" for model in _at_random(about)}
    for model in about.known(_names(about.settings, _is_window)):
        if _same_bytes(about, model):
            rivals[model] = "the last tokens in as many bytes"
    parts = []
    for model, kind in rivals.items():
        text = f"Against {kind} ({model}): bits per byte {_text_words(about, model, '')}"
        parts.append(f"{text}{_recall_beside(about, model)}.")
    return " ".join(parts)


def _recall_beside(about: Answer, model: str) -> str:
    """Recall beside a rival, with the share of these documents that either really keeps."""
    if about.recall(model).value is None or about.recall(about.arm).value is None:
        return ""
    text = f"; recall of {about.pairs:g} pairs {_recall_words(about, model, '')}"
    ours, theirs = (_kept(about, name) for name in (about.arm, model))
    window = windows_that_hold(about.results, about.settings, about.pairs).get(model)
    if ours:
        text += f", where {about.arm} keeps {ours} of the tokens"
        text += f" and {model} {theirs}" if theirs else ""
        text += f" and the window of {window:,} tokens all" if window else ""
    return text


def _cost(about: Answer, evidence: Evidence) -> str:
    reference = next(iter(_names(about.settings, _is_transformer)), None)
    if reference is None:
        return ""
    parts = [
        _memory(about, reference),
        measured_words(about.results, about.arm, reference),
        swept_words(evidence, QUARTER),
    ]
    return " ".join(filter(None, parts))


def _memory(about: Answer, reference: str) -> str:
    sizes = [
        cache_cell(about.results, name, about.context).value for name in (about.arm, reference)
    ]
    if None in sizes:
        return ""
    return (
        f"After {about.context:,} tokens {about.arm} decodes with {formats.byte_size(sizes[0])}, "
        f"{reference} with {formats.byte_size(sizes[1])}."
    )


def _text_words(about: Answer, model: str, name: str | None = None) -> str:
    """`fewer than NAME (1.647; −0.128 ± 0.022, n=5; P1)`, or that it is undecided."""
    theirs = about.text(model)
    gap = difference(about.text(about.arm), theirs)
    told = "fewer" if (gap.value or 0.0) < 0 else "more"
    claims = sorted({one.claim for one in about.claims_on(TEXT[0], model)})
    facts = [formats.bits(theirs.value), _gap_words(gap, formats.signed_bits, ""), *claims]
    outcome = _outcome(
        told if _told(about, TEXT[0], model, gap) else None,
        _described(about, model) if name is None else name,
    )
    return f"{outcome} ({'; '.join(facts)})"


def _recall_words(about: Answer, model: str, name: str) -> str:
    """`higher than NAME (66.6 %; +31.2 ± 3.1 points, n=5)`, or that it is undecided."""
    theirs = about.recall(model)
    gap = difference(about.recall(about.arm), theirs)
    told = "higher" if (gap.value or 0.0) > 0 else "lower"
    facts = [formats.share(theirs.value or 0.0), _gap_words(gap, formats.points, " points")]
    outcome = _outcome(told if _told(about, RECALL[0], model, gap) else None, name)
    return f"{outcome} ({'; '.join(facts)})"


def _gap_words(gap: Cell, write: Formatter, unit: str) -> str:
    if gap.value is None:
        return "no seed in common"
    number = " ".join(filter(None, [write(gap.value), formats.spread(gap, write)]))
    return f"{number}{unit}, {formats.sample_size(gap)}"


def _outcome(told: str | None, name: str) -> str:
    if told is None:
        return f"undecided against {name}" if name else "undecided"
    return f"{told} than {name}" if name else told


def _described(about: Answer, model: str) -> str:
    if _has_convolution(about.settings, model):
        return f"{model}, which has HAM's short convolution"
    return model


def _told(about: Answer, experiment: str, model: str, gap: Cell) -> bool:
    """Whether seeds and claims tell the two apart."""
    found = gap.estimate
    if found is None or found.n < FEWEST_SEEDS or found.low is None or found.high is None:
        return False
    if any(one.verdict == "inconclusive" for one in about.claims_on(experiment, model)):
        return False
    return found.low > 0 or found.high < 0


def _kept(about: Answer, model: str) -> str:
    cell = kv_fraction_cell(about.recall(model).rows)
    return "" if cell is None or cell.value is None else formats.share(cell.value)


def _at_chance(cell: Cell) -> bool:
    return cell.value is not None and cell.value < CHANCE


def chance_words(results: Results, model: str) -> str:
    """That a model has not learned recall, with its number; empty where it has."""
    pairs = max(results.x_values(*RECALL), default=None)
    cell = results.cell(*RECALL, model=model, x=pairs)
    if not _at_chance(cell):
        return ""
    return f"{model} itself recalls {formats.share(cell.value or 0.0)} of {pairs:g} pairs"


def _bytes(about: Answer, other: str) -> list[float | None]:
    """Decoding memory of the arm and of another model."""
    models = (about.arm, other)
    return [cache_cell(about.results, model, about.context).value for model in models]


def _same_bytes(about: Answer, model: str) -> bool:
    sizes = _bytes(about, model)
    return None not in sizes and max(sizes) <= (1 + TOLERANCE) * min(sizes)


def _at_a_quarter(settings: Mapping[str, Any]) -> list[Arm]:
    return [arm for arm in settings.get("arms", []) if _option(arm, "target") == QUARTER]


def _at_random(about: Answer) -> list[str]:
    arms = _at_a_quarter(about.settings)
    return about.known([arm["name"] for arm in arms if _option(arm, "score") == "random"])


def _names(settings: Mapping[str, Any], wanted: Any) -> list[str]:
    return [arm["name"] for arm in settings.get("arms", []) if wanted(arm)]


def _option(arm: Arm, name: str) -> Any:
    return (arm.get("options") or {}).get(name)


def _is_transformer(arm: Arm) -> bool:
    return arm.get("mixer") == "transformer" and not arm.get("placement")


def _has_convolution(settings: Mapping[str, Any], model: str) -> bool:
    return any(
        arm["name"] == model and _option(arm, "short_conv") for arm in settings.get("arms", [])
    )


def _is_window(arm: Arm) -> bool:
    return str(arm.get("mixer", "")).endswith("_window") and not arm.get("placement")
