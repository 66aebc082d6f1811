from __future__ import annotations

import pytest

from ham.inspect.classes import CLASSES, classify_characters, classify_tokens


def words_with_classes(text: str, needles: list[tuple[int, int]] = ()) -> list[tuple[str, str]]:
    """Every stretch of equal classes, spaces left out, as (characters, class)."""
    found: list[tuple[str, str]] = []
    classes = [CLASSES[index] for index in classify_characters(text, needles)]
    for word_start, word in _words(text):
        of_word = set(classes[word_start : word_start + len(word)])
        assert len(of_word) == 1, word
        found.append((word, of_word.pop()))
    return found


def _words(text: str) -> list[tuple[int, str]]:
    starts, position = [], 0
    for word in text.split():
        position = text.index(word, position)
        starts.append((position, word))
        position += len(word)
    return starts


def test_a_text_worked_by_hand():
    text = "Call the old Ahab now and the old Ahab hears 3,000 whales"
    assert words_with_classes(text) == [
        ("Call", "other"),  # a capital at the start of a sentence says nothing
        ("the", "function word"),
        ("old", "other"),
        ("Ahab", "first name"),
        ("now", "other"),
        ("and", "function word"),
        ("the", "function word"),  # "and the" is new
        ("old", "repeat"),  # "the old" stood before
        ("Ahab", "later name"),  # a name before a repeat
        ("hears", "other"),
        ("3,000", "number"),
        ("whales", "other"),
    ]


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("He met Ahab. Ahab's ship", "Ahab's", "later name"),
        ("He left. Ahab stayed", "Ahab", "other"),
        ("He asked Mr. Ahab to", "Ahab", "first name"),
        ("He asked Mr. Ahab to", "Mr", "other"),
        ("He asked J. Ahab to", "Ahab", "first name"),
        ('He said, "Come here', "Come", "other"),
        ("He said: Come here", "Come", "other"),
        ("a heading\n\nCome here", "Come", "other"),
        ("a line\nAhab broke", "Ahab", "first name"),
        ("he and I went", "I", "function word"),
        ("in CHAPTER nine", "CHAPTER", "other"),
        ("he saw Élodie there", "Élodie", "first name"),
        ("The cat, the dog; THE CAT again", "CAT", "repeat"),
        ("room 12 is room 12", "12", "number"),
        ("он увидел Анну там", "Анну", "first name"),
    ],
)
def test_rules(text: str, word: str, expected: str):
    at = text.rindex(word)
    assert CLASSES[classify_characters(text)[at]] == expected


def test_a_repeat_needs_both_words_in_order():
    kinds = dict(words_with_classes("green apples fall apples green"))
    assert kinds["green"] == kinds["apples"] == "other"


def test_a_needle_comes_before_everything_and_punctuation_last():
    text = "So Ahab, 12"
    classes = [CLASSES[index] for index in classify_characters(text, [(3, 8)])]
    assert classes == [
        *["function word"] * 2,
        "space or punctuation",
        *["needle"] * 5,
        "space or punctuation",
        *["number"] * 2,
    ]


def test_a_token_takes_the_class_of_its_first_visible_character():
    text = "by  Ahab!"
    spans = [(0, 2), (2, 3), (3, 8), (8, 9)]
    found = classify_tokens(text, classify_characters(text), spans)
    assert [CLASSES[index] for index in found] == [
        "function word",
        "space or punctuation",
        "first name",
        "space or punctuation",
    ]


def test_empty_text():
    assert len(classify_characters("")) == 0
