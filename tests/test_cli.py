from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import ham.cli
from ham.cli import COMMANDS, main
from ham.errors import ConfigError
from ham.fingerprint import repository_root

DEMO = repository_root() / "workflow/config/demo.yaml"
H100 = repository_root() / "workflow/config/h100.yaml"


def run_ham(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ham", *arguments], capture_output=True, text=True, cwd=folder
    )


def test_help_lists_every_command_within_a_second(tmp_path: Path):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run_ham("--help", folder=tmp_path)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1:
            break
    assert done.returncode == 0
    assert min(seconds) < 1
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")}
    assert {name.replace("_", "-") for name in COMMANDS} <= listed


def test_every_module_is_a_command():
    modules = {path.stem for path in (repository_root() / "ham/cli").glob("[a-z]*.py")}
    assert modules == set(COMMANDS)


def test_building_the_parser_loads_nothing_heavy():
    code = (
        "import sys, ham.cli; ham.cli.build_parser();"
        "print([m for m in ('torch', 'numpy', 'pandas', 'matplotlib', 'lm_eval', 'triton')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_is_quick():
    code = (
        "import time, torch; t = time.process_time(); import ham, ham.config_files;"
        "print(time.process_time() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def overlay(tmp_path: Path, **changes: object) -> Path:
    """The demo configuration with some top-level keys replaced."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(DEMO.read_text()), **changes}))
    return path


def arm(mixer: str, **options: object) -> list[dict]:
    return [{"name": "x", "mixer": mixer, "options": options}]


BAD_INPUT = {
    "unknown key": ({"trian": {}}, "trian: unknown key; known: arms, data, device"),
    "wrong type": ({"train": {"steps": "many"}}, "train.steps: Input should be a valid integer"),
    "unknown mixer": (
        {"arms": arm("rwkv")},
        "unknown mixer 'rwkv'; known: gated_delta_rule, gated_delta_rule_window, ham",
    ),
    "unknown task": (
        {"evaluate": {"lm_eval": {"tasks": ["hellaswog"]}}},
        "unknown lm-eval task 'hellaswog'; known: arc_challenge",
    ),
    "target": ({"arms": arm("ham", target=1.5)}, "legal: 0..1 (received 1.5)"),
    "window": (
        {"arms": arm("sliding_window", window=4096)},
        "window 4096 is larger than the context 512; legal: 1..512",
    ),
    "option": ({"arms": arm("mamba2", sizze=1)}, "sizze: unknown key; known: conv_size, expand"),
    "context": ({"data": {"context": 9000}}, "9000 tokens, beyond model.max_positions 8192"),
}


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def train_arguments(config: Path, arm_name: str = "x") -> list[str]:
    job = ["--arm", arm_name, "--seed", "0", "--data", "data", "--out", "out"]
    return ["train", str(config), *job]


def assert_one_message(captured: str, message: str) -> None:
    assert captured.startswith("ham: error: ")
    assert captured.count("ham: error: ") == 1
    assert "Traceback" not in captured
    assert message in captured


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_bad_input_is_one_message_and_writes_nothing(
    case: str, command: str, tmp_path: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture
):
    changes, message = BAD_INPUT[case]
    config = overlay(tmp_path, **changes)
    arguments = train_arguments(config) if command == "train" else ["plan", str(config)]
    assert main(arguments) == 2
    assert_one_message(capsys.readouterr().err, message)
    assert list(in_empty_folder.iterdir()) == []


def test_unknown_arm(in_empty_folder: Path, capsys: pytest.CaptureFixture):
    assert main(train_arguments(DEMO, "rwkv")) == 2
    assert_one_message(capsys.readouterr().err, "unknown model 'rwkv'; known: gated-delta-rule")
    assert list(in_empty_folder.iterdir()) == []


def test_missing_gpu(in_empty_folder: Path, capsys: pytest.CaptureFixture):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the GPU whose absence is tested")
    assert main([*train_arguments(H100, "transformer"), "--set", "tuning=null"]) == 2
    assert_one_message(capsys.readouterr().err, "device 'cuda' was asked for, but")
    assert list(in_empty_folder.iterdir()) == []


def test_bad_override(in_empty_folder: Path, capsys: pytest.CaptureFixture):
    assert main(["config", "check", str(DEMO), "--set", "train.steps"]) == 2
    assert_one_message(capsys.readouterr().err, "--set expects key=value, received 'train.steps'")


def test_exit_status_of_the_process(tmp_path: Path):
    done = run_ham("config", "show", "absent.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert_one_message(done.stderr, "absent.yaml does not exist")


def test_unknown_command(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(("raised", "status"), [(ConfigError("x"), 2), (KeyboardInterrupt(), 130)])
def test_status_of_errors(raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch):
    def fail(arguments: object) -> int:
        raise raised

    monkeypatch.setattr("ham.cli.config._schema", fail)
    assert main(["config", "schema"]) == status


def test_a_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def fail(arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "results/big")

    monkeypatch.setattr("ham.cli.config._schema", fail)
    assert main(["config", "schema"]) == 2
    assert_one_message(capsys.readouterr().err, "no space left on the disk while writing results")


def test_a_reader_that_goes_away_is_no_defect(tmp_path: Path):
    command = f"{sys.executable} -m ham config schema | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(arguments: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("ham.cli.config._schema", fail)
    with pytest.raises(ZeroDivisionError):
        main(["config", "schema"])


def test_everything_after_lm_eval_is_passed_on():
    parsed = ham.cli._parse(ham.cli.build_parser(), ["lm-eval", "--model", "ham", "-h"])
    assert parsed.arguments == ["--model", "ham", "-h"]


def test_show_prints_what_load_reads(capsys: pytest.CaptureFixture):
    assert main(["config", "show", str(DEMO), "--set", "seeds=[5]"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seeds"] == [5]
    assert shown["name"] == "demo"
