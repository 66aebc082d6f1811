"""A budget of bytes for the routed cache: shared by layers and batches, and what it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton_device import DEVICE, interpreter

from ham.errors import CachePoolFullError, ConfigError
from ham.model.generation import generate, stream
from ham.paging.budget import BudgetedPool, CacheBudget
from ham.paging.layout import PageLayout
from ham.paging.pool import PagePool

__all__ = ["interpreter"]

CPU = torch.device("cpu")
LAYOUT = PageLayout(2, 16, 16, torch.float32, 8)
PAGE = LAYOUT.page_bytes


def test_pools_share_one_budget() -> None:
    budget = CacheBudget(10 * PAGE)
    first, second = (BudgetedPool(LAYOUT, CPU, budget) for _ in range(2))
    first.take(6)
    pages = second.take(4)
    with pytest.raises(CachePoolFullError) as caught:
        first.take(1)
    assert f"needs 1 more pages, {PAGE:,} bytes; it holds {10 * PAGE:,} of at most" in str(
        caught.value
    )
    assert "--cache-mib" in str(caught.value)
    second.give_back(pages)
    second.trim()
    assert len(first.take(4)) == 4
    del second
    assert budget.room_bytes == 0


def test_spare_pages_stay_within_the_budget() -> None:
    pool = BudgetedPool(LAYOUT, CPU, CacheBudget(130 * PAGE))
    pool.take(129)
    pool.slab_pages = 64
    pool.take(1)
    assert (pool.pages_total, pool.slab_pages) == (130, 64)


def test_a_device_without_memory_is_told_with_what_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def refuse(pool: PagePool, shortfall: int) -> None:
        asked.append(max(shortfall, pool.slab_pages))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PagePool, "_grow", refuse)
    pool = BudgetedPool(LAYOUT, CPU, CacheBudget())
    pool.slab_pages = 64
    with pytest.raises(CachePoolFullError, match=f"needs {3 * PAGE:,} more bytes and cpu has"):
        pool.take(3)
    assert asked == [64, 3], "again without spare pages"
    assert pool.pages_total == 0 and pool.slab_pages == 64


@pytest.mark.parametrize("fused", [False, True])
def test_generation_within_a_limit_is_the_same_and_beyond_it_an_error(tiny_model, fused) -> None:
    model = tiny_model("ham").to(DEVICE)
    prompts = [[1, 2, 3], list(range(40)), [7] * 40, [5]]
    arguments = {"max_new_tokens": 6, "batch_size": 3, "fused": fused}
    expected = generate(model, prompts, **arguments)
    assert generate(model, prompts, **arguments, cache_bytes=1 << 24) == expected
    with pytest.raises(CachePoolFullError, match="of at most 5,000 bytes"):
        generate(model, prompts, **arguments, cache_bytes=5000)
    with pytest.raises(CachePoolFullError):
        list(stream(model, list(range(40)), 4, fused=fused, cache_bytes=5000))


def test_a_limit_needs_a_cache_that_it_bounds(tiny_model) -> None:
    model = tiny_model("transformer")
    assert generate(model, [[1]], 2)
    with pytest.raises(ConfigError, match="this model has none"):
        generate(model, [[1]], 2, cache_bytes=1 << 20)
    with pytest.raises(ConfigError, match="cache_bytes 0; legal: an integer >= 1"):
        CacheBudget(0)


def test_a_memory_that_is_too_large_already_is_refused(tiny_model) -> None:
    model = tiny_model("ham", target=1.0)
    state = model.init_state(1)
    model.prefill(torch.arange(64)[None], state)
    CacheBudget(1 << 24).cover(state)
    with pytest.raises(CachePoolFullError, match="needs 0 more pages"):
        CacheBudget(100).cover(state)


def test_an_external_memory_is_left_alone() -> None:
    CacheBudget().cover(SimpleNamespace(layers=[object(), SimpleNamespace(cache=None)]))
