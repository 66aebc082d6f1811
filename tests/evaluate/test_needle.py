"""Needles: a model that copies finds them all, one that guesses none; routed shares by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from stand_ins import SuccessorModel, UniformModel

from ham.errors import ConfigError
from ham.evaluate.needle import Questions, cells
from ham.evaluate.needle_rows import Asked, generation_rows, routed_rows
from ham.evaluate.scoring import RoutingCount, RowScore
from ham.model.decoder import DecoderOutput
from ham.model.generation import generate
from ham.model.mixer import MixerAux
from ham.report.statistics import clustered_wilson_interval
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.sample import RulerSample
from ham.ruler.tasks import TASKS
from ham.train.tokenizer import ByteTokenizer

ONE = {"tasks": ["niah_single_2"], "lengths": [500], "depths": [0.0, 0.5, 1.0], "samples": 3}


def settings(**changes: object) -> dict:
    return {"needle": {**ONE, **changes}}


def values(rows: list[dict], metric: str) -> list[float]:
    return [row["value"] for row in rows if row["metric"] == metric]


class ReadingModel(UniformModel):
    """Looks up the needle of the key that the question ends with and says its value."""

    def forward(self, tokens_BT: torch.Tensor) -> DecoderOutput:
        logits = torch.zeros(*tokens_BT.shape, self.config.vocabulary_size)
        for row, tokens in enumerate(tokens_BT.tolist()):
            text = bytes(tokens).decode("latin-1")
            key, end = next(
                (found[1], found.end())
                for found in re.finditer(r"for (\S+) mentioned in the provided text is", text)
            )
            value = re.search(rf"numbers for {key} is:( \d+)\.", text)[1]
            for place, byte in enumerate(value.encode()):
                if end - 1 + place < len(tokens):
                    logits[row, end - 1 + place, byte] = 9.0
        return DecoderOutput(logits, [MixerAux()])


def test_a_reading_model_finds_every_needle(make_subject) -> None:
    for cell in cells(make_subject(ReadingModel(), settings(lengths=[500, 530]))):
        rows = cell.run()
        assert values(rows, "accuracy") == [1.0, 1.0, 1.0]
        assert max(values(rows, "answer_loss_nats")) < 0.1
        assert values(rows, "samples_left_out") == [0]


def test_a_uniform_model_finds_none(make_subject) -> None:
    rows = cells(make_subject(UniformModel(), settings()))[0].run()
    assert values(rows, "accuracy") == [0.0, 0.0, 0.0]
    assert values(rows, "answer_loss_nats") == pytest.approx([np.log(257)] * 3)
    assert values(rows, "kept_fraction") == values(rows, "needles_routed") == []
    first = next(row for row in rows if row["metric"] == "accuracy")
    assert (first["n"], first["interval"], first["low"]) == (3, "wilson95", 0.0)


def test_rows_carry_their_coordinates(make_subject) -> None:
    changes = settings(
        tasks=["niah_single_1", "niah_multivalue"], task_lengths={"niah_multivalue": [900, 1000]}
    )
    made = cells(make_subject(UniformModel(), changes))
    assert [cell.name for cell in made] == [
        "niah_single_1, 500 tokens",
        "niah_multivalue, 900 tokens",
        "niah_multivalue, 1000 tokens",
    ]
    for cell, length in zip(made, (500, 900, 1000), strict=True):
        rows = cell.run()
        assert {row["x_value"] for row in rows} == {length}
        found = [
            (row["metric"], row["task"], row["labels"])
            for row in rows
            if row["metric"] in ("accuracy", "answer_loss_nats")
        ]
        assert found == [
            (fields["metric"], fields["task"], fields["labels"]) for fields in cell.expected
        ]
    # Several answers: no depth, and as many samples in all.
    depths = [row["labels"] for row in made[0].run() if row["metric"] == "accuracy"]
    assert depths == [{"depth": 0.0}, {"depth": 0.5}, {"depth": 1.0}]
    (several,) = [row for row in made[1].run() if row["metric"] == "accuracy"]
    assert several["labels"] == {} and several["n"] == 9


def test_kept_share_is_that_of_the_needles_own_tokens(make_subject) -> None:
    """This model routes tokens with even ids, in layer 1 only."""
    subject = make_subject(SuccessorModel(), settings(samples=9))
    rows = cells(subject)[0].run()
    groups = Questions(subject.tokenizer, subject.test).ask(
        TASKS["niah_single_2"], 500, [0.0, 0.5, 1.0], 9
    )
    routed = []
    for depth, samples in groups.items():
        shares = [np.mean(sample.tokens[slice(*sample.needles[0])] % 2 == 0) for sample in samples]
        mean, layer = (
            row
            for row in rows
            if row["metric"].startswith("kept") and row["labels"]["depth"] == depth
        )
        assert mean["value"] == pytest.approx(np.mean(shares)) == layer["value"]
        assert mean["labels"] == {"depth": depth}
        assert layer["labels"] == {"depth": depth, "layer": 1}
        assert layer["metric"] == "kept_fraction_layer"
        routed += [np.mean(sample.tokens[slice(*sample.values[0])] % 2 == 0) for sample in samples]
    shares = {
        row["labels"]["min_layers"]: (row["value"], row["n"])
        for row in rows
        if row["metric"] == "needles_routed"
    }
    assert shares == {0: (1.0, 27), 1: (np.mean(np.array(routed) >= 0.5), 27)}
    assert 0 < shares[1][0] < 1


def asked(routed: list[list[float]], right: list[bool], generated: str | None) -> Asked:
    """Two needles at tokens 2..3 and 6..7 with values at 3 and 7; answers at 10 and 11."""
    sample = RulerSample(
        task="niah_multivalue",
        tokens=np.arange(12),
        context=(0, 10),
        needles=((2, 4), (6, 8)),
        values=((3, 4), (7, 8)),
        answers=((10, 11), (11, 12)),
        references=("71", "72"),
        depth=None,
    )
    shares = np.zeros((len(routed), 11))
    shares[:, [3, 7]] = routed
    greedy = np.array([False] * 9 + right)
    return Asked(sample, RowScore(np.ones(11), greedy, shares), generated)


def test_routed_against_answered_by_hand() -> None:
    """Six needles, in two layers: (layers, right) are (2, yes) (0, no) (1, yes) (1, no) (0, yes)
    (2, yes)."""
    some = [
        asked([[1.0, 0.0], [0.5, 0.4]], [True, False], "71"),
        asked([[1.0, 0.0], [0.0, 1.0]], [True, False], "none"),
        asked([[0.0, 1.0], [0.0, 0.9]], [True, True], None),
    ]
    rows = routed_rows(some, {"labels": {}})
    found = {(row["metric"], row["labels"]["min_layers"]): (row["value"], row["n"]) for row in rows}
    assert found == {
        ("needles_routed", 0): (1.0, 6),
        ("accuracy_if_routed", 0): (pytest.approx(4 / 6), 6),
        ("string_match_if_routed", 0): (pytest.approx(1 / 4), 4),
        ("needles_routed", 1): (pytest.approx(4 / 6), 6),
        ("accuracy_if_not_routed", 1): (0.5, 2),
        ("accuracy_if_not_routed", 2): (0.5, 4),
        ("accuracy_if_routed", 1): (pytest.approx(3 / 4), 4),
        ("string_match_if_routed", 1): (pytest.approx(1 / 3), 3),
        ("needles_routed", 2): (pytest.approx(2 / 6), 6),
        ("accuracy_if_routed", 2): (1.0, 2),
        ("string_match_if_routed", 2): (1.0, 1),
    }
    # In at least one layer: one right of one, one of one and one of two needles of a sample.
    last = next(row for row in rows if row["metric"] == "accuracy_if_routed" and row["n"] == 4)
    expected = clustered_wilson_interval([1, 1, 1], [1, 1, 2]).row_fields()
    assert {name: last[name] for name in expected} == expected
    # Residuals 0.25, 0.25, -0.5: 0.1875 / (1.5 * 0.375 / 16) = 5.3, held at the four needles.
    assert last["effective_n"] == 4


def test_no_needle_in_that_many_layers_has_no_accuracy() -> None:
    rows = routed_rows([asked([[0.0, 0.2]], [True, True], None)], {"labels": {}})
    found = [(row["metric"], row["labels"]["min_layers"], row["value"]) for row in rows]
    assert found == [
        ("needles_routed", 0, 1.0),
        ("accuracy_if_routed", 0, 1.0),
        ("needles_routed", 1, 0.0),
        ("accuracy_if_not_routed", 1, 1.0),
    ]


def test_generated_answers_count_each_by_itself() -> None:
    some = [asked([[0, 0]], [True, True], text) for text in ("71 72", "so 72", "7", None)]
    every, part = generation_rows(some, {"labels": {}})
    assert (every["metric"], every["value"], every["n"]) == ("string_match_all", 0.5, 6)
    # 2, 1 and 0 of 2: residuals 1, 0, -1; v = 3/2 * 2 / 36 = 1/12, effective n = 0.25 * 12.
    assert every["effective_n"] == pytest.approx(3) and "effective_n" not in part
    assert (part["metric"], part["n"]) == ("string_match_part", 3)
    assert part["value"] == pytest.approx(2 / 3)
    assert generation_rows(some[3:], {}) == []


def test_all_models_get_the_same_questions(make_subject) -> None:
    subject = make_subject(UniformModel(), settings())
    task = TASKS["niah_multikey_1"]

    def ask(samples: int) -> list[list[int]]:
        questions = Questions(ByteTokenizer(), subject.test)
        return [one.tokens.tolist() for one in questions.ask(task, 700, [0.5], samples)[0.5]]

    longer, shorter = ask(5), ask(3)
    assert longer[:3] == shorter
    assert len(set(map(tuple, longer))) == 5


def test_routing_models_generate_and_report_every_layer(make_subject, tiny_model) -> None:
    tasks = ["niah_single_1", "niah_multivalue"]
    changes = settings(tasks=tasks, lengths=[760], depths=[0.5], samples=1, generate=True)
    for cell, answers in zip(cells(make_subject(tiny_model("ham"), changes)), (1, 4), strict=True):
        rows = cell.run()
        layers = [row for row in rows if row["metric"] == "kept_fraction_layer"]
        assert [row["labels"]["layer"] for row in layers] == [0, 1]
        assert values(rows, "needles_routed")[0] == 1.0
        (match,) = [row for row in rows if row["metric"] == "string_match_all"]
        assert match["n"] == answers
        assert values(rows, "generations_left_out") == [0]
        assert all(0 < row["kv_fraction"] < 1 for row in rows if "left_out" not in row["metric"])


def test_samples_beyond_the_models_range_are_counted_not_cut(make_subject) -> None:
    lines = {"tasks": ["niah_multikey_2"], "lengths": [760], "samples": 8, "depths": [0.5]}
    generator = RulerGenerator(ByteTokenizer(), Essays(np.empty(0, dtype=int)))
    assert generator.minimum_length("niah_multikey_2") < 700
    subject = make_subject(UniformModel(), settings(**lines))
    sizes = [
        len(sample.tokens)
        for sample in Questions(subject.tokenizer, subject.test).ask(
            TASKS["niah_multikey_2"], 760, [0.5], 8
        )[0.5]
    ]
    limit = sorted(sizes)[4] - 1
    subject = make_subject(UniformModel(max_positions=limit), settings(**lines))
    fitting = sum(size <= limit + 1 for size in sizes)
    assert 0 < fitting < 8
    rows = cells(subject)[0].run()
    out = next(row for row in rows if row["metric"] == "samples_left_out")
    assert (out["value"], out["n"]) == (8 - fitting, 8)
    (accuracy,) = [row for row in rows if row["metric"] == "accuracy"]
    assert accuracy["n"] == fitting
    assert max(length for _, length in subject.model.batches) <= limit

    subject = make_subject(UniformModel(max_positions=400), settings(**lines))
    rows = cells(subject)[0].run()
    assert values(rows, "samples_left_out") == [8]
    (failed,) = [row for row in rows if row["metric"] == "accuracy"]
    assert failed["error"] == "all 8 samples are longer than the model's 400 positions"


def test_a_length_below_the_minimum_is_refused_before_anything_runs(make_subject) -> None:
    generator = RulerGenerator(ByteTokenizer(), Essays(np.empty(0, dtype=int)))
    minimum = generator.minimum_length("niah_multikey_1")
    changes = settings(
        tasks=["niah_single_1", "niah_multikey_1"],
        task_lengths={"niah_multikey_1": [1000, minimum - 1]},
    )
    message = rf"asks niah_multikey_1 at {minimum - 1} tokens; .*'byte' it has at least {minimum}"
    with pytest.raises(ConfigError, match=message):
        cells(make_subject(UniformModel(), changes))


def test_losses_are_per_token_of_the_answers() -> None:
    one = asked([[0, 0]], [True, True], None)
    one.score.nats[9:] = [0.5, 2.5]
    assert math.isclose(one.loss_nats, 1.5)


GENERATED = {
    "tasks": ["niah_single_2", "niah_multivalue"],
    "lengths": [760],
    "depths": [0.25, 0.75],
    "samples": 3,
    "generate": True,
}


@pytest.mark.parametrize("mixer", ["ham", "gated_delta_rule", "transformer"])
def test_generation_takes_the_tokens_that_teacher_forcing_calls_right(
    make_subject, tiny_model, mixer: str
) -> None:
    """What a model generates, put behind the prompt as the answer, is right token by token."""
    subject = make_subject(tiny_model(mixer), settings(**GENERATED))
    task = TASKS["niah_single_2"]
    questions = Questions(subject.tokenizer, subject.test)
    asked_for = [
        sample for length in (700, 760) for sample in questions.ask(task, length, [0.5], 2)[0.5]
    ]
    made = generate(subject.model, [one.prompt.tolist() for one in asked_for], 24)
    for changed in (False, True):
        rows = []
        for sample, tokens in zip(asked_for, made, strict=True):
            answer = np.array([*tokens[:-1], (tokens[-1] + changed) % 257])
            rows.append(np.concatenate([sample.prompt, answer]))
        for sample, score in zip(asked_for, subject.score(rows, RoutingCount()), strict=True):
            start = len(sample.prompt)
            assert score.span(start, start + 23)[1]
            assert score.span(start, start + 24)[1] is not changed


@pytest.mark.parametrize("mixer", ["ham", "transformer"])
def test_both_scores_agree_on_what_models_generate(make_subject, tiny_model, mixer: str) -> None:
    made = cells(make_subject(tiny_model(mixer), settings(**GENERATED)))
    for cell, groups in zip(made, (2, 1), strict=True):
        rows = [row for row in cell.run() if row["metric"] == "generated_as_scored"]
        assert [row["value"] for row in rows] == [1.0] * groups
        assert sum(row["n"] for row in rows) == 6


def test_disagreement_of_both_scores_is_seen() -> None:
    one = asked([[0, 0]], [True, False], "x")
    assert one.generated_as_scored is None
    for tokens, right, agrees in (
        ([10, 99], True, True),
        ([9, 10], True, False),
        ([], True, False),
        ([9], False, True),
        ([10], False, False),
    ):
        one = asked([[0, 0]], [right, False], "x")
        one.continued = tokens
        assert one.generated_as_scored is agrees
        (row,) = [
            row
            for row in generation_rows([one], {"labels": {}})
            if row["metric"] == "generated_as_scored"
        ]
        assert row["value"] == float(agrees)


def test_a_subset_is_generated(make_subject, tiny_model) -> None:
    """One of three samples at each depth; of a task of several answers as many in all."""
    chosen = {**GENERATED, "generate_samples": 1}
    single, several = (
        cell.run() for cell in cells(make_subject(tiny_model("ham"), settings(**chosen)))
    )
    for rows, accuracy, generated, answers in (
        (single, [3, 3], [1, 1], 1),
        (several, [6], [2], 4),
    ):
        assert [row["n"] for row in rows if row["metric"] == "accuracy"] == accuracy
        matches = [row["n"] for row in rows if row["metric"] == "string_match_all"]
        assert matches == [answers * count for count in generated]
        assert [row["n"] for row in rows if row["metric"] == "generations_left_out"] == [2]
    chosen = {**GENERATED, "generate_tasks": ["niah_multivalue"]}
    single, several = cells(make_subject(tiny_model("ham"), settings(**chosen)))
    assert "string_match_all" not in {fields["metric"] for fields in single.expected}
    assert "string_match_all" not in {row["metric"] for row in single.run()}
    assert "string_match_all" in {fields["metric"] for fields in several.expected}


def test_a_generated_task_must_be_asked(make_subject) -> None:
    with pytest.raises(ConfigError, match="generate_tasks names 'vt', which is not among"):
        make_subject(UniformModel(), settings(generate_tasks=["vt"]))


def test_all_samples_of_a_length_decode_in_one_batch(
    make_subject, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def note(model, prompts, *arguments, batch_size, **others):
        sizes.append((len(prompts), batch_size))
        return generate(model, prompts, *arguments, batch_size=batch_size, **others)

    monkeypatch.setattr("ham.model.generation.generate", note)
    subject = make_subject(tiny_model("ham"), settings(**{**GENERATED, "samples": 9}))
    for cell in cells(subject):
        cell.run()
    assert [prompts for prompts, _ in sizes] == [18, 18]
    assert all(prompts <= batch for prompts, batch in sizes)
