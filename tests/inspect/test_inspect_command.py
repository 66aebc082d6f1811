from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ham.cli import main
from ham.cli.report import inspection_link
from ham.errors import ConfigError, MissingDataError, NotFiniteError
from ham.inspect.evictions import trace_evictions
from ham.inspect.page import render_inspection
from ham.inspect.shares import class_shares, kept_share, table_lines
from ham.inspect.text import tokenise
from ham.inspect.trace import LayerTrace, trace_layers
from ham.inspect.views import all_layers_view, layer_view
from ham.model.checkpoint import save_model
from ham.model.mixer import MixerAux
from ham.report.rows import read_rows
from ham.report.statistics import wilson_interval
from ham.train.tokenizer import ByteTokenizer

TEXT = 'He met Ahab & "<b>" é\n\tAhab has 12 </script> whales.\n'
VOID = ("meta", "br", "input", "rect", "line")


class Outline(HTMLParser):
    """Tags with attributes; fails where elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.data: dict[str, str] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data[self.tags[-1][1].get("id", "code")] = data


def trace_of(kept: list[float], layer: int = 0, **fields: Any) -> LayerTrace:
    values = {"threshold": 0.5, "target": 0.25, **fields}
    kept_T = np.array(kept, dtype=np.float32)
    score_T = np.linspace(0, 1, len(kept), dtype=np.float32)
    return LayerTrace(layer, kept_T, score_T, **values)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Callable) -> Callable[[str], str]:
    def save(mixer: str) -> str:
        folder = tmp_path / mixer
        save_model(folder, tiny_model(mixer), facts={"seed": 3})
        return str(folder)

    return save


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_shares_by_hand():
    tokens = tokenise("as 12", ByteTokenizer(), 10)
    traces = [trace_of([1, 0, 0, 1, 1]), trace_of([0.5, 0.5, 0, 0, 0], layer=2)]
    table = {
        name: (n, [share.value for share in shares])
        for name, n, shares in class_shares(tokens.classes_T, traces)
    }
    assert table == {
        "all tokens": (5, [0.6, 0.2]),
        "function word": (2, [0.5, 0.5]),
        "space or punctuation": (1, [0.0, 0.0]),
        "number": (2, [1.0, 0.0]),
    }
    assert kept_share(traces[0]) == wilson_interval(3, 5)
    lines = table_lines(tokens.classes_T, traces)
    assert lines[0].split() == ["class", "n", "layer", "0", "layer", "2"]
    assert lines[2].startswith("number") and "100.0 % [34.2, 100.0]" in lines[2]
    assert lines[-2].split() == ["target", "25.0", "%", "25.0", "%"]


def test_views_by_hand():
    tokens = tokenise("abé", ByteTokenizer(), 10)
    first, second = trace_of([0, 1, 1, 0]), trace_of([0, 1, 0, 0], layer=1)
    view = layer_view(tokens, first)
    assert view.kept == [0, 2, 1]
    assert view.details == ["0", "0.3333", "0.6667, 1"]
    assert view.levels == [0, 3, 9]
    assert view.mark == 0.5
    both = all_layers_view(tokens, [first, second])
    assert both.kept == [0, 2, 1]
    assert both.details == ["0", "2", "1, 0"]
    assert both.levels == [0, 9, 5]


@pytest.mark.parametrize("threshold", [math.inf, -math.inf])
def test_layers_that_keep_nothing_or_everything(threshold: float):
    tokens = tokenise("a", ByteTokenizer(), 10)
    everything = threshold < 0
    trace = trace_of([float(everything)], threshold=threshold, target=float(everything))
    page = render_inspection("ham", "one token", tokens, [trace])
    outline = Outline(page)
    assert ("∞" if not everything else "−∞") in page
    values = json.loads(outline.data["data"])
    assert values["views"]["layer-0"]["kept"] == ("2" if everything else "0")


def test_the_page(checkpoint: Callable, text_file: str, tmp_path: Path, capsys: Any):
    page = tmp_path / "page.html"
    assert main(["inspect", checkpoint("ham"), "--text", text_file, "--out", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    outline = Outline(html)
    pieces = [
        attrs
        for tag, attrs in outline.tags
        if re.fullmatch(r"h\d k\d( n)?", attrs.get("class", ""))
    ]
    assert len(pieces) == len(TEXT)
    assert not any({"src", "href"} & attrs.keys() for _, attrs in outline.tags)
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert html.count("</script>") == 2
    values = json.loads(outline.data["data"])
    assert list(values["views"]) == ["layer-0", "layer-1", "all"]
    for view in values["views"].values():
        assert len(view["levels"]) == len(view["kept"]) == len(view["details"]) == len(TEXT)
    choices = [attrs["value"] for tag, attrs in outline.tags if tag == "input"]
    assert choices == list(values["views"])
    ids = {attrs["id"] for _, attrs in outline.tags if "id" in attrs}
    assert {f"view-{name}" for name in choices} <= ids
    assert str(page) in capsys.readouterr().out


def test_the_page_marks_what_the_model_routed(tiny_model: Callable):
    model, tokens = tiny_model("ham"), tokenise(TEXT, ByteTokenizer(), 100)
    traces = trace_layers(model, tokens.ids)
    with torch.no_grad():
        output = model(torch.tensor([tokens.ids]))
    for trace, aux in zip(traces, output.aux, strict=True):
        assert trace.kept_T.tolist() == aux.routed_BT[0].float().tolist()
        assert (trace.score_T >= trace.threshold).tolist() == aux.routed_BT[0].tolist()
        assert 0 < trace.fraction < 1
        assert trace.target == 0.3


def test_table_top_and_rows(checkpoint: Callable, text_file: str, tmp_path: Path, capsys: Any):
    rows_file = tmp_path / "inspect.rows.jsonl"
    command = ["inspect", checkpoint("ham"), "--text", text_file, "--layer", "1", "--top", "2"]
    assert main([*command, "--needle", "12", "--rows", str(rows_file)]) == 0
    out = capsys.readouterr().out
    assert "layer 0" not in out
    tops = out.split("highest scores of layer 1")[1].splitlines()[1:]
    assert len(tops) == 2
    assert "[H]e met" in out
    rows = {row.labels["class"]: row for row in read_rows(rows_file)}
    assert rows["needle"].n == 2
    assert rows["later name"].n == rows["first name"].n == 4
    assert rows["all tokens"].n == len(TEXT.encode())
    assert {row.seed for row in rows.values()} == {3}
    assert {row.labels["layer"] for row in rows.values()} == {1}
    assert json.loads((tmp_path / "inspect.manifest.json").read_text())["manifest_id"] in {
        row.manifest_id for row in rows.values()
    }


@pytest.mark.parametrize(
    ("mixer", "arguments", "message"),
    [
        ("transformer", [], "model 'transformer' (mixer 'transformer') routes no tokens"),
        ("ham", ["--layer", "0", "7"], "--layer 7 is not a layer that routes; legal: 0, 1"),
        ("ham", ["--max-tokens", "0"], "--max-tokens must be at least 1, received 0"),
        ("ham", ["--top", "-1"], "--top must be at least 0, received -1"),
        ("ham", ["--needle", "nowhere"], "--needle 'nowhere' does not occur"),
    ],
)
def test_mistakes(
    checkpoint: Callable, text_file: str, mixer: str, arguments: list, message: str, capsys: Any
):
    assert main(["inspect", checkpoint(mixer), "--text", text_file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_long_texts_are_cut_with_a_note(checkpoint: Callable, tmp_path: Path, capsys: Any):
    path, page = tmp_path / "long.txt", tmp_path / "page.html"
    path.write_text("whale " * 400)
    command = ["inspect", checkpoint("ham"), "--text", str(path), "--out", str(page), "--top", "0"]
    assert main(command) == 0
    note = "cut after the first 1,024 tokens of 2,400"
    assert note in capsys.readouterr().out
    assert note in page.read_text(encoding="utf-8")


def test_a_report_links_only_pages_in_its_own_folder(tmp_path: Path):
    report, page = tmp_path / "report", tmp_path / "report/inspect/ham.html"
    with pytest.raises(
        MissingDataError, match=r"ham\.html does not exist; `ham inspect` writes it"
    ):
        inspection_link(page, report)
    page.parent.mkdir(parents=True)
    page.touch()
    assert inspection_link(page, report) == "inspect/ham.html"
    with pytest.raises(ConfigError, match="--inspection must lie in the folder of --out"):
        inspection_link(page, tmp_path / "other")
    assert inspection_link(None, report) is None


def test_layers_that_do_not_route_are_left_out():
    def block(routes: bool) -> SimpleNamespace:
        controller = SimpleNamespace(threshold=torch.tensor(0.5), target=0.5)
        return SimpleNamespace(mixer=SimpleNamespace(routes=routes, controller=controller))

    def model(tokens_BT: torch.Tensor) -> SimpleNamespace:
        score_BT = torch.arange(tokens_BT.shape[1])[None] / 4
        routed = MixerAux(routed_BT=score_BT >= 0.5, score_BT=score_BT)
        return SimpleNamespace(aux=[MixerAux(), routed], logits_BTV=score_BT[..., None])

    model.check_scores = lambda: None
    model.blocks, model.device = [block(False), block(True)], torch.device("cpu")
    model.routing_layers = [1]
    (trace,) = trace_layers(model, [1, 2, 3, 4])
    assert trace.layer == 1
    assert trace.kept_T.tolist() == [0, 0, 1, 1]


def test_broken_weights_are_an_error_instead_of_a_table(
    checkpoint: Callable, tiny_model: Callable, text_file: str, capsys: Any
):
    folder = checkpoint("ham")
    model = tiny_model("ham")
    with torch.no_grad():
        model.blocks[0].mixer_norm.weight.fill_(math.nan)
    save_model(Path(folder), model, facts={"seed": 3})
    assert main(["inspect", folder, "--text", text_file, "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "scores must be finite" in printed.err
    assert "layer 0" in printed.err


def test_broken_weights_of_an_evicting_model_are_an_error(tiny_model: Callable):
    model = tiny_model("transformer_evicted")
    with torch.no_grad():
        model.blocks[0].mixer_norm.weight.fill_(math.nan)
    with pytest.raises(NotFiniteError, match="logits of"):
        trace_evictions(model, list(range(40)))
