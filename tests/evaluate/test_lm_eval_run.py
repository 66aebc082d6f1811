"""Whole lm-eval runs: offline tasks with real models, published sets where the cache has them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch
from stand_ins import ByteText, UniformModel

from ham.config_files import parse_config
from ham.errors import ConfigError, MissingDataError
from ham.evaluate import lm_eval_load, lm_eval_run
from ham.evaluate.fetch_evals import evals_folder
from ham.evaluate.lm_eval_adapter import HamLM
from ham.evaluate.lm_eval_chance import UNIFORM, reference_rows, uniform, untrained_twin
from ham.evaluate.lm_eval_run import evaluate_tasks, task_rows
from ham.evaluate.part import Subject
from ham.evaluate.tasks import OFFLINE_TASKS, REAL_SETS
from ham.model.decoder import DecoderLM
from ham.routing.router import UnigramSurprise


@pytest.fixture(autouse=True)
def own_data_sets_cache(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow copies of `datasets` go to a folder of the test."""
    import datasets

    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def by_metric(rows: list[dict], task: str) -> dict[str, dict]:
    return {row["metric"]: row for row in rows if row["task"] == task}


def subject_for(model, tasks: list[str], limit: int | None) -> Subject:
    config = parse_config(
        {
            "name": "test",
            "arms": [{"name": "arm", "mixer": "ham"}],
            "evaluate": {"lm_eval": {"tasks": tasks, "limit": limit}},
        }
    )
    return Subject(config, model, ByteText(), Path("unused"))


def test_offline_tasks_of_a_uniform_model_have_known_scores() -> None:
    lm = HamLM(UniformModel(context=512), tokenizer=ByteText())
    results, tasks = evaluate_tasks(lm, OFFLINE_TASKS, limit=12)
    rows = []
    for name in OFFLINE_TASKS:
        rows += task_rows(results["results"][name], 12, {"task": name})
        rows += reference_rows(tasks[name], UNIFORM, uniform(lm, name), {"task": name})
    bits = by_metric(rows, "held_out_perplexity")["bits_per_byte"]
    assert bits["value"] == pytest.approx(math.log2(257)) and bits["n"] == 12
    words = by_metric(rows, "held_out_last_word")
    assert words["accuracy"]["value"] == words["chance_accuracy"]["value"] == 0
    lengths = [len(sample["doc"]["target"]) for sample in results["samples"]["held_out_last_word"]]
    assert words["perplexity"]["value"] == pytest.approx(257 ** np.mean(lengths), rel=1e-4)
    choice = by_metric(rows, "held_out_continuation")
    golds = [sample["doc"]["gold"] for sample in results["samples"]["held_out_continuation"]]
    assert choice["accuracy"]["value"] == pytest.approx(golds.count(0) / 12)
    assert choice["chance_accuracy"]["value"] == pytest.approx(choice["accuracy"]["value"])
    assert choice["accuracy"]["interval"] == "wilson95"
    assert set(choice) == {
        "accuracy",
        "accuracy_norm",
        "chance_accuracy",
        "chance_accuracy_norm",
    }
    for name, own in (
        ("held_out_perplexity", "bits_per_byte"),
        ("held_out_last_word", "perplexity"),
    ):
        scores = by_metric(rows, name)
        assert scores[f"chance_{own}"]["value"] == pytest.approx(scores[own]["value"], rel=1e-4)


def test_the_part_makes_rows_samples_and_routed_shares(tiny_model, capfd) -> None:
    subject = subject_for(tiny_model("ham"), list(OFFLINE_TASKS), limit=3)
    (cell,) = lm_eval_run.cells(subject)
    rows = cell.run()
    made = {(row["metric"], row["task"]) for row in rows}
    assert {(fields["metric"], fields["task"]) for fields in cell.expected} <= made
    for row in rows:
        assert row["experiment"] == "lm_eval" and row["n"] == 3
        assert set(row["labels"]) == {"truncated"}
        own = not row["metric"].startswith(("chance_", "untrained_"))
        assert own == ("kv_fraction" in row) and (not own or 0 < row["kv_fraction"] < 1)
    own = {metric for metric, _ in made if not metric.startswith(("chance_", "untrained_"))}
    for prefix in ("chance_", "untrained_"):
        assert {m.removeprefix(prefix) for m, _ in made if m.startswith(prefix)} == own
    truncated = by_metric(rows, "held_out_last_word")["accuracy"]["labels"]["truncated"]
    assert truncated == 3, "passages of 300 bytes do not fit the tiny model's 128 tokens"
    assert len(subject.samples) == 9
    assert {sample["task"] for sample in subject.samples} == set(OFFLINE_TASKS)
    assert all("resps" in sample and "doc" in sample for sample in subject.samples)
    streams = capfd.readouterr()
    assert streams.out == "" and "it/s" not in streams.err
    assert "held_out_last_word: 3 requests are longer than 128 tokens" in streams.err


def test_no_tasks_no_cells(tiny_model) -> None:
    assert lm_eval_run.cells(subject_for(tiny_model("ham"), [], None)) == []


def test_a_real_set_that_was_not_fetched_is_said_before_anything_runs(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAM_CACHE", str(tmp_path))
    with pytest.raises(MissingDataError, match="run `ham fetch-evals`"):
        lm_eval_run.cells(subject_for(tiny_model("ham"), ["piqa"], 3))


def test_offline_variables_are_set_before_data_sets_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "so that the test's end puts the earlier value back")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HAM_CACHE", "/somewhere")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "x")
    lm_eval_load.prepare_environment(["piqa"])
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert os.environ["HF_DATASETS_CACHE"] == "/somewhere/datasets"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    lm_eval_load.prepare_environment(["piqa", "hub:wikitext"])
    assert "HF_HUB_OFFLINE" not in os.environ, "a task of the hub needs the network"


def test_the_untrained_twin_is_what_training_started_from(tiny_model) -> None:
    model = tiny_model("ham")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    state = torch.random.get_rng_state()
    twin, again, other = (untrained_twin(model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state), "other random numbers are not moved"
    torch.manual_seed(3)
    started = type(model)(model.config)
    for name, parameter in started.named_parameters():
        assert torch.equal(dict(twin.named_parameters())[name], parameter)
        assert torch.equal(dict(again.named_parameters())[name], parameter)
    weights = [one.embedding.weight for one in (twin, other, model)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_untrained_twin_knows_the_words_it_was_told(tiny_model) -> None:
    plain = tiny_model("ham").config
    model = DecoderLM(dataclasses.replace(plain, options={"score": "lexical"}))
    model.set_unigram_counts(torch.arange(plain.vocabulary_size))
    tables = [
        [module.surprise_V for module in one.modules() if isinstance(module, UnigramSurprise)]
        for one in (model, untrained_twin(model, 0))
    ]
    assert tables[0] and all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    assert not tables[0][0].isnan().any()


def own_task(folder: Path, metric: str) -> str:
    """A task file of two yes-no questions beside its data."""
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"q": q, "gold": g}) + "\n" for q, g in (("a", 0), ("b", 1)))
    )
    path = folder / f"own-{metric}.yaml"
    path.write_text(
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: gold\ndoc_to_choice: [' yes', ' no']\n"
        f"metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]\n"
    )
    return str(path)


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    lm = HamLM(UniformModel(context=512), tokenizer=ByteText())
    results, tasks = evaluate_tasks(lm, [own_task(tmp_path, "acc")], limit=None)
    assert results["results"]["own-acc"]["acc,none"] == 0.5, "the shorter option is no"
    (chance,) = reference_rows(tasks["own-acc"], UNIFORM, uniform(lm, "own-acc"), {})
    assert chance["metric"] == "chance_accuracy" and chance["value"] == 0.5


def test_an_unknown_metric_is_said_before_anything_runs(tiny_model, tmp_path: Path) -> None:
    subject = subject_for(tiny_model("ham"), [own_task(tmp_path, "acuracy")], None)
    with pytest.raises(ConfigError, match=r"unknown metric 'acuracy'; known: acc, acc_all"):
        lm_eval_run.cells(subject)


def test_task_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("output_type: multiple_choice\ntest_split: test\n")
    with pytest.raises(ConfigError, match=r"broken.yaml does not load"):
        lm_eval_load.load_tasks([str(tmp_path / "broken.yaml")])


def test_hub_tasks_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their task files are found; without a network their data are said to be missing."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few_tasks(lm_eval.tasks.TaskManager))
    with pytest.raises(MissingDataError, match=r"hub:wikitext needs data of the Hugging Face hub"):
        lm_eval_load.load_tasks(["hub:wikitext"])
    with pytest.raises(ConfigError, match=r"no task 'wikitxt' .* similar: wikitext"):
        lm_eval_load.load_tasks(["hub:wikitxt"])


def few_tasks(manager: type) -> Callable[..., object]:
    """lm-eval's whole index takes 5 seconds; that of one folder a moment."""

    def make(include_path=None, include_defaults=True, metadata=None):
        folder = Path(lm_eval.tasks.__file__).parent / "wikitext"
        return manager(
            include_path=include_path or str(folder), include_defaults=False, metadata=metadata
        )

    return make


UNIFORM_ACCURACY = {
    "piqa": 0.534,
    "winogrande": 0.496,
    "arc_easy": 0.279,
    "arc_challenge": 0.171,
    "openbookqa": 0.160,
    "sciq": 0.133,
    "social_iqa": 0.320,
    "commonsense_qa": 0.196,
}
"""Published sets in full, bytes: a uniform model prefers the shortest option, and that is right
this often. Worked out independently of this code."""

needs_cache = pytest.mark.skipif(
    not evals_folder().exists(),
    reason=f"no evaluation sets in {evals_folder()}; run `ham fetch-evals`",
)


@needs_cache
@pytest.mark.parametrize("task", REAL_SETS)
def test_published_sets_run_through_lm_evals_task_files(tiny_model, task: str) -> None:
    lm = HamLM(tiny_model("gated_delta_rule"), tokenizer=ByteText())
    results, tasks = evaluate_tasks(lm, [task], limit=4)
    rows = task_rows(results["results"][task], 4, {"task": task})
    rows += reference_rows(tasks[task], UNIFORM, uniform(lm, task), {"task": task})
    assert {"accuracy", "chance_accuracy"} <= set(by_metric(rows, task))


@needs_cache
@pytest.mark.parametrize("task", UNIFORM_ACCURACY)
def test_uniform_accuracy_on_whole_published_sets(task: str) -> None:
    lm = HamLM(UniformModel(), tokenizer=ByteText())
    results, tasks = evaluate_tasks(lm, [task], limit=None)
    accuracy = results["results"][task]["acc,none"]
    assert accuracy == pytest.approx(UNIFORM_ACCURACY[task], abs=5e-4)
    (chance, *_) = reference_rows(tasks[task], UNIFORM, uniform(lm, task), {"task": task})
    assert chance["value"] == pytest.approx(accuracy)


@needs_cache
def test_boolq_labels_are_read() -> None:
    """Without the change in its task file lm-eval reports 0 accuracy and no error."""
    lm = HamLM(UniformModel(), tokenizer=ByteText())
    results, _ = evaluate_tasks(lm, ["boolq"], limit=30)
    answers = [sample["doc"]["answer"] for sample in results["samples"]["boolq"]]
    assert results["results"]["boolq"]["acc,none"] == pytest.approx(1 - np.mean(answers))
