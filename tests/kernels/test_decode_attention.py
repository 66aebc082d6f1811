"""Paged attention and both branches combined, against the reference, over counts of all kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_checks import (
    DEVICE,
    LIMIT,
    Layer,
    SideBySide,
    interpreter,
    needs_gpu,
    on_gpu,
    random_numbers,
    relative_error,
)

from ham.errors import ConfigError
from ham.kernels.decode import reference
from ham.kernels.decode.arguments import AttentionTile

__all__ = ["interpreter", "needs_gpu"]

LAYERS = [
    Layer(page_tokens=16, tile=AttentionTile(16, 3, 1)),
    Layer(page_tokens=32, tile=AttentionTile(16, 2, 1), dtype=torch.float16),
    Layer(page_tokens=16, tile=AttentionTile(64, 2, 1), key_size=24, value_size=40),
    Layer(page_tokens=64, tile=AttentionTile(32, 1, 1, fused=True), value_size=32),
    Layer(page_tokens=16, tile=AttentionTile(32, 5, 1, fused=True), reduction="per_head"),
    Layer(page_tokens=32, tile=AttentionTile(32, 2, 1), cache_dtype=torch.float16),
]
GPU_LAYERS = [
    Layer(
        heads=3,
        key_size=key_size,
        value_size=value_size,
        page_tokens=page,
        tile=AttentionTile(tokens, splits, warps, fused=fused),
        reduction=reduction,
    )
    for key_size, value_size, page, tokens, splits, warps, fused, reduction in (
        (128, 128, 32, 32, 16, 4, False, "min"),
        (64, 64, 16, 64, 8, 4, True, "min"),
        (64, 64, 32, 32, 16, 4, False, "min"),
        (64, 64, 32, 32, 16, 4, True, "min"),
        (64, 64, 64, 64, 32, 4, False, "min"),
        (64, 64, 32, 64, 5, 4, True, "per_head"),
        (128, 128, 32, 32, 8, 4, True, "min"),
        (128, 128, 32, 64, 16, 4, False, "min"),
        (128, 128, 64, 64, 16, 8, False, "min"),
        (128, 128, 16, 16, 32, 2, False, "min"),
        (128, 128, 16, 128, 4, 8, False, "min"),
        (128, 128, 32, 32, 16, 4, True, "per_head"),
        (16, 16, 16, 16, 1, 1, False, "min"),
        (32, 32, 32, 32, 4, 2, True, "min"),
        (96, 48, 32, 32, 4, 4, False, "min"),
        (72, 40, 64, 32, 3, 4, True, "min"),
        (64, 128, 32, 32, 16, 4, False, "min"),
    )
]


def counts_of(page: int, pages: int) -> list[int]:
    """Counts at the edges of pages, and in between."""
    return [0, 1, page - 1, page, page + 1, pages * page - 3, pages * page]


def check_attention(layer: Layer, pages_per_row: int) -> None:
    """One sequence per count; with a cache per head the heads of a sequence differ too."""
    counts = counts_of(layer.page_tokens, pages_per_row)
    layer = replace(layer, batch=len(counts))
    sides = SideBySide(layer, pages_per_row)
    rows = [counts[(row * 5) % len(counts)] for row in range(layer.rows)]
    sides.pages.counts_R.copy_(torch.tensor(rows))
    exact = layer.exact
    q_BHK = random_numbers(50, *sides.scratch.q_BHK.shape, dtype=layer.dtype)
    o_BHV = random_numbers(51, *sides.scratch.o_BHV.shape, dtype=layer.dtype)
    gates_B2H = random_numbers(52, layer.batch, 2 * layer.heads, dtype=layer.dtype)
    sides.scratch.q_BHK.copy_(q_BHK)
    sides.scratch.o_BHV.copy_(o_BHV)
    attended = []
    for row, count in enumerate(rows):
        shape = layer.page_heads, count
        k_GNK = random_numbers(100 + row, *shape, layer.key_size, dtype=layer.stored)
        v_GNV = random_numbers(200 + row, *shape, layer.value_size, dtype=layer.stored)
        sides.pool.write(row, k_GNK, v_GNV)
        if count == 0:
            attended.append(torch.zeros(layer.page_heads, layer.value_size, device=DEVICE))
            continue
        q_GK = q_BHK.view(layer.rows, layer.page_heads, -1)[row]
        scale = layer.key_size**-0.5
        attended.append(reference.attend(q_GK.to(exact), k_GNK.to(exact), v_GNV.to(exact), scale))
    attended_BHV = torch.stack(attended).view(o_BHV.shape)
    truth_BHV = reference.combine(
        o_BHV.to(exact), attended_BHV, gates_B2H.to(exact), *sides.branch_gains
    )
    for _ in range(2):
        y_BHV = sides.attend(gates_B2H)
        assert relative_error(y_BHV, truth_BHV) < LIMIT[layer.dtype]
    assert not sides.scratch.arrivals_BH.any()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_counts(layer: Layer) -> None:
    check_attention(layer, 3)


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("layer", on_gpu(GPU_LAYERS, 2), ids=str)
def test_counts_on_the_gpu(layer: Layer) -> None:
    check_attention(layer, 19)


@pytest.mark.parametrize("tile", [AttentionTile(16, 2, 1), AttentionTile(16, 2, 1, fused=True)])
def test_large_scores_do_not_overflow(tile: AttentionTile) -> None:
    """One key far ahead of the others, in either split: the read-out is its value."""
    for winner in (3, 30):
        layer = Layer(batch=1, heads=1, tile=tile)
        sides = SideBySide(layer, 2)
        k_GNK = torch.full((1, 32, 16), -300.0, device=DEVICE)
        k_GNK[0, winner] = 300
        v_GNV = random_numbers(1, 1, 32, 16)
        sides.pool.write(0, k_GNK, v_GNV)
        sides.pages.counts_R[0] = 32
        sides.scratch.q_BHK.fill_(100.0)
        sides.scratch.o_BHV.zero_()
        y_BHV = sides.attend(torch.full((1, 2), 40.0, device=DEVICE))
        truth_V = reference.rms_norm(v_GNV[0, winner], sides.branch_gains[1])
        assert relative_error(y_BHV[0, 0], truth_V) < 1e-6


def test_idle_sequences_are_not_read() -> None:
    """Their row of the page table may hold anything."""
    from ham.kernels.decode.launch import paged_attention

    tile = AttentionTile(16, 2, 1, fused=True)
    sides = SideBySide(Layer(heads=1, tile=tile))
    sides.pages.page_table_RP[1] = 0
    sides.pages.counts_R.copy_(torch.tensor([0, 60]))
    active_B = torch.tensor([1, 0], dtype=torch.int8, device=DEVICE)
    y_BHV = torch.full_like(sides.scratch.o_BHV, 7.0)
    gates_B2H = torch.zeros(2, 2, device=DEVICE)
    paged_attention(
        sides.pages,
        sides.scratch,
        gates_B2H,
        *sides.branch_gains,
        y_BHV,
        tile=tile,
        active_B=active_B,
    )
    assert not y_BHV[0].any()
    assert (y_BHV[1] == 7).all()


def test_more_splits_than_the_scratch_memory_has() -> None:
    sides = SideBySide(Layer())
    sides.layer = replace(sides.layer, tile=AttentionTile(16, 3, 1))
    with pytest.raises(ConfigError, match="the tile has 3 splits, the scratch memory is for at"):
        sides.attend(torch.zeros(2, 4, device=DEVICE))
