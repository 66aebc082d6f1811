"""Pieces of an experiment: packed, carried on, put together, refused where they disagree."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
import yaml

from ham.batch.keys import key_path
from ham.batch.tasks import Task, Tasks
from ham.claims.evidence import read_evidence
from ham.cli import main
from ham.config_files import load_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import write_json, write_text
from ham.fingerprint import repository_root
from ham.pieces.archive import piece_of_run, read_piece, unpack, write_piece
from ham.pieces.merge import unite
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.rows import Row, read_rows, write_rows
from ham.report.samples import PUBLISHED_SAMPLES, read_samples
from ham.report.verify import verify_published

VALUES = {
    "name": "tiny",
    "scale": "full",
    "device": "cpu",
    "seeds": [0, 1],
    "arms": [{"name": "a", "mixer": "transformer"}],
    "measure": None,
}


class Machine:
    """A checkout on which some jobs of the experiment were done, without running any."""

    def __init__(self, root: Path, **changes: object):
        self.root = root
        self.run = root / "results/runs/tiny"
        write_text(self.run / "config.yaml", yaml.safe_dump({**VALUES, **changes}))
        self.config = load_config(self.run / "config.yaml")
        write_text(self.run / "config.yaml", yaml.safe_dump(self.config.model_dump(mode="json")))
        self.tasks = Tasks(self.config, "results/runs/tiny/config.yaml")

    def does(self, *tasks: Task, value: float = 2.0, code: str = "c0de") -> Machine:
        for task in tasks:
            rows = self.root / self.tasks.result(task)
            manifest = collect_manifest(self.config.model_dump(mode="json"), ["ham"], [task.seed])
            row = Row(
                experiment="train" if task.stage == "train" else "language_modelling",
                metric="loss_nats" if task.stage == "train" else "bits_per_byte",
                value=value,
                x_name="step" if task.stage == "train" else "context",
                x_value=512,
                model=task.arm,
                mixer="transformer",
                parameters=1000,
                seed=task.seed,
                device="CPU",
                config_hash="cf9",
                code_fingerprint=code,
                manifest_id=manifest["manifest_id"],
            )
            write_rows(rows, [row])
            write_manifest(manifest_path(rows), manifest)
            write_json(key_path(rows), {"job": task.name})
            if task.stage == "train":
                checkpoint = self.root / self.tasks.checkpoint(task)
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / "weights").write_bytes(os.urandom(3000))
        return self

    def studies(self, *seeds: int, value: float = 0.5, steps: int = 6) -> Machine:
        """Some seeds of the first arm of a study; the second arm is never run."""
        write_text(self.root / "study.yaml", yaml.safe_dump(STUDY))
        manifest = collect_manifest({**STUDY, "train": {"steps": steps}}, ["ham"], [0])
        for seed in seeds:
            rows = self.run / f"studies/small/blank-d32/ham-cosine-blank-d32-s{seed}.rows.jsonl"
            row = Row(
                experiment="mqar",
                metric="accuracy",
                value=value,
                task="16/2",
                x_name="pairs",
                x_value=2,
                labels={
                    **{"filler": "blank", "layout": "prefix", "variant": "plain"},
                    **{"width": 32, "learning_rate": 0.01, "training_context": 16},
                },
                model="ham-cosine",
                mixer="ham",
                seed=seed,
                device="CPU",
                code_fingerprint="c0de",
                manifest_id=manifest["manifest_id"],
            )
            write_rows(rows, [row])
            write_manifest(manifest_path(rows), manifest)
        return self


STUDY = {
    "name": "small",
    "seeds": [0, 1],
    "learning_rates": [0.01],
    "tasks": [{"filler": "blank"}],
    "widths": [32],
    "arms": [{"name": name, "mixer": "ham"} for name in ("ham-cosine", "ham-random")],
    "train": {"mixture": [{"length": 16, "pairs": 2}]},
    "evaluate": {"sizes": [{"length": 16, "pairs": 2}]},
}


def with_study(root: Path) -> Machine:
    return Machine(root, workflow={"studies": [str(root.parent / "one/study.yaml")]})


TRAIN = [Task("train", "a", seed) for seed in (0, 1)]
EVALUATE = [Task("evaluate", "a", seed) for seed in (0, 1)]


def test_a_piece_comes_back_as_it_was_packed(tmp_path: Path):
    machine = Machine(tmp_path).does(TRAIN[0])
    piece = piece_of_run(machine.run)
    (path,) = write_piece(piece, tmp_path / "piece.tar.xz")
    again = read_piece(path)
    assert again.files == piece.files
    assert again.config_hash == piece.config_hash
    assert not [name for name in piece.files if "checkpoint" in name]
    # The same jobs make the same bytes.
    (other,) = write_piece(piece_of_run(machine.run), tmp_path / "other.tar.xz")
    assert other.read_bytes() == path.read_bytes()


def test_needed_checkpoints_are_those_that_an_unfinished_job_reads(tmp_path: Path):
    machine = Machine(tmp_path).does(*TRAIN, EVALUATE[0])
    taken = [name for name in piece_of_run(machine.run, "needed").files if "weights" in name]
    assert taken == ["results/runs/tiny/models/a/seed1/checkpoint/weights"]
    assert len([n for n in piece_of_run(machine.run, "all").files if "weights" in n]) == 2


def test_parts_are_put_together_and_a_lost_one_is_missed(tmp_path: Path):
    piece = piece_of_run(Machine(tmp_path).does(*TRAIN).run, "all")
    parts = write_piece(piece, tmp_path / "piece.tar.xz", part_mebibytes=0.004)
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 0.004 * (1 << 20) + 1
    assert read_piece(parts[0]).files == piece.files
    parts[1].unlink()
    with pytest.raises((MissingDataError, CorruptFileError)):
        read_piece(parts[0])


def test_damaged_pieces_are_refused(tmp_path: Path):
    (path,) = write_piece(piece_of_run(Machine(tmp_path).does(*TRAIN).run), tmp_path / "p.tar.xz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match="no piece of `ham pack`, or damaged"):
        read_piece(path)
    with pytest.raises(MissingDataError, match="does not exist"):
        read_piece(tmp_path / "nothing")


def test_the_next_machine_gets_the_files_and_never_loses_its_own(tmp_path: Path):
    piece = piece_of_run(Machine(tmp_path / "one").does(TRAIN[0]).run)
    new = unpack([piece], tmp_path / "two")
    assert sorted(new) == sorted(piece.files)
    assert unpack([piece], tmp_path / "two") == []
    other = piece_of_run(Machine(tmp_path / "three").does(TRAIN[0], value=3.0).run)
    with pytest.raises(ConfigError, match="exists and is not the one of"):
        unpack([other], tmp_path / "two")


def test_the_union_says_what_is_missing(tmp_path: Path):
    one = piece_of_run(Machine(tmp_path / "one").does(TRAIN[0], EVALUATE[0]).run)
    two = piece_of_run(Machine(tmp_path / "two").does(TRAIN[1]).run)
    union = unite([one, two])
    assert [task.name for task in union.missing] == ["evaluate a seed 1"]
    assert len(union.present) == 3


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        ({"train": {"steps": 7}}, {}, r"they differ in 1 keys: train.steps: 100 and 7"),
        ({}, {"code": "0ther"}, r"different code_fingerprints: c0de in .*one.*, 0ther in .*two"),
    ],
)
def test_pieces_that_disagree_are_refused(
    tmp_path: Path, changes: dict, values: dict, message: str
):
    one = piece_of_run(Machine(tmp_path / "one").does(TRAIN[0]).run)
    two = piece_of_run(Machine(tmp_path / "two", **changes).does(TRAIN[1], **values).run)
    with pytest.raises(ConfigError, match=message):
        unite([one, two])


def test_how_jobs_share_processes_is_no_disagreement(tmp_path: Path):
    one = piece_of_run(Machine(tmp_path / "one").does(TRAIN[0]).run)
    other = Machine(tmp_path / "two", workflow={"jobs_per_process": 3}).does(TRAIN[1])
    assert len(unite([one, piece_of_run(other.run)]).present) == 2


def test_a_job_done_twice_with_different_numbers_is_refused(tmp_path: Path):
    one = piece_of_run(Machine(tmp_path / "one").does(TRAIN[0]).run)
    assert len(unite([one, one]).present) == 1
    two = piece_of_run(Machine(tmp_path / "two").does(TRAIN[0], value=2.5).run)
    message = r"train a seed 0 is in two pieces with different results: loss_nats .*2\.0.*2\.5"
    with pytest.raises(ConfigError, match=message):
        unite([one, two])


def test_merging_publishes_a_report_that_lists_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    machine = Machine(tmp_path).does(*TRAIN, EVALUATE[0])
    out = tmp_path / "results/published/2026-01-01-cpu"
    assert main(["merge", str(machine.run), "--out", str(out), "--check"]) == 0
    assert not out.exists()
    assert main(["merge", str(machine.run), "--out", str(out)]) == 0
    assert "missing: evaluate a seed 1" in capsys.readouterr().err
    found = verify_published("2026-01-01-cpu", tmp_path)
    assert (found.faults, found.rows) == ([], 3)
    summary = (tmp_path / "reports/published/2026-01-01-cpu/summary.md").read_text()
    assert "1 jobs have no rows: evaluate a seed 1" in summary
    assert main(["merge", str(machine.run), "--out", str(out)]) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_runs_of_a_study_travel_with_the_jobs_and_those_missing_are_named(tmp_path: Path):
    one = with_study(tmp_path / "one").does(TRAIN[0]).studies(0)
    (path,) = write_piece(piece_of_run(one.run), tmp_path / "p.tar.xz")
    two = tmp_path / "two"
    assert len(unpack([read_piece(path)], two)) == 6
    two = with_study(two).studies(1)
    union = unite([piece_of_run(one.run), piece_of_run(two.run)])
    assert len([name for name in union.studies if name.endswith(".rows.jsonl")]) == 2
    assert union.missing_runs == [f"study small: ham-random-blank-d32-s{seed}" for seed in (0, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"value": 0.25},
            r"s0.rows.jsonl is in two pieces with different results: .*0.25",
        ),
        ({"steps": 7}, r"studies/small/blank-d32 was made under different configs"),
    ],
)
def test_studies_that_disagree_are_refused(tmp_path: Path, changes: dict, message: str):
    one = piece_of_run(with_study(tmp_path / "one").studies(0).run)
    two = piece_of_run(with_study(tmp_path / "two").studies(0, **changes).run)
    with pytest.raises(ConfigError, match=message):
        unite([one, two])


def test_a_published_union_has_its_study_and_the_speeds_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    machine = with_study(tmp_path / "one").does(TRAIN[0], EVALUATE[0]).studies(0, 1)
    out = tmp_path / "results/published/2026-01-02-cpu"
    speeds = repository_root() / "results/published/2026-11-25-h100-decode"
    assert main(["merge", str(machine.run), "--out", str(out), "--evidence", str(speeds)]) == 0
    assert "2 runs of studies are there" in capsys.readouterr().out
    found = verify_published("2026-01-02-cpu", tmp_path)
    assert (found.faults, found.rows) == ([], 4)
    report = tmp_path / "reports/published/2026-01-02-cpu"
    summary = (report / "summary.md").read_text()
    assert "study ham-random, blank filler, d 32, seed 1: no rows" in summary
    assert "| C6-decoding | whole model, from 4,096 tokens | supported |" in summary
    assert "Multi-query associative recall" in (report / "index.html").read_text()
    assert "Arms: 1, settings: 1, seeds: 2, on CPU, at commit" in summary
    assert "50.0 %" in (report / "tables/mqar.md").read_text()
    # The models of the study are no models of the run.
    assert "ham-cosine" not in (report / "tables/comparison.md").read_text()
    runs = {Path(one.run).name for one in read_evidence([out])}
    assert runs == {"2026-01-02-cpu", "2026-11-25-h100-decode"}


def test_evidence_must_be_published(tmp_path: Path, capsys: pytest.CaptureFixture):
    machine = Machine(tmp_path).does(*TRAIN)
    out = tmp_path / "results/published/2026-01-03-cpu"
    assert main(["merge", str(machine.run), "--out", str(out), "--evidence", str(tmp_path)]) == 2
    assert "has no SHA256SUMS" in capsys.readouterr().err
    assert not out.exists()


WITH_HAM = {"arms": [{"name": "a", "mixer": "transformer"}, {"name": "h", "mixer": "ham"}]}
PAGE = "reports/tiny/inspect/h-seed0.html"


def inspected(root: Path, text: str = "<p>kept</p>") -> Machine:
    machine = Machine(root, **WITH_HAM).does(*TRAIN)
    assert machine.tasks.result(Task("inspect", "h", 0)) == PAGE
    write_text(root / PAGE, text)
    # What a job leaves beside the page: rows, manifest.
    manifest = collect_manifest(machine.config.model_dump(mode="json"), ["ham", "inspect"], [0])
    labels = {"form": "steps", "against": "parallel", "precision": "float32", "layer": 0}
    common = {"model": "h", "mixer": "ham", "seed": 0, "device": "CPU"}
    row = Row(
        experiment="agreement",
        metric="flips",
        value=3,
        n=41,
        labels=labels,
        manifest_id=manifest["manifest_id"],
        **common,
    )
    write_rows(root / PAGE.replace(".html", ".rows.jsonl"), [row])
    write_manifest(root / PAGE.replace(".html", ".manifest.json"), manifest)
    return machine


def test_the_page_of_kept_tokens_is_published_and_linked(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_piece(piece_of_run(inspected(tmp_path / "one").run), tmp_path / "piece.tar.xz")
    out = tmp_path / "results/published/2026-01-01-cpu"
    assert main(["merge", str(tmp_path / "piece.tar.xz"), "--out", str(out)]) == 0
    assert "missing: reports/" not in capsys.readouterr().err
    assert (out / "inspect/h-seed0.html").read_text() == "<p>kept</p>"
    assert "inspect/h-seed0.html" in (out / "SHA256SUMS").read_text()
    report = tmp_path / "reports/published/2026-01-01-cpu"
    assert (report / "inspect/h-seed0.html").read_text() == "<p>kept</p>"
    for name in ("index.html", "summary.md"):
        assert "inspect/h-seed0.html" in (report / name).read_text()
    assert sorted(path.name for path in (out / "inspect").iterdir()) == [
        "h-seed0.html",
        "h-seed0.manifest.json",
        "h-seed0.rows.jsonl",
    ]
    assert [path.name for path in (report / "inspect").iterdir()] == ["h-seed0.html"]
    # Its rows have a table: 41 decisions of which 3 differ.
    (line,) = csv.DictReader(io.StringIO((report / "tables/agreement.csv").read_text()))
    assert (line["model"], line["decisions"], line["flips"]) == ("h", "41", "3.0")
    assert verify_published("2026-01-01-cpu", tmp_path).faults == []
    (out / "inspect/h-seed0.html").write_text("<p>other</p>")
    faults = verify_published("2026-01-01-cpu", tmp_path).faults
    assert any("inspect/h-seed0.html was changed" in fault for fault in faults)
    assert any("inspect/h-seed0.html: line 1" in fault for fault in faults)


def test_a_page_that_no_piece_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    machine = Machine(tmp_path, **WITH_HAM).does(*TRAIN)
    out = tmp_path / "results/published/2026-01-01-cpu"
    assert main(["merge", str(machine.run), "--out", str(out), "--check"]) == 0
    assert f"missing: {PAGE}" in capsys.readouterr().err


def test_two_pages_of_one_model_are_refused(tmp_path: Path):
    one = piece_of_run(inspected(tmp_path / "one").run)
    two = piece_of_run(inspected(tmp_path / "two", "<p>other</p>").run)
    assert len(unite([one, one]).pages) == 3
    with pytest.raises(ConfigError, match=r"h-seed0.html is another one in .*one.* than in .*two"):
        unite([one, two])


def answered(root: Path, *seeds: int, right: int = 1) -> Machine:
    """A machine whose evaluations left samples: one question each, with its text."""
    machine = Machine(root).does(*TRAIN)
    for seed in seeds:
        task = Task("evaluate", "a", seed)
        machine.does(task)
        record = {"task": "piqa", "doc_id": 0, "doc": "licensed", "resps": [[-1.5]], "acc": right}
        rows = machine.tasks.result(task)
        write_text(root / rows.replace(".rows.", ".samples."), json.dumps(record) + "\n")
        (row,) = read_rows(root / rows)
        accuracy = row.model_copy(
            update={"experiment": "lm_eval", "metric": "accuracy", "task": "piqa", "value": 1.0}
        )
        write_rows(root / rows, [row, accuracy])
    return machine


def test_answers_travel_and_are_published(tmp_path: Path):
    for name, seed in (("one", 0), ("two", 1)):
        piece = piece_of_run(answered(tmp_path / name, seed).run)
        write_piece(piece, tmp_path / f"{name}.tar.xz")
        assert b"licensed" not in b"".join(piece.files.values())
    # A machine that goes on sends them once more.
    unpack([read_piece(tmp_path / "two.tar.xz")], tmp_path / "three")
    again = piece_of_run(tmp_path / "three/results/runs/tiny")
    assert again.files == read_piece(tmp_path / "two.tar.xz").files
    out = tmp_path / "results/published/2026-01-01-cpu"
    pieces = [str(tmp_path / f"{name}.tar.xz") for name in ("one", "two")]
    assert main(["merge", *pieces, "--out", str(out)]) == 0
    found = [
        (record["model"], record["seed"], record["task"], record["acc"])
        for record in read_samples(out / PUBLISHED_SAMPLES)
    ]
    assert found == [("a", 0, "piqa", 1), ("a", 1, "piqa", 1)]
    assert f"  {PUBLISHED_SAMPLES}\n" in (out / "SHA256SUMS").read_text()
    assert verify_published("2026-01-01-cpu", tmp_path).faults == []
    (out / PUBLISHED_SAMPLES).write_bytes(b"")
    faults = verify_published("2026-01-01-cpu", tmp_path).faults
    assert f"{PUBLISHED_SAMPLES} was changed: its SHA-256 is not the recorded one" in faults
    without = tmp_path / "results/published/2026-01-02-cpu"
    assert main(["merge", *pieces, "--out", str(without), "--no-samples"]) == 0
    assert not (without / PUBLISHED_SAMPLES).exists()


def test_samples_that_contradict_their_rows_are_found(tmp_path: Path):
    write_piece(piece_of_run(answered(tmp_path / "one", 0, right=0).run), tmp_path / "one.tar.xz")
    out = tmp_path / "results/published/2026-01-01-cpu"
    assert main(["merge", str(tmp_path / "one.tar.xz"), "--out", str(out)]) == 0
    assert verify_published("2026-01-01-cpu", tmp_path).faults == [
        "a, seed 0, piqa: accuracy is 1 of 1, its samples give 0 of 1"
    ]


def test_answers_of_one_job_must_agree(tmp_path: Path):
    one, two = (
        piece_of_run(answered(tmp_path / name, 0, right=right).run)
        for name, right in (("one", 0), ("two", 1))
    )
    # Only the answers differ.
    two.files = {path: one.files[path] for path in one.files} | {
        path: content for path, content in two.files.items() if "answers" in path
    }
    with pytest.raises(ConfigError, match=r"evaluate\.answers\.jsonl is another one in"):
        unite([one, two])
