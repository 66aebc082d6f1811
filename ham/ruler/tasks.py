"""What RULER publishes of its retrieval tasks: texts, numbers of needles, lengths of the answers.

Source: RULER (arXiv 2404.06654, appendix B) and its code, NVIDIA/RULER
`scripts/data/synthetic/{constants,niah,variable_tracking}.py` and `scripts/synthetic.yaml`. The
strings are part of the benchmark and stand here letter by letter, the misspelt "assgined" included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ham.errors import unknown_choice

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."

NIAH_TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all "
    "the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
NIAH_ANSWER_PREFIX = (
    " The special magic {type_needle_v} for {query} mentioned in the provided text are"
)
VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
VT_ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assgined the value {query}, they are: "
)

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Depths in percent that the published generator draws from: 40 from 0 to 100."""

VT_HOPS = 4
VT_EXAMPLE_TOKENS = 500
"""Most tokens of the worked example before the question of a variable-tracking sample."""

VT_FEWEST_NOISES = 5
"""The published search for the number of noise lines begins here."""

_NEEDLES = re.compile(
    NEEDLE.replace(".", r"\.").format(
        type_needle_v="(?:words|numbers|uuids)", key=r"\S+", value=r"[\w-]+"
    )
)

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class RulerTask:
    """One task.

    Attributes:
        name: As published.
        haystack: `noise` (one line again and again), `essay` (prose) or `needle` (lines like the
            needle with other keys); variable tracking has noise.
        keys, values: What stands for `{key}` and `{value}` in a needle.
        num_keys, num_values, num_queries: Keys hidden, values of each, keys asked for.
        new_tokens: Tokens that are generated at most.
        track: Whether it is variable tracking.
    """

    name: str
    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    new_tokens: int = 128
    track: bool = False

    @property
    def answers(self) -> int:
        """Answers to one question."""
        return VT_HOPS + 1 if self.track else self.num_queries * self.num_values

    @property
    def has_depth(self) -> bool:
        """Whether one needle holds the answer, so that its depth is a coordinate."""
        return self.answers == 1

    def texts(self) -> tuple[str, str]:
        """What stands before the context and the question after it, up to the answer.

        With one answer both are in the singular, by the published replacements in their order. The
        space that ends the prefix of variable tracking belongs to the first answer here.
        """
        if self.track:
            template = (VT_TEMPLATE + VT_ANSWER_PREFIX).replace("{num_v}", str(self.answers))
        else:
            template, noun = NIAH_TEMPLATE + NIAH_ANSWER_PREFIX, self.values
            if self.answers == 1:
                for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
                    template = template.replace(plural, singular)
                noun = noun[:-1]
            template = template.replace("{type_needle_v}", noun)
        head, question = template.split("{context}")
        return head, question.rstrip(" ")


TASKS: dict[str, RulerTask] = {
    task.name: task
    for task in (
        RulerTask("niah_single_1", "noise"),
        RulerTask("niah_single_2", "essay"),
        RulerTask("niah_single_3", "essay", values="uuids"),
        RulerTask("niah_multikey_1", "essay", num_keys=4),
        RulerTask("niah_multikey_2", "needle"),
        RulerTask("niah_multikey_3", "needle", keys="uuids", values="uuids"),
        RulerTask("niah_multivalue", "essay", num_values=4),
        RulerTask("niah_multiquery", "essay", num_keys=4, num_queries=4),
        RulerTask("vt", "noise", new_tokens=30, track=True),
    )
}


def ruler_task(name: str) -> RulerTask:
    """The task of that name.

    Raises:
        ConfigError: If there is none; the message lists the tasks.
    """
    if name not in TASKS:
        raise unknown_choice("needle task", name, TASKS)
    return TASKS[name]


def needle_spans(text: str) -> list[tuple[int, int]]:
    """Spans [start, end), in characters, of the needles in a text."""
    return [hit.span() for hit in _NEEDLES.finditer(text)]
