"""Captions say that recall documents are not as long as the text that memory is measured at."""

from __future__ import annotations

from ham.report.aggregate import Results
from ham.report.recall_words import length_note, recall_lengths, windows_that_hold

BYTES = {"data": {"tokenizer": "byte"}}
ARMS = [
    {"name": "mamba2", "options": {"window": 100}},
    {"name": "transformer", "options": {"window": 109}},
    {"name": "absent", "options": {"window": 9999}},
    {"name": "ham-cosine", "options": {}},
]


def test_lengths_are_told_where_a_token_is_a_byte(make_rows):
    results = Results(make_rows())
    assert recall_lengths(results, BYTES) == {2: 25, 4: 37, 8: 61, 16: 109}
    assert recall_lengths(results, {"data": {"tokenizer": "bpe-4096"}}) == {}


def test_windows_hold_documents_that_are_no_longer(make_rows):
    results, settings = Results(make_rows()), {**BYTES, "arms": ARMS}
    assert windows_that_hold(results, settings, 16) == {"transformer": 109}
    assert windows_that_hold(results, settings, 64) == {}


def test_the_note_compares_lengths(make_rows):
    results = Results(make_rows())
    assert length_note(results, {**BYTES, "arms": ARMS}) == (
        "Decoding memory is that after 1,024 tokens; recall documents have 25 (2 pairs) to 109 "
        "(16 pairs) tokens. The window of transformer (109 tokens) holds even the longest of them "
        "whole."
    )
    assert length_note(results, {}) == (
        "Decoding memory is that after 1,024 tokens; recall documents are shorter."
    )
    assert length_note(Results(make_rows(omit=["recall"])), BYTES) == ""
