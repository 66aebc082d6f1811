"""`ham match` as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ham.cli import main
from ham.config_files import load_config
from ham.plan import Plan

ARMS = [
    {"name": "transformer", "mixer": "transformer"},
    {"name": "window", "mixer": "sliding_window", "options": {"window": 64}},
    {"name": "ham-cosine", "mixer": "ham", "options": {"target": 0.25}},
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    values = {
        "name": "small",
        "device": "cpu",
        "data": {"context": 1024},
        "model": {"layers": 2, "width": 128, "heads": 4},
        "evaluate": {"lm_eval": None, "needle": {"lengths": [512]}},
        "arms": ARMS,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_written_configuration_loads_and_can_be_planned(file, tmp_path, capsys):
    out = tmp_path / "matched.yaml"
    assert main(["match", file, "--arms", "window", "mamba2", "--write", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "small: matched to ham-cosine, which keeps 0.25 of the tokens; 4 bytes" in printed
    config = load_config(out).check_registry()
    names = [arm.name for arm in config.arms]
    assert names[:4] == ["ham-cosine", "window", "window@512", "window@1024"]
    assert names[4:] == ["window@flops", "mamba2", "mamba2@512", "mamba2@1024", "mamba2@flops"]
    assert (config.name, config.model.match_parameters) == ("small-matched", True)
    plan = {arm.name: arm for arm in Plan(config, cores=1).arms}
    wanted = plan["ham-cosine"].parameters
    assert all(abs(arm.parameters - wanted) <= 0.01 * wanted for arm in plan.values())
    # The plan counts bytes at the training context, with 16-bit keys and values.
    sizes = [plan[name].cache_bytes for name in ("ham-cosine", "window@1024")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    [line] = [line for line in out.read_text().splitlines() if "bytes@512: wanted" in line][:1]
    assert "with window 1" in line
    assert main(["plan", str(out)]) == 0


def test_one_unmatched_budget_leaves_the_rest(file, tmp_path, capsys):
    out = tmp_path / "matched.yaml"
    command = ["match", file, "--by", "bytes", "--contexts", "8192", "1024", "--write", str(out)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    rows = {
        (cells[0], cells[1]): cells[-1]
        for cells in map(str.split, printed.splitlines())
        if len(cells) > 9
    }
    assert rows["window", "bytes@1024"] == "matched"
    assert rows["window", "bytes@8192"] == "unmatched"
    assert "window bytes@8192: window: 1025 is refused: window 1025 is larger" in printed
    names = [arm.name for arm in load_config(out).arms]
    assert names == ["ham-cosine", "transformer", "transformer@8192", "window", "window@1024"]
    assert "# Left out: window, bytes@8192: wanted" in out.read_text()


def test_what_already_matches_is_not_written_twice(file, tmp_path):
    out, again = tmp_path / "matched.yaml", tmp_path / "again.yaml"
    command = ["--by", "bytes", "--contexts", "1024", "--arm", "ham-cosine"]
    assert main(["match", file, *command, "--arms", "window", "--write", str(out)]) == 0
    assert main(["match", str(out), *command, "--write", str(again)]) == 0
    names = [arm.name for arm in load_config(again).arms]
    assert names == ["ham-cosine", "window", "window@1024"]
    assert "# window, bytes@1024: wanted" in again.read_text()


def test_the_fraction_is_written_as_the_target(file, tmp_path):
    out = tmp_path / "matched.yaml"
    main(["match", file, "--fraction", "0.5", "--arms", "window", "--write", str(out)])
    assert load_config(out).arms[0].options == {"target": 0.5}


def test_an_arm_that_cannot_be_built_is_one_unmatched_row(file, capsys):
    broken = "arms=[{name: h, mixer: ham}, {name: x, mixer: rwkv}, {name: t, mixer: transformer}]"
    assert main(["match", file, "--set", broken, "--by", "parameters"]) == 1
    printed = capsys.readouterr().out
    assert "x parameters: unknown mixer 'rwkv'; known: gated_delta_rule" in printed
    assert "1 matched, 1 unmatched" in printed


def test_every_registered_baseline(file, capsys):
    main(["match", file, "--by", "parameters", "--registered"])
    printed = capsys.readouterr().out
    for name in ("gated-delta-rule", "mamba2", "gated-delta-rule-window"):
        assert f"\n{name} " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "nobody"], "unknown model 'nobody'; known: ham-cosine"),
        (["--arms", "nobody"], "unknown arm or baseline 'nobody'; known: gated_delta_rule"),
        (["--arms", "ham-cosine"], "nothing to match to 'ham-cosine'"),
        (["--contexts", "9000"], "a context of 9000 tokens cannot be matched; legal: 1..8192"),
        (["--fraction", "1.5"], "arm 'ham-cosine' cannot be matched to: options of mixer 'ham'"),
        (["--arm", "window", "--fraction", "0.5"], "has no share of tokens to set"),
        (["--tolerance", "2"], "--tolerance 2.0 is not legal; legal: 0 to below 1"),
    ],
)
def test_bad_input_is_one_message(file, capsys, arguments, message):
    assert main(["match", file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_file_that_is_read_is_not_written(file, capsys):
    before = Path(file).read_text()
    assert main(["match", file, "--write", file]) == 2
    assert "is the file that is read; choose another" in capsys.readouterr().err
    assert Path(file).read_text() == before
