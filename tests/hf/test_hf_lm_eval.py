"""lm-eval's own `hf` model on an exported folder answers as this project's adapter does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ham.conformance.subject import set_thresholds
from ham.evaluate.lm_eval_adapter import HamLM
from ham.evaluate.lm_eval_run import evaluate_tasks
from ham.evaluate.tasks import OFFLINE_TASKS
from ham.hf import save
from ham.model.decoder import DecoderLM
from ham.model.registry import registered_mixers
from ham.train.tokenizer import END_OF_TEXT, ByteTokenizer, train_bpe

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


def logged(results: dict, task: str) -> list[float]:
    """Every log-likelihood of a task, in the order of its documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    answers = [answer[0] for sample in samples for answer in sample["resps"]]
    return [float(one[0] if isinstance(one, list | tuple) else one) for one in answers]


def exported_ham(folder: Path, tiny_model) -> HamLM:
    """A HAM model with a byte-pair vocabulary as a Hugging Face folder, read by this project."""
    tokenizer = train_bpe(["the whale and the sea and the ship. " * 20], vocabulary_size=300)
    torch.manual_seed(0)
    model = DecoderLM(
        dataclasses.replace(
            tiny_model("ham").config,
            vocabulary_size=tokenizer.vocabulary_size,
            tokenizer=tokenizer.name,
        )
    )
    set_thresholds(model)
    save(model, tokenizer, folder)
    return HamLM(str(folder), device="cpu", max_length=100)


def random_llama(folder: Path, tiny_model) -> HamLM:
    """A llama of transformers with random weights, read by this project."""
    pytest.importorskip("ham.external")
    import transformers

    tokenizer = train_bpe(["the whale and the sea and the ship. " * 20], vocabulary_size=300)
    tokenizer.save(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TEXT
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return HamLM(str(folder), device="cpu", max_length=100)


@pytest.mark.parametrize("make", [exported_ham, random_llama])
def test_parity_with_lm_evals_own_model(make, tiny_model, tmp_path: Path, monkeypatch) -> None:
    """The same folder: identical accuracies, log-likelihoods to 1e-3."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "model"
    folder.mkdir()
    ours = make(folder, tiny_model)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=8, max_length=100)
    found, expected = (evaluate_tasks(lm, OFFLINE_TASKS, limit=8)[0] for lm in (ours, theirs))
    for task in OFFLINE_TASKS:
        assert logged(found, task) == pytest.approx(logged(expected, task), abs=1e-3)
        scores = expected["results"][task]
        for metric in scores:
            if metric.startswith("acc") and "stderr" not in metric:
                assert found["results"][task][metric] == scores[metric]
            elif metric.startswith(("perplexity,", "bits_per_byte,")):
                known = pytest.approx(scores[metric], rel=1e-4)
                assert found["results"][task][metric] == known
    accuracies = expected["results"]["held_out_continuation"]["acc,none"]
    assert 0 < accuracies < 1, "otherwise equal accuracies would show little"
