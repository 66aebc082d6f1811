"""Caches filled from whole prompts: the launch for all layers against appending layer by layer."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, interpreter

from ham.paging import prompt as prompt_module
from ham.paging.cache import PagedKVCache
from ham.paging.prompt import RoutedTokens, index_tokens, store_tokens

__all__ = ["interpreter"]

HEADS, KEYS, VALUES, PAGE = 3, 24, 40, 8


def make_prompts(share: float, layers: int = 3, rows: int = 2, time: int = 37) -> list:
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(layers):
        like = torch.empty(0, device=DEVICE)
        empty = PagedKVCache(rows, HEADS, KEYS, like, value_size=VALUES, page_tokens=PAGE)
        prompts.append(RoutedTokens(empty))
        k_RTHK = torch.randn(rows, time, HEADS, KEYS, generator=generator)
        v_RTHV = torch.randn(rows, time, HEADS, VALUES, generator=generator)
        routed_RT = torch.rand(rows, time, generator=generator) < share
        # One row without a token, and one page that is exactly full.
        routed_RT[0] &= len(prompts) != 1
        if len(prompts) == 2 and share:
            routed_RT[1] = torch.arange(time) % 2 == 0
            routed_RT[1, 32:] = False
        prompts[-1].append(*(x.to(DEVICE) for x in (k_RTHK, v_RTHV, routed_RT)), 0)
    return prompts


def appended(prompts: list) -> list[PagedKVCache]:
    caches = []
    for prompt in prompts:
        rows = len(prompt.cache.counts)
        cache = PagedKVCache(rows, HEADS, KEYS, prompt.k_RTHK, value_size=VALUES, page_tokens=PAGE)
        cache.append(prompt.k_RTHK, prompt.v_RTHV, prompt.routed_RT, 0)
        caches.append(cache)
    return caches


def assert_same(found: PagedKVCache, expected: PagedKVCache) -> None:
    assert found.counts == expected.counts
    assert found.counts_B.dtype == torch.int32
    assert torch.equal(found.counts_B, expected.counts_B)
    assert found.page_table_BP.shape == expected.page_table_BP.shape
    for one, other in zip(
        vars(found.packed()).values(), vars(expected.packed()).values(), strict=True
    ):
        assert torch.equal(one, other)
    sizes = [
        {kind: sum(x.nbytes for x in held) for kind, held in cache.tensors().items()}
        for cache in (found, expected)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("launched", [True, False])
def test_one_launch_stores_what_appending_does(
    share: float, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_module, "triton_available", lambda device: launched)
    prompts = make_prompts(share)
    stored = store_tokens(prompts, index_tokens(prompts))
    for found, expected in zip(stored, appended(prompts), strict=True):
        assert_same(found, expected)


def test_what_is_stored_can_be_added_to_joined_and_thinned() -> None:
    prompts = make_prompts(0.3)
    stored = store_tokens(prompts, index_tokens(prompts))
    more = [torch.randn(2, 11, HEADS, size, device=DEVICE) for size in (KEYS, VALUES)]
    routed_RT = torch.ones(2, 11, dtype=torch.bool, device=DEVICE)
    index_B = torch.tensor([1, 1, 0], device=DEVICE)
    for found, expected in zip(stored, appended(prompts), strict=True):
        for cache in (found, expected):
            cache.append(*more, routed_RT, 37)
        assert_same(found, expected)
        copies = [PagedKVCache.join([cache, cache]) for cache in (found, expected)]
        for cache in (found, expected):
            cache.select(index_B)
        assert_same(*copies)
        # Sequences that share a pool leave its free pages to the oldest cache.
        assert found.counts == expected.counts
        assert torch.equal(found.packed().k_BNHK, expected.packed().k_BNHK)


def test_a_prompt_begins_at_the_beginning() -> None:
    prompt = make_prompts(0.3)[0]
    with pytest.raises(ValueError, match="from position 0, not 5"):
        prompt.append(prompt.k_RTHK, prompt.v_RTHV, prompt.routed_RT, 5)
