"""Rules that turn an electronic edition into running text.

Prose that was hard-wrapped at 70 columns is joined into one line a paragraph, because a model would
otherwise spend its capacity on where lines end. Verse and plays keep their lines. Everything is
Unicode NFC with "\\n" newlines, one blank line between paragraphs, no trailing blanks and one final
newline.
"""

from __future__ import annotations

import re
import unicodedata

_BLANK_LINES = re.compile(r"\n\s*\n")
_SPACES = re.compile(r"[ \t]+")
_EDITORIAL_PARAGRAPH = re.compile(r"\[[^\[\]]*\]")
_VERSE_BREAK = re.compile(r"(?<=\S) {3,}(?=[^a-z\s])")
_DEEP_INDENT = re.compile(r"^ {3,}", re.MULTILINE)


def tidy(text: str) -> str:
    """NFC, "\\n" newlines, no control characters or trailing blanks, one blank line at most."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf"))
    lines = (line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def single_spaces(text: str) -> str:
    """Runs of blanks as one space: editions differ in how many follow a full stop."""
    return "\n".join(_SPACES.sub(" ", line).strip() for line in text.split("\n"))


def join_wrapped_prose(text: str) -> str:
    """Join the hard-wrapped lines of every prose paragraph; verse and signatures keep theirs.

    A paragraph is what stands between blank lines. Lines that begin at the margin are joined.
    Indented lines are verse unless one of them goes on in lower case at the indent of the line
    before it; then they are a quoted letter, and lines of equal indent are joined.
    """
    paragraphs = _BLANK_LINES.split(tidy(text).strip("\n"))
    return "\n\n".join(_join_paragraph(paragraph.split("\n")) for paragraph in paragraphs) + "\n"


def _join_paragraph(lines: list[str]) -> str:
    indents = [len(line) - len(line.lstrip()) for line in lines]
    is_letter = any(
        indent == before and line.lstrip()[:1].islower()
        for before, indent, line in zip(indents, indents[1:], lines[1:], strict=False)
        if indent
    )
    joined: list[str] = []
    previous = -1
    for indent, line in zip(indents, lines, strict=True):
        is_prose = indent == 0 or is_letter
        if joined and indent == previous and is_prose:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip() if is_prose else line)
        previous = indent
    return "\n".join(_SPACES.sub(" ", line) if line[:1] != " " else line for line in joined)


def drop_editorial_remarks(text: str) -> str:
    """Without an editor's remarks: paragraphs at the margin that are one bracket, note marks."""
    paragraphs = _BLANK_LINES.split(text.replace("[See APP Note.]", ""))
    kept = (p for p in paragraphs if not _EDITORIAL_PARAGRAPH.fullmatch(p.rstrip()))
    return "\n\n".join(kept)


def restore_verse_breaks(text: str) -> str:
    """New lines where an edition flattened verse into runs of three or more blanks.

    A run before a lower-case letter was a wrapped footnote, not a verse, and becomes one space.
    """
    text = re.sub(r"(?<=\S) {3,}", " ", _VERSE_BREAK.sub("\n    ", text))
    return _DEEP_INDENT.sub("    ", text)


def flow_paragraphs(text: str) -> str:
    """Text with one paragraph a line, as paragraphs separated by a blank line."""
    return "\n\n".join(line for line in text.split("\n") if line.strip())
