"""Baselines outside the repository, and the commands that check and start one."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from ham.cli import main
from ham.conformance.starter import starting_file
from ham.errors import ConfigError
from ham.fingerprint import fingerprint, repository_root
from ham.model import outside
from ham.model.registry import (
    load_baseline,
    mixer_class,
    registered_mixers,
    unusable_baselines,
)
from ham.workflow import mixer_files, stage_modules

pytestmark = pytest.mark.usefixtures("own_registry")

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
QUICK = "interface,steps,bytes_held"


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one message with which the command stops, status 2."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("ham: error: ") and message.count("\n") == 1
    return message


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans = [(token.start[0], token.end[0]) for token in tokens if token.type not in LAYOUT]
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.update(range(node.lineno, node.end_lineno + 1))
    lines = {line for first, last in spans for line in range(first, last + 1)}
    return len(lines - documentation)


def test_a_new_baseline_keeps_every_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "my_mean.py"
    assert main(["baselines", "new", "my_mean", "--out", str(path)]) == 0
    assert f"ham baselines check my_mean --import {path}" in capsys.readouterr().out
    assert main(["baselines", "check", "my_mean", "--import", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rule", "verdict", "measured", "limit", "unit", "seconds"]
    assert re.fullmatch(r"my_mean on cpu: 28 kept, 0 broken, 1 not judged, [0-9.]+ s", lines[-1])
    assert mixer_class("my_mean").title == "My mean"
    assert lines_of_code(path.read_text()) < 80


def test_a_broken_rule_is_a_status_and_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "my_mean.py"
    text = starting_file("my_mean").replace("allocated=recurrent)", "allocated=recurrent + 4)")
    path.write_text(text)
    command = ["baselines", "check", "my_mean", "--import", str(path), "--rules", QUICK]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "bytes_held  FAILED   8         0      bytes" in printed
    assert "264 bytes in all declared, 256 held after 1 tokens in torch.float32" in printed
    assert "my_mean on cpu: 2 kept, 1 broken, 0 not judged, " in printed


@pytest.mark.parametrize("name", ["My", "1st", "a-b", "class", "", "../x"])
def test_names_that_no_file_can_have(name: str, capsys: pytest.CaptureFixture) -> None:
    assert f"cannot be called {name!r}" in refused(["baselines", "new", name], capsys)


def test_new_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "x.py"
    path.write_text("mine")
    new = ["baselines", "new", "my_mean", "--out", str(path)]
    assert "exists already" in refused(new, capsys)
    assert path.read_text() == "mine"
    taken = refused(["baselines", "new", "transformer"], capsys)
    assert "'transformer' is registered already, by ham.baselines.transformer" in taken


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "registers nothing"),
        (starting_file("other").replace('"other"', '"transformer"'), "registered already, by ham."),
    ],
    ids=["import error", "syntax error", "nothing", "duplicate"],
)
def test_a_bad_outside_file_is_one_message(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "other.py"
    path.write_text(source)
    before = registered_mixers()
    command = ["baselines", "check", "transformer", "--import", str(path), "--rules", "flops"]
    assert message in refused(command, capsys)
    assert registered_mixers() == before
    assert main(["baselines", "check", "transformer", "--rules", "flops"]) == 0


def test_unknown_rule_mixer_and_source(capsys: pytest.CaptureFixture) -> None:
    check = ["baselines", "check", "transformer"]
    unknown = refused([*check, "--rules", "causality,speed"], capsys)
    assert "unknown rule 'speed'; known: autocast, batch" in unknown
    assert "unknown mixer 'rwkv'" in refused(["baselines", "check", "rwkv"], capsys)
    absent = refused([*check, "--import", "absent.py"], capsys)
    assert "absent.py' cannot be imported: there is no such file" in absent
    assert "No module named 'absent'" in refused([*check, "--import", "absent"], capsys)


def test_two_files_of_one_name_are_two_baselines(tmp_path: Path) -> None:
    for folder, name in (("a", "first"), ("b", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mixer.py").write_text(starting_file(name))
        assert load_baseline(str(tmp_path / folder / "mixer.py")) == [name]
    assert {"first", "second"} <= set(registered_mixers())
    # Read again, a file replaces what it registered before.
    assert load_baseline(str(tmp_path / "a/mixer.py")) == ["first"]
    assert load_baseline("ham.baselines.transformer") == ["transformer"]
    assert "ham" in load_baseline("ham.baselines")
    (tmp_path / "b/again.py").write_text(starting_file("third").replace('"third"', '"first"'))
    with pytest.raises(ConfigError, match=r"'first' of .* is registered already, by ham_outside_"):
        load_baseline(str(tmp_path / "b/again.py"))


def test_an_installed_baseline_is_used_by_name(install, tiny_model) -> None:
    install({"rival_mean": starting_file("my_mean")}, {"my_mean": "rival_mean"})
    assert mixer_files()["my_mean"] == "rival_mean"
    assert "rival_mean" not in sys.modules
    assert tiny_model("my_mean").config.mixer == "my_mean"
    assert stage_modules("train", "my_mean") == ["ham.cli.train", "rival_mean"]


def test_broken_installed_baselines_leave_the_others_alone(
    install, capsys: pytest.CaptureFixture
) -> None:
    sources = {
        "rival_good": starting_file("good"),
        "rival_bad": "raise RuntimeError('no GPU')",
        "rival_thief": starting_file("thief").replace('"thief"', '"transformer"'),
    }
    points = {"good": "rival_good", "bad": "rival_bad", "transformer": "rival_thief"}
    install(sources, {**points, "absent": "rival_good"})
    assert "good" in registered_mixers() and "bad" not in registered_mixers()
    assert mixer_class("transformer").__module__ == "ham.baselines.transformer"
    assert mixer_files()["transformer"] == "ham.baselines.transformer"
    assert set(unusable_baselines()) == {"bad", "transformer", "absent"}
    assert main(["baselines", "check", "--all", "--rules", "flops"]) == 1
    printed = capsys.readouterr().out
    assert "\ntransformer on cpu: 1 kept, 0 broken" in printed
    assert "\nbad on cpu: cannot be used\n" in printed
    verdicts = next(line for line in printed.splitlines() if line.startswith("verdict")).split()
    assert verdicts.count("FAILED") == 3 and verdicts.count("passed") == len(registered_mixers())
    message = refused(["baselines", "check", "bad"], capsys)
    assert "mixer 'bad' cannot be used: baseline 'rival_bad' cannot be imported" in message
    assert main(["baselines", "list"]) == 0
    listed = capsys.readouterr()
    assert "\ngood " in listed.out
    assert "bad cannot be used: baseline 'rival_bad' cannot be imported: RuntimeError: no GPU" in (
        listed.err
    )
    assert "absent cannot be used: module 'rival_good' does not register 'absent'" in listed.err


def test_an_outside_module_counts_in_a_fingerprint(install, tmp_path: Path) -> None:
    install({"rival_mean": starting_file("my_mean")}, {"my_mean": "rival_mean"})
    before = fingerprint("ham.model.states", "rival_mean")
    assert before != fingerprint("ham.model.states")
    path = tmp_path / "rival_mean.py"
    path.write_text(f"# a comment\n{path.read_text()}")
    assert fingerprint("ham.model.states", "rival_mean") == before
    path.write_text(path.read_text().replace("8.0", "9.0"))
    assert fingerprint("ham.model.states", "rival_mean") != before
    with pytest.raises(ModuleNotFoundError, match="no module rival_gone"):
        fingerprint("rival_gone.mixer")


def test_the_readme_walks_through_the_starting_file() -> None:
    """The tests above run what `new` writes; these are its pieces, in order."""
    text = (repository_root() / "baselines/README.md").read_text()
    section = text.partition("## A complete example\n")[2].partition("\n## ")[0]
    pieces = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    source = starting_file("my_mixer")
    assert len(pieces) == 4 and lines_of_code(source) < 80
    words = [line for piece in pieces for line in piece.splitlines() if line]
    assert words == [line for line in source.splitlines() if line]


def test_the_readme_names_every_command() -> None:
    text = (repository_root() / "baselines/README.md").read_text()
    for command in ("list", "rules", "check", "new"):
        assert f"ham baselines {command}" in text
    assert f'[project.entry-points."{outside.GROUP}"]' in text


def test_a_name_that_two_packages_announce(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install({"rival_a": starting_file("mean"), "rival_b": ""}, {"mean": "rival_a"})
    twice = {"mean": ["rival_a", "rival_b"]}
    monkeypatch.setattr(outside, "announcements", lambda: twice)
    fault = "mixer 'mean' cannot be used: it is announced more than once, by rival_a and rival_b"
    with pytest.raises(ConfigError, match=fault):
        mixer_class("mean")
    assert "transformer" in registered_mixers()
    # The workflow goes on: the jobs of such an arm say what is wrong with it.
    assert mixer_files()["mean"] == "rival_a"


def test_a_name_of_this_project_stays_with_it(install) -> None:
    points = {"mean": "rival_mean", "transformer": "rival_mean"}
    install({"rival_mean": starting_file("mean")}, points)
    assert unusable_baselines() == {
        "transformer": "'rival_mean' announces a name that is registered already, by "
        "ham.baselines.transformer.Transformer"
    }
    assert mixer_class("transformer").__module__ == "ham.baselines.transformer"


def test_one_command_for_all_that_sources_register(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every source is named; one that cannot be imported, and one that raises, fail alone."""
    sources = {
        "good": starting_file("good"),
        "bad": "import nothing_of_this_name",
        "raises": starting_file("raises").replace("self.out(mean_BTD", "1 / 0 * (mean_BTD"),
    }
    command = ["baselines", "check", "--rules", QUICK]
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
        command += ["--import", str(tmp_path / f"{name}.py")]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "good on cpu: 3 kept, 0 broken" in printed
    assert "raised ZeroDivisionError: division by zero" in printed
    assert "bad.py cannot be used: baseline" in printed
    assert "No module named 'nothing_of_this_name'" in printed


def test_what_to_check_must_be_said(capsys: pytest.CaptureFixture) -> None:
    check = ["baselines", "check"]
    assert "name a baseline, or give --all or --import" in refused(check, capsys)
    both = refused([*check, "transformer", "--all"], capsys)
    assert "give names or --all, not both; received transformer" in both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("def decode_flops", "def cost"), "My lacks decode_flops"),
        (
            lambda text: text.replace("    title:", "    routes: ClassVar = True\n    title:"),
            "My.routes is true, but it has no `controller`",
        ),
        (
            lambda text: text.replace(
                "    title:", '    operations: ClassVar = ("softmax",)\n    title:'
            ),
            "My.operations names softmax; known: .*gated_delta_rule",
        ),
    ],
    ids=["no cost method", "routes nothing", "unknown operation"],
)
def test_what_a_class_lacks_is_said_before_anything_is_built(
    change, message: str, tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "my.py"
    path.write_text(change(starting_file("my")))
    assert load_baseline(str(path)) == ["my"]
    with pytest.raises(ConfigError, match=f"mixer 'my' cannot be used: {message}"):
        tiny_model("my")
    assert main(["baselines", "check", "my", "transformer", "--rules", "interface,flops"]) == 1
    printed = capsys.readouterr().out
    assert re.search(message, printed) and "transformer on cpu: 2 kept, 0 broken" in printed
