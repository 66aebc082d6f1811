"""Prefill as a CUDA graph: what replays leave, against ordinary prefills of the same tokens."""

from __future__ import annotations

import pytest
import torch
from prefills import Left, ordinary, route_a_share, what_is_left, worst

from ham.decoding.graph import GraphDecoder
from ham.measure.sweep.forced import force_routing
from ham.measure.sweep.grid import EVICTED, MODELS, SMOKE, UNSTRUCTURED, Cell, Choice, choose_cells
from ham.measure.sweep.models import ModelShelf
from ham.measure.sweep.passes import Prefill
from ham.measure.sweep.prefill_graph import GraphPrefill
from ham.measure.sweep.run import Sweep
from ham.measure.sweep.store import SweepStore
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
COMMON = {"device": "GPU", "code_fingerprint": "code", "manifest_id": "manifest"}
CEILINGS = {"buffer_bytes": 1 << 24, "size": 256}
LIMIT = 2e-2
"""In bfloat16; tokens that were recorded instead of read would be 1.4 away."""
PREFILLED = [name for name in MODELS if name != EVICTED]


def random_tokens(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(257, (2, length), generator=generator).to(CUDA)


def make_model(mixer: str) -> DecoderLM:
    return ModelShelf(SMOKE, CUDA, torch.bfloat16).decoder(mixer)


def captured(model: DecoderLM, length: int, fuse: bool) -> GraphPrefill:
    ordinary(model, random_tokens(length, 0))
    prefill = GraphPrefill(model, 2, length, fuse)
    prefill.capture()
    return prefill


def left_by(prefill: GraphPrefill, tokens_BT: torch.Tensor) -> Left:
    prefill.tokens_BT.copy_(tokens_BT)
    tokens_B = prefill()
    left = what_is_left(prefill.reading.logits_BV, prefill.reading.state)
    assert torch.equal(tokens_B, left.logits_BV.argmax(-1))
    return left


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("length", [97, 128])
@pytest.mark.parametrize("mixer", PREFILLED)
def test_replays_leave_what_ordinary_prefills_leave(mixer: str, length: int, fuse: bool) -> None:
    """Counts and positions exactly: fused, where a bfloat16 score may move, routing is forced."""
    model = make_model(mixer)
    if mixer == "ham" and fuse:
        force_routing(model, 0.25, UNSTRUCTURED)
    elif mixer == "ham":
        route_a_share(model, random_tokens(length, 0), 0.3)
    prefill = captured(model, length, fuse)
    texts = [random_tokens(length, seed) for seed in (1, 2)]
    found = [left_by(prefill, text) for text in (*texts, texts[0])]
    distances = [
        worst(left, ordinary(model, text))
        for left, text in zip(found, (*texts, texts[0]), strict=True)
    ]
    print(f"{mixer} {length}: largest distances {distances}")
    assert max(distances) <= LIMIT
    assert worst(found[2], found[0]) <= 1e-3
    assert not torch.equal(found[0].logits_BV, found[1].logits_BV)


@torch.no_grad()
def test_what_is_routed_follows_the_tokens_and_decoding_goes_on() -> None:
    model = make_model("ham")
    route_a_share(model, random_tokens(128, 0), 0.3)
    prefill = captured(model, 97, fuse=False)
    kept = []
    for seed in (1, 2):
        tokens_BT = random_tokens(97, seed)
        kept.append(left_by(prefill, tokens_BT).integers)
        state = model.init_state(2)
        model.prefill(tokens_BT, state)
        copy = DecoderState.join([prefill.reading.state])
        decoders = [GraphDecoder(model, each) for each in (copy, state)]
        for token in range(30):
            token_B = torch.full((2,), token, device=CUDA)
            one, other = (decoder.step(token_B).float() for decoder in decoders)
            assert (one - other).norm() <= LIMIT * other.norm()
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0] if "pos" in name)


@pytest.mark.parametrize("mixer", PREFILLED)
def test_the_prefill_of_a_cell_is_captured(mixer: str) -> None:
    model = make_model(mixer)
    cell = Cell("model_prefill", mixer, 128, 2, 0.25 if mixer == "ham" else None, 32)
    prefill = Prefill(model, cell, fuse=True)
    eager_B = prefill().clone()
    expected = what_is_left(eager_B, prefill.state)
    prefill.prepare()
    assert (prefill.launch_mode, prefill.note) == ("cuda_graph", None)
    assert prefill().shape == eager_B.shape
    found = what_is_left(expected.logits_BV, prefill.state)
    assert worst(found, expected) <= LIMIT


def test_rows_of_prefill_say_how_it_was_launched_and_leave_no_memory_behind() -> None:
    cells = choose_cells(SMOKE, Choice(experiments=["model_prefill"]))[1]
    sweep = Sweep(CUDA, torch.bfloat16, SMOKE, SweepStore(None, COMMON))
    held = []
    for _ in range(2):
        sweep.store = SweepStore(None, COMMON)
        assert sweep.run(cells, **CEILINGS) == 0
        torch._C._cuda_clearCublasWorkspaces()
        held.append(torch.cuda.memory_allocated())
    rows = [row for row in sweep.store.all_rows() if row.experiment == "model_prefill"]
    assert len(rows) == len(cells)
    told = {(row.launch_mode, row.error, row.labels.get("note")) for row in rows}
    assert told == {("cuda_graph", None, None)}
    assert all(row.labels["peak_bytes"] >= row.labels["kv_bytes"] for row in rows)
    assert held[1] == held[0]
