"""Samples of every task to read, beside the template that RULER publishes."""

from __future__ import annotations

import numpy as np

from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.tasks import (
    NEEDLE,
    NIAH_ANSWER_PREFIX,
    NIAH_TEMPLATE,
    NOISE,
    TASKS,
    VT_ANSWER_PREFIX,
    VT_TEMPLATE,
    RulerTask,
)
from ham.train.tokenizer import ByteTokenizer

SEED = 20260322
_EXTRA_TOKENS = 120

# Herman Melville, Moby-Dick (1851), chapter 1; a printed page reads the same on every machine.
ESSAY = (
    "Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world. It is a way I have of driving off the spleen and "
    "regulating the circulation. Whenever I find myself growing grim about the mouth; whenever it "
    "is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before "
    "coffin warehouses, and bringing up the rear of every funeral I meet; then, I account it high "
    "time to get to sea as soon as I can. This is my substitute for pistol and ball. With a "
    "philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. There "
    "is nothing surprising in this. If they but knew it, almost all men in their degree, some time "
    "or other, cherish very nearly the same feelings towards the ocean with me. "
)


def showcase(count: int = 10) -> str:
    """Markdown with the published templates and `count` samples of each task in bytes.

    The depth goes from 0 to 1 over the samples of a task; each is a little longer than its task's
    minimum.
    """
    tokenizer = ByteTokenizer()
    generator = RulerGenerator(tokenizer, Essays.from_texts(tokenizer, [ESSAY * 4]))
    parts = [_HEAD]
    for name, task in TASKS.items():
        length = generator.minimum_length(name) + _EXTRA_TOKENS
        parts.append(_section(task, length))
        for number in range(count):
            depth = number / max(1, count - 1)
            rng = np.random.default_rng((SEED, number))
            sample = generator.sample(name, rng, length, depth)
            where = "" if sample.depth is None else f", depth {sample.depth:.3f}"
            prompt = tokenizer.decode(sample.prompt.tolist())
            answers = tokenizer.decode(sample.tokens[sample.answers[0][0] :].tolist())
            parts.append(
                f"{number + 1}. {len(sample.tokens):,} tokens{where}; answers `{answers}`\n\n"
                f"```text\n{prompt}\n```\n\n"
            )
    return "".join(parts)


def _section(task: RulerTask, length: int) -> str:
    if task.track:
        return (
            f"## {task.name}\n\n"
            f"Published, twice: a worked example with its answers, then the question.\n\n"
            f"```text\n{VT_TEMPLATE}{VT_ANSWER_PREFIX}\n```\n\n"
            f"Context: one chain of {task.answers - 1} hops in lines of noise. "
            f"Ours, up to {length:,} bytes:\n\n"
        )
    haystack = {
        "noise": f"`{NOISE}`, line after line",
        "essay": "prose",
        "needle": "needles of other keys, line after line",
    }[task.haystack]
    return (
        f"## {task.name}\n\n"
        f"Published{', put into the singular' if task.answers == 1 else ''}:\n\n"
        f"```text\n{NIAH_TEMPLATE}{NIAH_ANSWER_PREFIX}\n```\n\n"
        f"Needle `{NEEDLE}` with {task.keys} as keys and {task.values} as values; "
        f"{task.num_keys} key(s) hidden, {task.num_values} value(s) of each, {task.num_queries} "
        f"key(s) asked for; haystack: {haystack}. Ours, up to {length:,} bytes:\n\n"
    )


_HEAD = """# Samples of the needle tasks

Written by `ham needle samples --out ham/ruler/SAMPLES.md`; a test compares. Short ones, with the
byte tokenizer and the first page of Moby-Dick as essay; a space at the end of a line is published.
[README.md](README.md) lists what differs from the published generator.

"""
