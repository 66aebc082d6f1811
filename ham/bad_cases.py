"""What commands say of broken checkpoints, full caches, long prompts and NaN: run, written down.

`python -m ham.bad_cases docs/bad-cases.md` makes every case on a tiny untrained model, runs the
command, and writes its exit status and the error that it printed; a test compares.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = "checkpoint"
PROMPTS = "prompts.txt"
LONG_PROMPT = 1020


@dataclass(frozen=True)
class BadCase:
    """One thing that goes wrong.

    Attributes:
        title: What it is.
        cause: How it is brought about here, a sentence.
        prepare: Breaks the folder `checkpoint`, which holds a whole model, in the working folder.
        commands: Arguments of `ham`, a list for each command.
    """

    title: str
    cause: str
    prepare: Callable[[Path], None]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What one command did.

    Attributes:
        command: As typed.
        status: Its exit status.
        printed: Standard output, without white space at the end.
        error: Standard error, likewise.
    """

    command: str
    status: int
    printed: str
    error: str


GENERATE = f"generate {FOLDER} --prompt 'Call me' --tokens 4 --device cpu"
GENERATE_MANY = f"generate {FOLDER} --prompts-file {PROMPTS} --tokens 4 --device cpu"
INSPECT = f"inspect {FOLDER} --text {PROMPTS} --device cpu"


def bad_cases() -> list[BadCase]:
    """All of them, in the order of the page."""
    return [
        BadCase("Truncated weights", "The last half of the file is gone.", _truncate, (GENERATE,)),
        BadCase("A flipped bit in the weights", "One bit is changed.", _flip, (GENERATE, INSPECT)),
        BadCase("Weights missing", "`model.safetensors` is deleted.", _lose_weights, (GENERATE,)),
        BadCase(
            "A description that is not JSON",
            "`model.json` ends too early, as after a full disk.",
            _cut_description,
            (GENERATE,),
        ),
        BadCase("No model in the folder", "The folder is empty.", _empty, (GENERATE,)),
        BadCase(
            "Pickles",
            "A Hugging Face folder has `pytorch_model.bin` and no safetensors. The file is not "
            "opened.",
            _pickle,
            (GENERATE,),
        ),
        BadCase(
            "Cache pool full",
            f"Three prompts of {LONG_PROMPT} tokens, all of which are kept, in a cache of 1 MiB.",
            _keep,
            (f"{GENERATE_MANY} --cache-mib 1",),
        ),
        BadCase(
            "A prompt longer than the position range",
            f"The model reads 1,024 tokens, the prompts have {LONG_PROMPT}.",
            _keep,
            (f"generate {FOLDER} --prompts-file {PROMPTS} --tokens 9 --device cpu",),
        ),
        BadCase(
            "NaN in scores",
            "One weight that makes keys is NaN; checksum and description fit.",
            _break_key,
            (GENERATE, INSPECT, f"{INSPECT} --agreement"),
        ),
    ]


def run_case(case: BadCase) -> list[Outcome]:
    """Make the case in a temporary folder and run its commands there."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        folder = Path(FOLDER)
        _save_model(folder)
        Path(PROMPTS).write_text("\n".join(["a" * LONG_PROMPT] * 3), encoding="utf-8")
        case.prepare(folder)
        return [_run(command) for command in case.commands]


def page() -> str:
    """The page, Markdown."""
    return _HEAD + "".join(_section(case, run_case(case)) for case in bad_cases())


def _run(command: str) -> Outcome:
    from ham.cli import main

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(shlex.split(command))
    return Outcome(f"ham {command}", status, out.getvalue().rstrip(), error.getvalue().rstrip())


def _section(case: BadCase, outcomes: list[Outcome]) -> str:
    lines = [f"## {case.title}", "", case.cause, "", "```console"]
    for outcome in outcomes:
        told = [text for text in (outcome.printed, outcome.error) if text]
        lines += [f"$ {outcome.command}", *told, "$ echo $?", str(outcome.status)]
    return "\n".join([*lines, "```", "", ""])


def _save_model(folder: Path, broken: bool = False) -> None:
    import torch

    from ham.conformance import small_model
    from ham.model.checkpoint import save_model

    model = small_model("ham", target=1.0)
    if broken:
        with torch.no_grad():
            # The first of the 32 rows that make keys.
            model.blocks[1].mixer.qkv.weight[32, 0] = math.nan
    save_model(folder, model)


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _truncate(folder: Path) -> None:
    path = _weights(folder)
    os.truncate(path, path.stat().st_size // 2)


def _flip(folder: Path) -> None:
    content = bytearray(_weights(folder).read_bytes())
    content[-1] ^= 1
    _weights(folder).write_bytes(content)


def _lose_weights(folder: Path) -> None:
    _weights(folder).unlink()


def _cut_description(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _pickle(folder: Path) -> None:
    _empty(folder)
    (folder / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def _keep(folder: Path) -> None:
    """The folder is as it should be."""


def _break_key(folder: Path) -> None:
    shutil.rmtree(folder)
    _save_model(folder, broken=True)


_HEAD = """# Bad cases

What commands print, and the status they end with, when something is wrong. Written by
`python -m ham.bad_cases docs/bad-cases.md` from runs on a tiny untrained HAM that keeps every
token; a test compares. Errors go to standard error; status 2 is a mistake that the user can fix.

"""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
