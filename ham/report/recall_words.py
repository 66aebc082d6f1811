"""How long recall documents are, beside the length at which memory is compared.

Bytes of a decoding cache are those after thousands of tokens. Recall documents are shorter: a model
that routes keeps another share of them than of text, and a window may hold such a document whole,
so that equal bytes there are not equal bytes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ham.report.aggregate import Results
from ham.report.formats import join_words
from ham.report.plots_tradeoff import memory_context
from ham.train.recall_documents import MAX_PAIRS, pairs_document
from ham.train.tokenizer import ByteTokenizer


def recall_lengths(results: Results, settings: Mapping[str, Any]) -> dict[float, int]:
    """Tokens of a document by its number of pairs, which bytes tell; empty for other tokenizers."""
    if (settings.get("data") or {}).get("tokenizer") != ByteTokenizer.name:
        return {}
    tokenizer, lengths = ByteTokenizer(), {}
    for pairs in results.x_values("recall", "accuracy"):
        if 1 <= pairs <= MAX_PAIRS:
            # Which keys and values are drawn changes no length.
            document = pairs_document(np.random.default_rng(0), tokenizer, int(pairs), int(pairs))
            lengths[pairs] = len(document.tokens)
    return lengths


def windows_that_hold(
    results: Results, settings: Mapping[str, Any], pairs: float | None
) -> dict[str, int]:
    """Arms whose window is at least as long as a document of so many pairs, with the window."""
    length = recall_lengths(results, settings).get(pairs or 0.0)
    if length is None:
        return {}
    windows = {
        arm["name"]: (arm.get("options") or {}).get("window") for arm in settings.get("arms", [])
    }
    return {
        name: window
        for name, window in windows.items()
        if window is not None and window >= length and name in results.models
    }


def length_note(results: Results, settings: Mapping[str, Any]) -> str:
    """For captions: memory and recall are measured at different lengths."""
    context, pairs = memory_context(results), results.x_values("recall", "accuracy")
    if context is None or not pairs:
        return ""
    lengths = recall_lengths(results, settings)
    memory = f"Decoding memory is that after {context:,.0f} tokens"
    if not lengths:
        return f"{memory}; recall documents are shorter."
    known = sorted(lengths)
    ends = f"{lengths[known[0]]:,} ({known[0]:g} pairs)"
    if len(known) > 1:
        ends += f" to {lengths[known[-1]]:,} ({known[-1]:g} pairs)"
    note = f"{memory}; recall documents have {ends} tokens."
    whole = windows_that_hold(results, settings, known[-1])
    if whole:
        names = join_words([f"{name} ({window:,} tokens)" for name, window in whole.items()])
        note += f" The window of {names} holds even the longest of them whole."
    return note
