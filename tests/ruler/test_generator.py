"""Samples at any length from the minimum up, exact in depth and length, and quick to make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ham import ruler
from ham.cli import main
from ham.errors import ConfigError
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.showcase import showcase
from ham.ruler.tasks import TASKS
from ham.train.tokenizer import ByteTokenizer, Tokenizer, train_bpe

SENTENCES = "The whale swam on. Did the ship — an old one — follow it? It did, for days! "
DEPTHS = (0.0, 0.13, 0.5, 0.99, 1.0)
WITH_EXACT_DEPTH = [
    name for name, task in TASKS.items() if task.has_depth and task.haystack != "needle"
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([SENTENCES * 3, "One of the special magic numbers for is"], 330)


@pytest.fixture(params=["byte", "bpe"])
def generator(request, bpe) -> RulerGenerator:
    tokenizer = ByteTokenizer() if request.param == "byte" else bpe
    return RulerGenerator(tokenizer, Essays.from_texts(tokenizer, [SENTENCES * 200]))


def text(generator: RulerGenerator, tokens: np.ndarray) -> str:
    return generator.tokenizer.decode(tokens.tolist())


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_stands_in_its_needle(name, generator) -> None:
    task = TASKS[name]
    for seed in range(6):
        length = generator.minimum_length(name) + 97 * seed
        sample = generator.sample(name, np.random.default_rng(seed), length)
        assert len(sample.answers) == len(sample.needles) == task.answers
        assert sample.answers[-1][1] == len(sample.tokens) <= length
        start, end = sample.context
        for needle, value, answer, reference in zip(
            sample.needles, sample.values, sample.answers, sample.references, strict=True
        ):
            assert start <= needle[0] <= value[0] < value[1] <= needle[1] <= end
            assert text(generator, sample.tokens[slice(*answer)]) == f" {reference}"
            assert np.array_equal(sample.tokens[slice(*value)], sample.tokens[slice(*answer)])
        assert len(set(sample.references)) == task.answers


@pytest.mark.parametrize("name", WITH_EXACT_DEPTH)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_begins_at_the_token_of_the_depth(name, depth, generator) -> None:
    for seed in range(8):
        # Distractors take room: with little haystack not every depth exists.
        length = generator.minimum_length(name) + 700 + seed
        sample = generator.sample(name, np.random.default_rng(seed), length, depth)
        assert len(sample.tokens) == length
        start, end = sample.context
        needle = sample.needles[0]
        room = end - start - (needle[1] - needle[0])
        assert needle[0] - start == round(depth * room)
        assert sample.depth == pytest.approx(depth, abs=0.501 / room)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_among_needles_are_whole_lines(name, generator) -> None:
    kind = TASKS[name].values
    for depth in DEPTHS:
        length = generator.minimum_length(name) + 900
        sample = generator.sample(name, np.random.default_rng(7), length, depth)
        lines = text(generator, sample.tokens[slice(*sample.context)]).split("\n")
        assert all(line.startswith(f"One of the special magic {kind} for ") for line in lines)
        assert all(line.endswith(".") for line in lines)
        keys = [line.split()[7] for line in lines]
        assert len(set(keys)) == len(keys)
        sizes = [len(generator.tokenizer.encode(f"{line}\n")) for line in lines]
        assert length - len(sample.tokens) < max(sizes)
        # No other line begins nearer to the depth.
        place = sample.needles[0][0] - sample.context[0]
        own = sizes.pop(np.searchsorted(np.cumsum(sizes), place, side="right"))
        starts = np.cumsum([0, *sizes])
        assert own and abs(place - depth * starts[-1]) == np.abs(starts - depth * starts[-1]).min()


def test_crowded_distractors_leave_the_nearest_possible_token(generator) -> None:
    name = "niah_multikey_1"
    for depth in np.linspace(0, 1, 23):
        length = generator.minimum_length(name)
        sample = generator.sample(name, np.random.default_rng(1), length, float(depth))
        assert len(sample.tokens) == length
        assert sample.depth == pytest.approx(depth, abs=0.25)


def test_needles_in_prose_stand_between_sentences(generator) -> None:
    for name in ("niah_single_2", "niah_multikey_1", "niah_multiquery", "niah_multivalue"):
        sample = generator.sample(name, np.random.default_rng(3), 1700)
        for start, _ in sample.needles:
            before = text(generator, sample.tokens[sample.context[0] : start])
            assert before.strip() == "" or before[-1] in ".?!"


def test_several_answers_have_no_depth_and_different_ones(generator) -> None:
    places = set()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sample = generator.sample("niah_multivalue", rng, 1700, 0.5)
        assert sample.depth is None
        places.add(sample.needles[0][0])
    assert len(places) > 5


@pytest.mark.parametrize("name", TASKS)
def test_samples_follow_from_the_seed_alone(name, generator) -> None:
    def make(seed: int) -> list[int]:
        length = generator.minimum_length(name) + 200
        return generator.sample(name, np.random.default_rng(seed), length, 0.4).tokens.tolist()

    first = make(1)
    assert make(2) != first and make(1) == first


def test_what_does_not_exist_is_refused(generator) -> None:
    rng = np.random.default_rng(0)
    minimum = generator.minimum_length("vt")
    message = f"vt of {minimum - 1} tokens is too short; .* the minimum is {minimum}"
    with pytest.raises(ConfigError, match=message):
        generator.sample("vt", rng, minimum - 1)
    with pytest.raises(ConfigError, match=r"depth must be within 0\.\.1, received 1.5"):
        generator.sample("niah_single_1", rng, 2000, 1.5)
    with pytest.raises(ConfigError, match="unknown needle task 'niah'; known: niah_multikey_1"):
        generator.sample("niah", rng, 2000)
    with pytest.raises(ConfigError, match=r"needs a haystack of \d+ tokens; the text has"):
        generator.sample("niah_single_2", rng, 10**6)
    with pytest.raises(ConfigError, match=r"takes \d+ uuids; there are 8192"):
        generator.sample("niah_multikey_3", rng, 3 * 10**6)


def test_prose_without_sentences_takes_any_token() -> None:
    essays = Essays(np.frombuffer(b"hay " * 500, dtype=np.uint8))
    generator = RulerGenerator(ByteTokenizer(), essays)
    sample = generator.sample("niah_single_2", np.random.default_rng(0), 600, 0.25)
    assert len(sample.tokens) == 600 and sample.depth == pytest.approx(0.25, abs=0.01)


def test_sentences_are_cut_where_they_end() -> None:
    tokenizer = ByteTokenizer()
    essays = Essays.from_texts(tokenizer, ['He  said:\n"Go." (Now.) It was 9 a.m. then', "Two."])
    plain = bytes(essays.tokens).decode()
    assert plain == 'He said: "Go." (Now.) It was 9 a.m. then Two.'
    pieces = [plain[start:] for start in essays.starts]
    assert [piece[:6] for piece in pieces] == ["He sai", " (Now.", " It wa", " Two."]


def test_the_committed_samples_are_the_generated_ones() -> None:
    committed = Path(ruler.__file__).with_name("SAMPLES.md").read_text(encoding="utf-8")
    assert committed == showcase(10), "run `ham needle samples --out ham/ruler/SAMPLES.md` again"
    assert all(f"## {name}\n" in committed for name in TASKS)


def test_needle_commands(capsys, tmp_path: Path) -> None:
    assert main(["needle", "samples", "--count", "1", "--out", str(tmp_path / "s.md")]) == 0
    assert (tmp_path / "s.md").read_text().count("```text\n") == 2 * len(TASKS)
    assert main(["needle", "samples", "--count", "0"]) == 2
