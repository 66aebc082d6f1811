"""Our samples against the text of the published generators, given the same random choices.

`published_niah.json` was written by `generate_input_output` of lm-evaluation-harness' copy of
RULER, with the word lists and the essay that stand in it. The text of variable tracking was written
by hand from NVIDIA's `variable_tracking.py`.
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
from ham.ruler.sample import Context
from ham.ruler.scorers import clean_prediction, string_match_all, string_match_part
from ham.ruler.tasks import DEPTHS, NOISE, TASKS, RulerTask, needle_spans
from ham.train.tokenizer import ByteTokenizer, Tokenizer, train_bpe

PUBLISHED = json.loads((Path(__file__).parent / "published_niah.json").read_text())
SAMPLES: dict[str, dict[str, Any]] = PUBLISHED["samples"]
LINES = 6


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    texts = [PUBLISHED["essay"], *(sample["prompt"] for sample in SAMPLES.values())]
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


@pytest.mark.parametrize("name", SAMPLES)
def test_niah_text_is_the_published_one(name, pieces) -> None:
    task, chosen = TASKS[name], SAMPLES[name]
    # Our first keys are asked for; the published code chooses which of the keys those are.
    others = [number for number in range(task.num_keys) if number not in chosen["asked"]]
    order = [*chosen["asked"], *others]
    keys = [chosen["keys"][number] for number in order]
    values = [chosen["values"][number] for number in order]
    question = niah.make_question(pieces, task, keys, values)
    sample = question.finish(task, published_context(pieces, task, question, chosen, order))
    decode = pieces.tokenizer.decode
    assert decode(sample.prompt.tolist()) == chosen["prompt"]
    assert list(sample.references) == chosen["answers"]
    assert decode(sample.tokens.tolist()) == f"{chosen['prompt']} {' '.join(chosen['answers'])}"
    # Encoded in pieces or at once: the same tokens.
    assert pieces.tokenizer.encode(chosen["prompt"]) == sample.prompt.tolist()
    for spans in (sample.values, sample.answers):
        found = [decode(sample.tokens[slice(*span)].tolist()) for span in spans]
        assert found == [f" {answer}" for answer in chosen["answers"]]


VARIABLE_TRACKING = f"""Memorize and track the chain(s) of variable assignment hidden in the \
following text.

VAR ABC = 54321
{NOISE}
VAR DEF = VAR ABC\x20
{NOISE}
VAR GHI = VAR DEF\x20
{NOISE}
VAR JKL = VAR GHI\x20
{NOISE}
VAR MNO = VAR JKL\x20
{NOISE}
Question: Find all variables that are assigned the value 54321 in the text above. Answer: \
According to the chain(s) of variable assignment in the text above, 5 variables are assgined the \
value 54321, they are:  ABC DEF GHI JKL MNO

Memorize and track the chain(s) of variable assignment hidden in the following text.

VAR ABCDE = 67890
{NOISE}
{NOISE}
VAR FGHIJ = VAR ABCDE\x20
{NOISE}
VAR KLMNO = VAR FGHIJ\x20
{NOISE}
VAR PQRST = VAR KLMNO\x20
{NOISE}
VAR UVWXY = VAR PQRST\x20
{NOISE}
Question: Find all variables that are assigned the value 67890 in the text above. Answer: \
According to the chain(s) of variable assignment in the text above, 5 variables are assgined the \
value 67890, they are:"""


def test_variable_tracking_text_is_the_published_one() -> None:
    pieces = Pieces(ByteTokenizer())
    example = variables.Chain(["ABC", "DEF", "GHI", "JKL", "MNO"], "54321")
    chain = variables.Chain(["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], "67890")
    chains = variables.encode_chains(pieces, [example, chain])
    sample = variables.compose(
        pieces, Noise(pieces), TASKS["vt"], chains, chain.names, [0, 2, 3, 4, 5], 6
    )
    assert bytes(sample.prompt.tolist()).decode() == VARIABLE_TRACKING
    assert bytes(sample.tokens.tolist()).decode() == (
        f"{VARIABLE_TRACKING} ABCDE FGHIJ KLMNO PQRST UVWXY"
    )
    hops = [bytes(sample.tokens[slice(*span)].tolist()).decode() for span in sample.needles]
    assert hops[:2] == ["VAR ABCDE = 67890", "VAR FGHIJ = VAR ABCDE "]
    names = [bytes(sample.tokens[slice(*span)].tolist()).decode() for span in sample.values]
    assert names == [f" {name}" for name in chain.names]


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
    text = SAMPLES["niah_multikey_1"]["prompt"]
    found = [text[start:end] for start, end in needle_spans(text)]
    assert len(found) == 4
    assert found[0] == "One of the special magic numbers for tidy-fiddle is: 7793667."


def test_scorers_by_hand() -> None:
    predictions = ["it is ABC, 12", "nothing", "abc"]
    references = [["abc", "12"], ["abc", "12"], ["ABC", "99"]]
    # 2 of 2, 0 of 2 and 1 of 2 answers: (1 + 0 + 1/2) / 3; in two of three samples any.
    assert string_match_all(predictions, references) == pytest.approx(0.5)
    assert string_match_part(predictions, references) == pytest.approx(2 / 3)
    assert clean_prediction(" \x00 a\tb\x1fc \n") == "a\nb\nc"
    with pytest.raises(ValueError, match="no prediction"):
        string_match_all([], [])
