"""Our samples against the text of the published generators, given the same random choices.

`published.json` has ten samples of each task. Those of niah were written by `generate_input_output`
of lm-evaluation-harness' copy of RULER (seeds 0, 1, ... but for those in which two needles touch or
one begins or ends the essay) with our word lists and the essay in the file; those of vt by NVIDIA's
`variable_tracking.py` with 5 to 14 lines of noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ham.ruler import niah, variables
from ham.ruler.haystacks import Essays, Noise
from ham.ruler.pieces import Pieces
from ham.ruler.sample import Context, RulerSample
from ham.ruler.scorers import clean_prediction, string_match_all, string_match_part
from ham.ruler.tasks import DEPTHS, TASKS, RulerTask, needle_spans
from ham.train.tokenizer import ByteTokenizer, Tokenizer, train_bpe

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
SAMPLES: dict[str, list[dict[str, Any]]] = PUBLISHED["samples"]
NIAH = [name for name in SAMPLES if name != "vt"]
LINES = 6


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    texts = [PUBLISHED["essay"], *(samples[0]["prompt"] for samples in SAMPLES.values())]
    return train_bpe(texts, 400)


@pytest.fixture(params=["byte", "bpe"])
def pieces(request, bpe) -> Pieces:
    return Pieces(ByteTokenizer() if request.param == "byte" else bpe)


def published_context(
    pieces: Pieces, task: RulerTask, question: niah.Question, chosen: dict[str, Any], order: list
) -> Context:
    """The context of the published choices; `order[i]` is the published number of our key i."""
    noise = Noise(pieces)
    if task.haystack == "essay":
        essays = Essays.from_texts(pieces.tokenizer, [PUBLISHED["essay"]])
        count = task.num_values
        ours = {key * count + v: n * count + v for n, key in enumerate(order) for v in range(count)}
        cuts = [
            (int(essays.starts[place]), ours[number])
            for place, number in zip(chosen["places"], chosen["order"], strict=True)
        ]
        return niah.essay_context(essays, 0, len(essays.tokens), cuts, question.statements)
    needle, depth = question.statements[0], chosen["places"][0] / LINES
    if task.haystack == "noise":
        return niah.noise_context(noise, needle, LINES * noise.period + len(needle), depth)
    keys, values = zip(*chosen["lines"], strict=True)
    lines = niah.make_question(pieces, task, keys, [[value] for value in values]).statements
    return niah.lines_context(noise, [line.tokens for line in lines], needle, depth)


@pytest.mark.parametrize("name", NIAH)
def test_niah_text_is_the_published_one(name, pieces) -> None:
    task = TASKS[name]
    assert len(SAMPLES[name]) == 10
    for chosen in SAMPLES[name]:
        # Our first keys are asked for; the published code chooses which of the keys those are.
        others = [number for number in range(task.num_keys) if number not in chosen["asked"]]
        order = [*chosen["asked"], *others]
        keys = [chosen["keys"][number] for number in order]
        values = [chosen["values"][number] for number in order]
        question = niah.make_question(pieces, task, keys, values)
        context = published_context(pieces, task, question, chosen, order)
        check(pieces, question.finish(task, context), chosen)


def test_variable_tracking_text_is_the_published_one() -> None:
    pieces = Pieces(ByteTokenizer())
    assert len(SAMPLES["vt"]) == 10
    for chosen in SAMPLES["vt"]:
        chains = [variables.Chain(*chosen[key]) for key in ("example", "chain")]
        sample = variables.compose(
            pieces,
            Noise(pieces),
            TASKS["vt"],
            variables.encode_chains(pieces, chains),
            chains[1].names,
            chosen["places"],
            chosen["noises"],
        )
        check(pieces, sample, chosen)
        hops = [pieces.tokenizer.decode(sample.tokens[slice(*span)]) for span in sample.needles]
        first, second, *_ = chains[1].names
        assert hops[:2] == [f"VAR {first} = {chains[1].value}", f"VAR {second} = VAR {first} "]


def check(pieces: Pieces, sample: RulerSample, chosen: dict[str, Any]) -> None:
    """Text and answers are the published ones; in pieces or at once, the tokens are the same."""
    decode, answers = pieces.tokenizer.decode, chosen["answers"]
    assert decode(sample.prompt.tolist()) == chosen["prompt"]
    assert list(sample.references) == answers
    assert decode(sample.tokens.tolist()) == f"{chosen['prompt']} {' '.join(answers)}"
    assert pieces.tokenizer.encode(chosen["prompt"]) == sample.prompt.tolist()
    for spans in (sample.values, sample.answers):
        found = [decode(sample.tokens[slice(*span)].tolist()) for span in spans]
        assert found == [f" {answer}" for answer in answers]


def test_depths_are_the_published_grid() -> None:
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


def test_task_table() -> None:
    """Answers and tokens to generate, from RULER's synthetic.yaml and constants.py."""
    assert {name: (task.answers, task.new_tokens) for name, task in TASKS.items()} == {
        **dict.fromkeys([f"niah_single_{n}" for n in (1, 2, 3)], (1, 128)),
        **dict.fromkeys([f"niah_multikey_{n}" for n in (1, 2, 3)], (1, 128)),
        "niah_multivalue": (4, 128),
        "niah_multiquery": (4, 128),
        "vt": (5, 30),
    }


def test_needles_are_found_in_text() -> None:
    text = SAMPLES["niah_multikey_1"][0]["prompt"]
    found = [text[start:end] for start, end in needle_spans(text)]
    assert len(found) == 4
    assert all(one.startswith("One of the special magic numbers for ") for one in found)


def test_scorers_by_hand() -> None:
    predictions = ["it is ABC, 12", "nothing", "abc"]
    references = [["abc", "12"], ["abc", "12"], ["ABC", "99"]]
    # 2 of 2, 0 of 2 and 1 of 2 answers: (1 + 0 + 1/2) / 3; in two of three samples any.
    assert string_match_all(predictions, references) == pytest.approx(0.5)
    assert string_match_part(predictions, references) == pytest.approx(2 / 3)
    assert clean_prediction(" \x00 a\tb\x1fc \n") == "a\nb\nc"
    with pytest.raises(ValueError, match="no prediction"):
        string_match_all([], [])
