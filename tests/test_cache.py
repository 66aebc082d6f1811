"""The caches by themselves, against plain lists."""

from __future__ import annotations

import pytest
import torch

from ham.cache import BLOCK_TOKENS, PAGE_TOKENS, DenseKVCache, PagedKVCache, WindowKVCache
from ham.errors import CachePoolFullError

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
    assert cache.pool.pages_total == cache.pool.pages_taken == 2
    assert (cache.page_table_BP != 0).tolist() == [[True, True], [False, False]]
    cache.select(torch.tensor([1]))
    assert cache.pool.pages_total == 0


def test_unused_slots_are_finite() -> None:
    cache = PagedKVCache(1, 2, 4, LIKE)
    k_BTHK, v_BTHV = random_kv(1, 3, seed=0)
    cache.append(k_BTHK, v_BTHV, torch.tensor([[True, False, True]]), 0)
    assert all(torch.isfinite(part).all() for part in cache.tensors()["kv"])


def filled(counts: list[int], seed: int = 0, page_tokens: int = 4) -> PagedKVCache:
    """A cache whose sequence i holds `counts[i]` tokens that know where they are from."""
    cache = PagedKVCache(len(counts), 2, 3, LIKE, value_size=5, page_tokens=page_tokens)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, max(counts), 5):
        routed_BT = torch.arange(start, start + 5) < torch.tensor(counts)[:, None]
        shape = (len(counts), 5, 2)
        k_BTHK = torch.rand(*shape, 3, generator=generator, dtype=LIKE.dtype)
        v_BTHV = torch.rand(*shape, 5, generator=generator, dtype=LIKE.dtype)
        cache.append(k_BTHK, v_BTHV, routed_BT, start)
    return cache


def contents(cache: PagedKVCache) -> list[tuple[torch.Tensor, ...]]:
    packed = cache.packed()
    parts = (packed.k_BNHK, packed.v_BNHV, packed.positions_BN)
    return [
        tuple(part[row, :count].clone() for part in parts)
        for row, count in enumerate(packed.counts_B.tolist())
    ]


def assert_same(found: list[tuple[torch.Tensor, ...]], expected: list) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def bytes_of(tensors: dict[str, list[torch.Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for part in tensors.values() for t in part)


def held_bytes(cache: PagedKVCache) -> int:
    return cache.pool.bytes_allocated + cache.page_table_BP.nbytes + cache.counts_B.nbytes


@pytest.mark.parametrize("order", [[2, 0], [1], [0, 0, 3, 0], [3, 2, 1, 0], []], ids=str)
def test_selecting_keeps_content_and_frees_the_rest(order) -> None:
    cache = filled([9, 0, 4, 13])
    before = contents(cache)
    cache.select(torch.tensor(order, dtype=torch.int64))
    assert_same(contents(cache), [before[row] for row in order])
    assert cache.pool.pages_taken == sum([3, 0, 1, 4][row] for row in order)
    assert cache.pool.pages_free == 0
    assert bytes_of(cache.tensors()) == held_bytes(cache)
    if order.count(0) > 1:
        # A copy is a copy: one sequence grows, its twin does not.
        token = torch.ones(4, 1, 2, 5, dtype=LIKE.dtype)
        cache.append(token[..., :3], token, torch.tensor([[True], [False], [False], [True]]), 50)
        found = contents(cache)
        assert found[0][2].tolist() == [*range(9), 50]
        assert_same(found[1:2], before[:1])


def test_joining_copies_and_leaves_the_parts_as_they_were() -> None:
    parts = [filled([3, 17], 0), filled([8], 1), filled([0, 5], 2)]
    expected = [row for part in parts for row in contents(part)]
    joined = PagedKVCache.join([PagedKVCache.join(parts[:2]), parts[2], parts[0]])
    token = torch.ones(7, 1, 2, 5, dtype=LIKE.dtype)
    start_B = torch.tensor([3, 17, 8, 0, 5, 3, 17])
    assert_same(contents(joined), expected + expected[:2])
    assert joined.pool.pages_total == 1 + 5 + 2 + 2 + 1 + 5
    assert bytes_of(joined.tensors()) == held_bytes(joined)
    joined.append(token[..., :3], token, torch.ones(7, 1, dtype=torch.bool), start_B)
    assert [row[2][-1].item() for row in contents(joined)] == start_B.tolist()
    assert_same([row for part in parts for row in contents(part)], expected)
    joined.select(torch.tensor([], dtype=torch.int64))
    assert joined.pool.bytes_allocated == 0


def test_caches_with_different_pages_are_refused() -> None:
    cache = filled([3])
    with pytest.raises(ValueError, match="cannot be joined"):
        PagedKVCache.join([cache, filled([3], page_tokens=8)])
    with pytest.raises(ValueError, match="has no pages"):
        PagedKVCache(1, 4, 3, LIKE, pool=cache.pool)


def test_a_full_pool_leaves_the_cache_as_it_was() -> None:
    cache = filled([6, 2])
    cache.pool.limit_pages = 4
    before = contents(cache)
    k_BTHK, v_BTHV = torch.ones(2, 9, 2, 3), torch.ones(2, 9, 2, 5)
    with pytest.raises(CachePoolFullError, match=r"needs 4 more pages.* 3 of at most 4"):
        cache.append(k_BTHK, v_BTHV, torch.ones(2, 9, dtype=torch.bool), 6)
    assert_same(contents(cache), before)
    assert cache.pool.pages_total == 3


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


@pytest.mark.parametrize("sinks", [1, 3, 8])
@pytest.mark.parametrize("read", [(0, 0), (2, 2), (2, 0), (2, 30), (9, 1)], ids=str)
@pytest.mark.parametrize("parts", [(1,), (2, 5), (11,), (40,), (1,) * 19], ids=str)
def test_window_cache_keeps_the_first_tokens_too(sinks, read, parts) -> None:
    window, rows, caches = 8, [], []
    for row, before in enumerate(read):
        rows.append(random_kv(1, before + sum(parts), seed=row))
        caches.append(WindowKVCache(1, window, 2, 4, LIKE, sinks))
        caches[-1].append(*(x[:, :before] for x in rows[-1]))
    cache, done = WindowKVCache.join(caches), 0
    for size in parts:
        cuts = [slice(before + done, before + done + size) for before in read]
        new = zip(
            *([x[:, cut] for x in kv] for kv, cut in zip(rows, cuts, strict=True)), strict=True
        )
        cache.append(*(torch.cat(parts) for parts in new))
        done += size
    positions = cache.positions_BW().expand(2, -1).tolist()
    for row, (before, (k_1THK, v_1THV)) in enumerate(zip(read, rows, strict=True)):
        total = before + done
        expected = sorted({*range(min(sinks, total)), *range(max(sinks, total - window), total)})
        assert sorted(p for p in positions[row] if p >= 0) == expected
        for slot, position in enumerate(positions[row]):
            if position >= 0:
                assert torch.equal(cache.k_BWHK[row, slot], k_1THK[0, position])
                assert torch.equal(cache.v_BWHV[row, slot], v_1THV[0, position])


def test_dense_cache_grows_by_blocks_and_keeps_everything() -> None:
    k_BTHK, v_BTHV = random_kv(2, 2 * BLOCK_TOKENS + 1, seed=0)
    cache = DenseKVCache(2, 2, 4, LIKE)
    cache.append(k_BTHK[:, :3], v_BTHV[:, :3])
    assert cache.k_BTHK.shape[1] == BLOCK_TOKENS
    keys, values = cache.append(k_BTHK[:, 3:], v_BTHV[:, 3:])
    assert cache.k_BTHK.shape[1] == 3 * BLOCK_TOKENS
    assert torch.equal(keys, k_BTHK)
    assert torch.equal(values, v_BTHV)
