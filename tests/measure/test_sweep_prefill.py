"""The prefill that a CUDA graph holds, launched one by one: the memory of an ordinary prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prefills import ordinary, route_a_share, what_is_left, worst
from sweeps import CPU, make_sweep

from ham.errors import ConfigError
from ham.measure.sweep.budget import predicted_bytes
from ham.measure.sweep.grid import EVICTED, FULL, MODELS, SMOKE, Cell
from ham.measure.sweep.models import ModelShelf
from ham.measure.sweep.passes import Prefill
from ham.measure.sweep.prefill_graph import GraphPrefill
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState

LIMIT = 1e-5
PREFILLED = [name for name in MODELS if name != EVICTED]
VARIANTS = [
    {"target": 0.4},
    {"target": 0.4, "window": 9},
    {"target": 0.4, "reduction": "per_head"},
    {"target": 0.4, "sink": "zero"},
    {"budget": "bounded", "slots": 12},
    {"budget": "chunk_topk", "chunk": 10, "top_k": 3},
]


def random_tokens(length: int, seed: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(257, (batch, length), generator=generator)


def check_calls(model: DecoderLM, length: int, fuse: bool = False) -> GraphPrefill:
    """Two calls of one prefill with different tokens, against ordinary prefills."""
    prefill = GraphPrefill(model, 2, length, fuse)
    for seed in (1, 2):
        tokens_BT = random_tokens(length, seed)
        prefill.tokens_BT.copy_(tokens_BT)
        tokens_B = prefill()
        expected = ordinary(model, tokens_BT)
        left = what_is_left(prefill.reading.logits_BV, prefill.reading.state)
        assert worst(left, expected) < LIMIT
        assert torch.equal(tokens_B, expected.logits_BV.argmax(-1))
    return prefill


@pytest.mark.parametrize("length", [41, 128])
@pytest.mark.parametrize("mixer", PREFILLED)
def test_it_leaves_what_a_prefill_leaves(mixer: str, length: int) -> None:
    model = ModelShelf(SMOKE, CPU, torch.float32).decoder(mixer)
    if mixer == "ham":
        route_a_share(model, random_tokens(length, 0), 0.3)
    prefill = check_calls(model, length)
    if mixer == "ham":
        counts = [layer.cache.paged.counts for layer in prefill.reading.state.layers]
        assert 0 < min(map(min, counts)) <= max(map(max, counts)) < length


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_budget_and_what_stands_beside_it(
    options: dict[str, Any], tiny_model: Callable[..., DecoderLM]
) -> None:
    model = tiny_model("ham", **options).eval()
    if "target" in options:
        route_a_share(model, random_tokens(50, 0), options["target"])
    check_calls(model, 50)


def test_decoding_goes_on_from_a_copy_of_its_memory() -> None:
    model = ModelShelf(SMOKE, CPU, torch.float32).decoder("ham")
    tokens_BT = random_tokens(60, 3)
    route_a_share(model, tokens_BT, 0.3)
    prefill = GraphPrefill(model, 2, 50)
    prefill.tokens_BT.copy_(tokens_BT[:, :50])
    prefill()
    before = what_is_left(prefill.reading.logits_BV, prefill.reading.state)
    state = DecoderState.join([prefill.reading.state])
    with torch.no_grad():
        steps = [model.step(tokens_BT[:, place], state) for place in range(50, 60)]
        expected_BTV = model(tokens_BT).logits_BTV[:, 50:]
    torch.testing.assert_close(torch.stack(steps, 1), expected_BTV, rtol=1e-4, atol=1e-4)
    assert worst(what_is_left(prefill.reading.logits_BV, prefill.reading.state), before) == 0.0


@pytest.mark.slow
def test_compiled_blocks_leave_the_same_and_are_compiled_once() -> None:
    """All layers and calls share one code: a capture must not meet the compiler."""
    model = ModelShelf(SMOKE, CPU, torch.float32).decoder("transformer")
    torch.compiler.reset()
    prefill = check_calls(model, 41, fuse=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        prefill()


def test_prompts_that_the_model_cannot_read_are_refused() -> None:
    model = ModelShelf(SMOKE, CPU, torch.float32).decoder("ham")
    with pytest.raises(ConfigError, match=r"131 tokens is longer than .* max_positions 130"):
        GraphPrefill(model, 1, 131)


def test_without_a_graph_the_prefill_is_eager_and_says_why() -> None:
    model = ModelShelf(SMOKE, CPU, torch.float32).decoder("ham")
    prefill = Prefill(model, Cell("model_prefill", "ham", 64, 2, 0.25, 32))
    prefill.prepare()
    tokens_B = prefill()
    assert (prefill.launch_mode, prefill.note) == ("eager", None)
    if torch.cuda.is_available():
        return
    prefill.capture()
    assert prefill.launch_mode == "eager"
    assert prefill.note.startswith("a prefill cannot be a CUDA graph: ")
    assert torch.equal(prefill(), tokens_B)
    assert prefill.state.bytes_allocated()["kv"] > 0


def test_the_row_carries_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(prefill: Prefill) -> None:
        prefill.note = "no graph"

    monkeypatch.setattr(Prefill, "prepare", prepare)
    sweep = make_sweep()
    sweep._one(Cell("model_prefill", "ham", 64, 1, 0.25, 32))
    (row,) = sweep.store.all_rows()
    assert (row.launch_mode, row.labels["note"]) == ("eager", "no graph")


def test_keys_that_wait_for_their_pages_are_among_the_predicted_bytes() -> None:
    cells = [Cell("model_prefill", "ham", 4096, 1, share, 64) for share in (0.25, 0.5)]
    quarter, half = (predicted_bytes(cell, FULL, 2, 0) for cell in cells)
    every = 12 * 4096 * 2 * 1024 * 2
    assert quarter > every
    assert half - quarter == pytest.approx(every / 4, rel=0.1)
