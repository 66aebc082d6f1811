"""lm-eval's own `hf` model on an exported folder answers as this project's adapter does."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ham.evaluate.lm_eval_adapter import HamLM
from ham.evaluate.lm_eval_run import evaluate_tasks
from ham.model.registry import registered_mixers
from ham.train.tokenizer import ByteTokenizer

MIXERS = sorted(registered_mixers())


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def both(saved, tiny_model, mixer: str) -> tuple[HFLM, HamLM]:
    options = {"batch_size": 3, "max_length": 100}
    theirs = HFLM(pretrained=str(saved(mixer)), device="cpu", **options)
    return theirs, HamLM(tiny_model(mixer), tokenizer=ByteTokenizer(), **options)


@pytest.mark.parametrize("mixer", MIXERS)
def test_same_answers(saved, tiny_model, mixer) -> None:
    theirs, ours = both(saved, tiny_model, mixer)
    scored = requests(
        "loglikelihood",
        ("the whale", " and the sea"),
        ("a", "b"),
        ("", "café"),
        ("a long context " * 12, "that is cut"),
        ("old men ", "sail"),
    )
    expected = ours.loglikelihood(scored)
    for (value, greedy), (known, known_greedy) in zip(
        theirs.loglikelihood(scored, disable_tqdm=True), expected, strict=True
    ):
        assert value == pytest.approx(known, abs=2e-4) and greedy == known_greedy
    rolling = requests("loglikelihood_rolling", ("the whale and the sea " * 9,), ("ab",))
    expected = ours.loglikelihood_rolling(rolling)
    found = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    settings = {"until": ["\n\n"], "max_gen_toks": 10, "do_sample": False}
    written = requests(
        "generate_until", ("the whale", settings), ("a", settings), ("a long " * 20, settings)
    )
    assert theirs.generate_until(written, disable_tqdm=True) == ours.generate_until(written)


def test_same_scores_on_whole_tasks(saved, tiny_model, tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    theirs, ours = both(saved, tiny_model, "ham")
    tasks = ["held_out_continuation", "held_out_perplexity"]
    found, expected = (evaluate_tasks(lm, tasks, limit=4)[0]["results"] for lm in (theirs, ours))
    assert found[tasks[0]]["acc,none"] == expected[tasks[0]]["acc,none"]
    bits = found[tasks[1]]["bits_per_byte,none"]
    assert bits == pytest.approx(expected[tasks[1]]["bits_per_byte,none"], rel=1e-5)
