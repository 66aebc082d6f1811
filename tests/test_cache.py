"""The caches by themselves, against plain lists."""

from __future__ import annotations

import pytest
import torch

from ham.cache import BLOCK_TOKENS, PAGE_TOKENS, DenseKVCache, PagedKVCache, WindowKVCache

LIKE = torch.empty(0, dtype=torch.float64)


def random_kv(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, 2, 4)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("parts", [(1,), (5, 1, 1), (70, 3), (PAGE_TOKENS, PAGE_TOKENS, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_paged_cache_holds_routed_tokens_in_order(parts, batch) -> None:
    total = sum(parts)
    k_BTHK, v_BTHV = random_kv(batch, total, seed=0)
    routed_BT = torch.rand(batch, total, generator=torch.Generator().manual_seed(1)) < 0.5
    cache = PagedKVCache(batch, 2, 4, LIKE)
    start = 0
    for size in parts:
        part = slice(start, start + size)
        cache.append(k_BTHK[:, part], v_BTHV[:, part], routed_BT[:, part], start)
        start += size
    packed = cache.packed()
    for row in range(batch):
        kept = routed_BT[row].nonzero().flatten()
        count = int(packed.counts_B[row])
        assert count == len(kept)
        assert packed.positions_BN[row, :count].tolist() == kept.tolist()
        assert torch.equal(packed.k_BNHK[row, :count], k_BTHK[row, kept])
        assert torch.equal(packed.v_BNHV[row, :count], v_BTHV[row, kept])


def test_paged_cache_allocates_only_the_pages_needed() -> None:
    cache = PagedKVCache(2, 2, 4, LIKE)
    assert sum(t.numel() for t in cache.tensors()["kv"]) == 0
    k_BTHK, v_BTHV = random_kv(2, PAGE_TOKENS + 1, seed=0)
    routed_BT = torch.zeros(2, PAGE_TOKENS + 1, dtype=torch.bool)
    routed_BT[0] = True
    cache.append(k_BTHK, v_BTHV, routed_BT, 0)
    assert cache.k_PSHK.shape[0] == 2
    assert cache.page_table_BP.tolist() == [[0, 1], [-1, -1]]
    cache.select(torch.tensor([1]))
    assert cache.k_PSHK.shape[0] == 0


def test_unused_slots_are_finite() -> None:
    cache = PagedKVCache(1, 2, 4, LIKE)
    k_BTHK, v_BTHV = random_kv(1, 3, seed=0)
    cache.append(k_BTHK, v_BTHV, torch.tensor([[True, False, True]]), 0)
    assert torch.isfinite(cache.k_PSHK).all()
    assert torch.isfinite(cache.v_PSHV).all()


@pytest.mark.parametrize("parts", [(3,), (8,), (20,), (3, 3, 3), (1,) * 19, (7, 9, 30)])
def test_window_cache_knows_the_last_tokens(parts) -> None:
    window, total = 8, sum(parts)
    k_BTHK, v_BTHV = random_kv(2, total, seed=0)
    cache = WindowKVCache(2, window, 2, 4, LIKE)
    start = 0
    for size in parts:
        cache.append(k_BTHK[:, start : start + size], v_BTHV[:, start : start + size])
        start += size
    (positions,) = cache.positions_BW().tolist()
    assert sorted(p for p in positions if p >= 0) == list(range(max(0, total - window), total))
    for slot, position in enumerate(positions):
        if position >= 0:
            assert torch.equal(cache.k_BWHK[:, slot], k_BTHK[:, position])
            assert torch.equal(cache.v_BWHV[:, slot], v_BTHV[:, position])


def test_dense_cache_grows_by_blocks_and_keeps_everything() -> None:
    k_BTHK, v_BTHV = random_kv(2, 2 * BLOCK_TOKENS + 1, seed=0)
    cache = DenseKVCache(2, 2, 4, LIKE)
    cache.append(k_BTHK[:, :3], v_BTHV[:, :3])
    assert cache.k_BTHK.shape[1] == BLOCK_TOKENS
    keys, values = cache.append(k_BTHK[:, 3:], v_BTHV[:, 3:])
    assert cache.k_BTHK.shape[1] == 3 * BLOCK_TOKENS
    assert torch.equal(keys, k_BTHK)
    assert torch.equal(values, v_BTHV)
