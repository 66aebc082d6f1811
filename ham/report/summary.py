"""The report in words: every sentence is built from rows, none is written in advance."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ham.report import formats
from ham.report.aggregate import Cell, Results, difference, kv_fraction_cell
from ham.report.formats import join_words
from ham.report.needle_seeds import seeds_that_find
from ham.report.plots_base import Look
from ham.report.plots_cost import cache_cell, speed_points
from ham.report.plots_dial import dial_points
from ham.report.plots_language import main_context, quality_cell, unigram_cell
from ham.report.speed_words import launch_words
from ham.report.tables_base import chance_level

REFERENCE_MODEL = "transformer"


def summary_sentences(results: Results, look: Look) -> list[tuple[str, str]]:
    """What the numbers say, as (topic, text); topics that were not run are left out."""
    topics: dict[str, tuple[Callable[[Results, Look], str], ...]] = {
        "Models": (_setting,),
        "Language": (_quality, _unigram),
        "KV cache": (_cache,),
        "The dial": (_dial,),
        "Recall": (
            _grid_sentence("needle", "Needle in a haystack"),
            _seeds_that_find,
            _grid_sentence("recall", "Key-value pairs"),
        ),
        "Tasks": (_lm_eval,),
        "Speed": (_speed,),
        "Failures": (_failures,),
    }
    found = []
    for topic, parts in topics.items():
        text = " ".join(filter(None, (part(results, look) for part in parts)))
        if text:
            found.append((topic, text))
    return found


def _setting(results: Results, look: Look) -> str:
    # Rows without a seed are of no run, but of something that was measured alone.
    models_there = results.reported_models or results.models
    if not models_there:
        return "There are no result rows."
    sizes = [n for n in map(results.parameters, models_there) if n]
    models = _count(len(models_there), "model")
    text = models
    if sizes:
        text += f" of {formats.parameters(min(sizes))}"
        if max(sizes) != min(sizes):
            apart = formats.share(max(sizes) / min(sizes) - 1)
            text += f" to {formats.parameters(max(sizes))} parameters ({apart} apart)"
        else:
            text += " parameters"
    counts = results.seed_counts()
    if counts:
        few = f"{counts[0]} to " if counts[0] != counts[-1] else ""
        text += f", {few}{_count(counts[-1], 'seed')} each"
    text += f", on {join_words(results.devices())}."
    if results.tuned_only:
        text += f" Only learning rates were tried for {join_words(results.tuned_only)}."
    return text


def _quality(results: Results, look: Look) -> str:
    cells = _good({m: quality_cell(results, look, m) for m in results.models})
    if not cells:
        return ""
    order = sorted(cells, key=lambda model: cells[model].value or 0.0)
    best = order[0]
    context = main_context(results, look) or 0
    text = (
        f"Lowest bits per byte on held-out text (context {context:,.0f}): {best} with "
        f"{formats.cell_text(cells[best], formats.bits)}"
    )
    if len(order) == 1:
        return text + "."
    second, worst = order[1], order[-1]
    text += f", then {second} ({formats.bits(cells[second].value)})"
    if worst != second:
        text += f"; highest is {worst} ({formats.bits(cells[worst].value)})"
    return f"{text}. {_separation(cells, best, second)}"


def _separation(cells: dict[str, Cell], best: str, second: str) -> str:
    """Whether seeds tell the best two apart."""
    gap = difference(cells[second], cells[best]).estimate
    if gap is None or gap.low is None or gap.high is None:
        return "With one seed there is no interval on this order."
    written = (
        f"the difference paired by seed is {formats.signed_bits(gap.value)} "
        f"[{formats.signed_bits(gap.low)}, {formats.signed_bits(gap.high)}] (n={gap.n})"
    )
    if gap.low > 0:
        return f"The seeds tell {best} and {second} apart: {written}."
    return f"The seeds do not tell {best} and {second} apart: {written}."


def _unigram(results: Results, look: Look) -> str:
    unigram = unigram_cell(results).value
    cells = _good({m: quality_cell(results, look, m) for m in results.models})
    if unigram is None or not cells:
        return ""
    gains = {model: unigram - (cell.value or 0.0) for model, cell in cells.items()}
    behind = [model for model, gain in gains.items() if gain <= 0]
    known = f"a unigram model, which needs {formats.bits(unigram)} bits per byte"
    if behind:
        return f"{join_words(behind)} did not beat {known}."
    low, high = min(gains.values()), max(gains.values())
    if len(gains) == 1:
        return f"{next(iter(gains))} beats {known}, by {formats.bits(low)}."
    return (
        f"All {len(gains)} models that were evaluated beat {known}: by {formats.bits(low)} to "
        f"{formats.bits(high)}."
    )


def _cache(results: Results, look: Look) -> str:
    routed = {}
    for model in results.models:
        cell = kv_fraction_cell(quality_cell(results, look, model).rows)
        if cell is not None and cell.value is not None and 0 < cell.value < 1:
            routed[model] = cell.value
    parts = [f"{formats.share(fraction)} by {model}" for model, fraction in routed.items()]
    text = f"Tokens of the test text kept in the KV cache: {join_words(parts)}." if parts else ""
    sizes = _cache_sizes(results)
    if REFERENCE_MODEL in sizes[1] and len(sizes[1]) > 1:
        context, cells = sizes
        whole = cells.pop(REFERENCE_MODEL)
        ratios = [f"{m} {formats.share(n / whole)}" for m, n in cells.items() if m in routed]
        if ratios:
            text += (
                f" Decoding memory at {context:,.0f} tokens, against the {REFERENCE_MODEL}'s "
                f"{formats.byte_size(whole)}: {join_words(ratios)}."
            )
    return text


def _cache_sizes(results: Results) -> tuple[float, dict[str, float]]:
    contexts = results.x_values("memory", "cache_bytes_allocated", task="decode")
    if not contexts:
        return 0.0, {}
    cells = {m: cache_cell(results, m, contexts[-1]).value for m in results.models}
    return contexts[-1], {model: n for model, n in cells.items() if n}


def _dial(results: Results, look: Look) -> str:
    parts = []
    for model in results.models:
        points = [p for p in dial_points(results, model) if p.cell.value is not None]
        if len(points) < 2:
            continue
        first, last = points[0], points[-1]
        falls = sum(
            (after.cell.value or 0) < (before.cell.value or 0)
            for before, after in itertools.pairwise(points)
        )
        parts.append(
            f"{model} goes from {formats.bits(first.cell.value)} bits per byte at a KV fraction of "
            f"{formats.share(first.x)} to {formats.bits(last.cell.value)} at "
            f"{formats.share(last.x)}, falling in {falls} of {len(points) - 1} steps"
        )
    return f"Without retraining, {'; '.join(parts)}." if parts else ""


def _grid_sentence(experiment: str, title: str) -> Callable[[Results, Look], str]:
    def sentence(results: Results, look: Look) -> str:
        cells = _good(
            {m: results.pooled_cell(experiment, "accuracy", model=m) for m in results.models}
        )
        if not cells:
            return ""
        order = sorted(cells, key=lambda model: -(cells[model].value or 0.0))
        best, worst = order[0], order[-1]
        if not cells[best].value:
            return f"{title}: none answers."
        if cells[best].value == cells[worst].value and best != worst:
            level = formats.share(cells[best].value or 0.0)
            return f"{title}, mean over the grid: {level} for every model."
        text = f"{title}, mean over the grid: {best} is best with "
        text += formats.cell_text(cells[best], formats.share)
        if worst != best:
            text += f", {worst} last with {formats.share(cells[worst].value or 0.0)}"
        return text + "."

    return sentence


def _seeds_that_find(results: Results, look: Look) -> str:
    """Seeds by model: where some have learned to look up and others have not, a mean misleads."""
    counts = {model: seeds_that_find(results, model) for model in results.models}
    counts = {model: seeds for model, seeds in counts.items() if seeds.whole}
    if not any(seeds.found for seeds in counts.values()):
        return ""
    shortest = min(results.x_values("needle", "accuracy"))
    parts = [f"{model} {seeds.words}" for model, seeds in counts.items()]
    return (
        f"Seeds that find more than half of the needles at {shortest:,.0f} tokens, in the task "
        f"that each does best: {join_words(parts)}."
    )


def _lm_eval(results: Results, look: Look) -> str:
    compared, above = 0, 0
    for task in results.tasks("lm_eval", "accuracy"):
        chance = chance_level(results, task)
        for model in results.models:
            cell = results.cell("lm_eval", "accuracy", model=model, task=task)
            if chance is None or cell.estimate is None or cell.estimate.low is None:
                continue
            compared += 1
            above += cell.estimate.low > chance
    if not compared:
        return ""
    return (
        f"On lm-eval tasks {above} of {compared} accuracies lie above chance with their whole "
        "95 % interval."
    )


def _speed(results: Results, look: Look) -> str:
    words = {"prefill": "prefill", "decode": "decoding", "train": "training step"}
    fastest: dict[str, list[str]] = {}
    longest = 0.0
    for task, word in words.items():
        points = {
            (model, p.x): p.cell.value
            for model in results.models
            for p in speed_points(results, model, task)
            if p.cell.value is not None
        }
        if not points:
            continue
        longest = max(x for _, x in points)
        rates = {model: value for (model, x), value in points.items() if x == longest}
        best = max(rates, key=lambda model: rates[model])
        fastest.setdefault(best, []).append(f"{word} ({formats.count(rates[best])} tokens/s)")
    parts = [f"{model} in {join_words(tasks)}" for model, tasks in fastest.items()]
    launched = launch_words(results)
    how = f", {launched}" if launched else ""
    return f"Fastest at {longest:,.0f} tokens of context{how}: {'; '.join(parts)}." if parts else ""


def _failures(results: Results, look: Look) -> str:
    failed = results.failures()
    if not failed:
        return "No cell failed."
    models = sorted({row.model for row in failed})
    return f"{_count(len(failed), 'cell')} failed ({join_words(models)}); they are listed below."


def _good(cells: dict[str, Cell]) -> dict[str, Cell]:
    return {model: cell for model, cell in cells.items() if cell.value is not None}


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
