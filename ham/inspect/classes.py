"""Kinds of token: what a kept token is, by rules that a reader can check by hand.

A text is cut into words, numbers and the characters between them. Every character gets one class,
the first of this list that fits:

- `needle`: inside a needle, a stretch that the caller names;
- `first name`: a word that looks like a name, inside a sentence, seen for the first time;
- `later name`: the same name again, here also at the start of a sentence;
- `number`: digits, with points, commas or colons between them;
- `repeat`: the second of two neighbouring words that stood side by side earlier in the text (the
  associative-recall hits of Zoology, arXiv 2312.04927, on words instead of tokens, so that they are
  the same for every tokenizer); upper and lower case are the same here;
- `function word`: one of `FUNCTION_WORDS`;
- `space or punctuation`: everything between words;
- `other`: the remaining words.

A word looks like a name when it begins with a capital letter, has at least two letters and not
only capitals, and is neither a function word nor a title such as Mr. A sentence begins with the
text, after `.`, `!`, `?` or `:`, after a blank line and after an opening quotation mark, but not
after the point of a title or of an initial. A token takes the class of its first character that is
not white space; a token of white space alone takes that of its first character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

CLASSES = (
    "needle",
    "first name",
    "later name",
    "number",
    "repeat",
    "function word",
    "space or punctuation",
    "other",
)
NEEDLE, FIRST_NAME, LATER_NAME, NUMBER, REPEAT, FUNCTION, SPACE, OTHER = range(len(CLASSES))

_FUNCTION_TEXT = """
a about after all am an and any are as at be been before but by can could did do for from had has
have he her him his i if in into is it its may me might more must my no nor not of on or our out
shall she should so some such than that the their them then there these they this those to up upon
us was we were what when which who whom will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())
_TITLE_TEXT = "Mr Mrs Ms Dr St Prof Rev Hon Col Gen Capt Sir Lady Lord"
TITLES = frozenset(_TITLE_TEXT.split())

_UNIT = re.compile(r"(?P<number>\d+(?:[.,:]\d+)*)|(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)")
_POSSESSIVE = re.compile(r"['’]s$")
_BEFORE_WORD = re.compile(r"[\s\"“‘«(\[_*]*$")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\r?\n")
_LAST_WORD = re.compile(r"([^\W\d_]+)\.$")
# Far more than any run of white space, quotes and a title before a word.
_LOOK_BACK = 100


def classify_characters(text: str, needles: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """The class of every character: uint8 indices into `CLASSES`, as long as `text`.

    Args:
        text: The text.
        needles: Spans [start, end) in characters.
    """
    classes = np.full(len(text), SPACE, dtype=np.uint8)
    names: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    previous = None
    for unit in _UNIT.finditer(text):
        word = unit.group()
        pair = (previous, word.casefold())
        if unit["number"]:
            kind = NUMBER
        else:
            kind = _word_class(text, unit.start(), word, names, pair in pairs)
        classes[unit.start() : unit.end()] = kind
        if previous is not None:
            pairs.add(pair)
        previous = pair[1]
    for start, end in needles:
        classes[start:end] = NEEDLE
    return classes


def classify_tokens(
    text: str, character_classes: np.ndarray, spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The class of every token from its span [start, end) in characters, never empty (uint8)."""
    classes = np.empty(len(spans), dtype=np.uint8)
    for index, (start, end) in enumerate(spans):
        visible = (at for at in range(start, end) if not text[at].isspace())
        classes[index] = character_classes[next(visible, start)]
    return classes


def _word_class(text: str, start: int, word: str, names: set[str], is_repeat: bool) -> int:
    """The class of a word outside needles; a new name is added to `names`."""
    name = _POSSESSIVE.sub("", word)
    if _looks_like_name(name):
        if name in names:
            return LATER_NAME
        if not _starts_sentence(text, start):
            names.add(name)
            return FIRST_NAME
    if is_repeat:
        return REPEAT
    return FUNCTION if word.casefold() in FUNCTION_WORDS else OTHER


def _looks_like_name(word: str) -> bool:
    return (
        len(word) > 1
        and word[0].isupper()
        and not word.isupper()
        and word.casefold() not in FUNCTION_WORDS
        and word not in TITLES
    )


def _starts_sentence(text: str, start: int) -> bool:
    before = text[max(0, start - _LOOK_BACK) : start]
    gap = _BEFORE_WORD.search(before).group()
    before = before[: len(before) - len(gap)]
    if not before or _BLANK_LINE.search(gap) or gap[-1:] in ('"', "“", "‘", "«"):
        return True
    if before[-1] in "!?:":
        return True
    return before[-1] == "." and not _ends_in_abbreviation(before)


def _ends_in_abbreviation(text: str) -> bool:
    """Whether the point at its end belongs to a title or to the initial of a name."""
    last = _LAST_WORD.search(text)
    if last is None:
        return False
    return last[1] in TITLES or (len(last[1]) == 1 and last[1].isupper())
