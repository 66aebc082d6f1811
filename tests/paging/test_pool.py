"""The page pool by itself: ownership, limits, release, accounting, and what a page looks like."""

from __future__ import annotations

import random

import pytest
import torch

from ham.errors import CachePoolFullError
from ham.paging.layout import PageLayout, paged_bytes
from ham.paging.pool import SLAB_SHARE, PagePool

LAYOUT = PageLayout(heads=2, key_size=4, value_size=6, dtype=torch.float32, page_tokens=16)
CPU = torch.device("cpu")


class Owner:
    pool: PagePool


def test_a_page_has_its_parts_side_by_side() -> None:
    used = 16 * 2 * (4 + 6) * 4 + 16 * 4
    assert LAYOUT.page_bytes == 1536 >= used > 1536 - 256
    page_1X = torch.zeros(1, LAYOUT.page_bytes, dtype=torch.uint8)
    LAYOUT.keys(page_1X).fill_(1.5)
    LAYOUT.values(page_1X).fill_(2.5)
    LAYOUT.positions(page_1X).fill_(7)
    assert LAYOUT.keys(page_1X).shape == (1, 2, 16, 4)
    assert LAYOUT.values(page_1X).shape == (1, 2, 16, 6)
    floats = page_1X.view(torch.float32)[0]
    expected = torch.cat([torch.full((128,), 1.5), torch.full((192,), 2.5)])
    assert torch.equal(floats[:320], expected)
    assert page_1X.view(torch.int32)[0, 320:336].tolist() == [7] * 16
    assert not page_1X[0, used:].any()


def test_declared_bytes_by_hand() -> None:
    declared = paged_bytes(17, 2, 4, 6, 4, page_tokens=16)
    assert declared == (17 * 2 * 10 * 4, 17 * 4, 2 * 8 + 4, 2 * 1536 + 20)
    assert paged_bytes(0, 2, 4, 6, 4) == (0, 0, 4, 4)


def test_pages_lie_side_by_side_and_are_zero() -> None:
    pool = PagePool(LAYOUT, CPU)
    pages = pool.take(5)
    assert pages == [pages[0] + place * LAYOUT.page_bytes for place in range(5)]
    (view,) = pool.views(pages)
    assert view.data_ptr() == pages[0]
    assert view.shape == (5, LAYOUT.page_bytes)
    assert not view.any()


def test_a_pool_without_slack_holds_what_was_taken() -> None:
    pool = PagePool(LAYOUT, CPU)
    groups = [pool.take(n) for n in (3, 1, 7)]
    assert pool.bytes_allocated == 11 * LAYOUT.page_bytes
    pool.give_back(groups[1])
    pool.give_back(groups[2][:3])
    assert (pool.pages_total, pool.pages_taken, pool.pages_free) == (11, 7, 4)
    assert pool.trim() == LAYOUT.page_bytes
    assert pool.trim() == 0
    again = pool.take(4)
    assert set(groups[2][:3]) < set(again)
    assert pool.pages_total == 11


def test_what_is_taken_apart_is_released_apart() -> None:
    pool = PagePool(LAYOUT, CPU, limit_pages=9)
    parts = pool.take_each([3, 0, 4])
    assert [len(part) for part in parts] == [3, 0, 4]
    pool.give_back(parts[0])
    assert pool.trim() == 3 * LAYOUT.page_bytes
    with pytest.raises(CachePoolFullError, match=r"needs 6 more pages.* 4 of at most 9"):
        pool.take_each([2, 4])
    assert pool.pages_total == 4


def test_slack_of_a_growing_pool_is_small() -> None:
    pool = PagePool(LAYOUT, CPU, slab_pages=8)
    for taken in range(1, 1500):
        pool.take(1)
        assert pool.pages_taken == taken
        assert pool.pages_free <= min(7, taken // SLAB_SHARE)


def test_a_full_pool_says_what_it_needs_and_stays_as_it_was() -> None:
    pool = PagePool(LAYOUT, CPU, slab_pages=64, limit_pages=100)
    pool.take(90)
    free = pool.take(5)
    pool.give_back(free)
    with pytest.raises(
        CachePoolFullError,
        match=r"needs 11 more pages of 1536 bytes; 5 are free and 95 of at most 100",
    ):
        pool.take(11)
    assert (pool.pages_taken, pool.pages_free) == (90, 5)
    assert len(set(pool.take(10))) == 10
    assert pool.pages_total == 100


def test_pages_have_one_owner() -> None:
    pool = PagePool(LAYOUT, CPU)
    pages = pool.take(2)
    for wrong in ([pages[0], pages[0]], [pages[0] + 1]):
        with pytest.raises(ValueError, match="not all are taken"):
            pool.give_back(wrong)
    pool.give_back(pages)
    with pytest.raises(ValueError, match="not all are taken"):
        pool.give_back(pages[:1])


def test_absorbing_moves_every_page_and_refuses_other_layouts() -> None:
    pool, other = PagePool(LAYOUT, CPU), PagePool(LAYOUT, CPU)
    mine, theirs = pool.take(2), other.take(3)
    other.give_back(theirs[:1])
    pool.absorb(other)
    assert (pool.pages_taken, pool.pages_free) == (4, 1)
    assert other.bytes_allocated == 0
    pool.absorb(pool)
    pool.give_back(mine + theirs[1:])
    assert pool.trim() == 5 * LAYOUT.page_bytes
    with pytest.raises(ValueError, match="cannot join a pool"):
        pool.absorb(PagePool(PageLayout(1, 4, 6, torch.float32, 16), CPU))


@pytest.mark.parametrize("slab_pages", [1, 5])
def test_random_use_never_shares_or_loses_a_page(slab_pages) -> None:
    chance = random.Random(slab_pages)
    pool = PagePool(LAYOUT, CPU, slab_pages)
    owner, held = Owner(), []
    pool.add_user(owner)
    pool.add_user(other := Owner())
    for _ in range(600):
        if held and chance.random() < 0.48:
            pool.give_back(held.pop(chance.randrange(len(held))))
            if chance.random() < 0.3:
                pool.trim()
        else:
            held.append(pool.take(chance.randrange(1, 9)))
        taken = [page for pages in held for page in pages]
        assert len(set(taken)) == len(taken) == pool.pages_taken
        free = pool.free_tensors(owner).get("free_pages", [])
        listed = sum(view.shape[0] for view in [*pool.views(taken), *free])
        assert listed == pool.pages_total == pool.pages_taken + pool.pages_free
    assert pool.free_tensors(other) == {}
    for pages in held:
        pool.give_back(pages)
    pool.trim()
    assert pool.bytes_allocated == 0
