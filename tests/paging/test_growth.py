"""Growth beside a simulated device that runs late: slots, ownership, bounds, leaks, content."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from ham.cache import PagedKVCache
from ham.errors import CachePoolFullError
from ham.paging.growth import COPIES_IN_FLIGHT, COPY_EVERY, GrowthManager
from ham.paging.layout import PageLayout

CPU = torch.device("cpu")
PAGE = 8
LAYOUT = PageLayout(heads=1, key_size=2, value_size=2, dtype=torch.float32, page_tokens=PAGE)
# Steps that may have been enqueued since the newest copy that the host has read.
MOST_LAG = COPY_EVERY * (COPIES_IN_FLIGHT + 1)


class LateCopier:
    """Copies that arrive `lag` steps after they were started, or when the host waits for them."""

    def __init__(self, lag: int):
        self.lag = lag
        self.now = 0
        self.waits = 0

    def __call__(self, counts_LB: torch.Tensor) -> _LateCopy:
        return _LateCopy(self, counts_LB.numpy().copy(), self.now + self.lag)


class _LateCopy:
    def __init__(self, copier: LateCopier, values: np.ndarray, due: int):
        self.copier, self.due, self._values = copier, due, values

    def ready(self) -> bool:
        return self.copier.now >= self.due

    def values(self) -> np.ndarray:
        self.copier.waits += not self.ready()
        return self._values


class Device:
    """What a captured step does: write the next slot of each row, then keep it or not.

    `kept[row][layer]` lists the position of every token kept; `check` says whether every write of
    a real sequence went to a page that it alone owns.
    """

    def __init__(self, manager: GrowthManager, copier: LateCopier, seed: int, share: float):
        self.manager, self.copier, self.share = manager, copier, share
        self.chance = np.random.default_rng(seed)
        layers, batch = manager.counts_LB.shape
        self.kept: list[list[list[int]] | None] = [None] * batch
        self.layers = layers
        self.position = 0

    def step(self) -> None:
        manager = self.manager
        manager.before_step()
        owners = self.owners()
        table, counts = manager.page_table_LBP.numpy(), manager.counts_LB.numpy()
        routed = self.chance.random(counts.shape) < self.share
        for (layer, row), count in np.ndenumerate(counts.copy()):
            page = int(table[layer, row, count // PAGE])
            if self.kept[row] is None:
                assert page not in owners and count <= PAGE
            else:
                assert owners[page] == (layer, row)
                (view,) = manager.pool.views([page])
                LAYOUT.positions(view)[0, count % PAGE] = self.position
                LAYOUT.keys(view)[0, :, count % PAGE] = self.position + layer / 4
                if routed[layer, row]:
                    self.kept[row][layer].append(self.position)
            counts[layer, row] += routed[layer, row]
        self.position += 1
        self.copier.now += 1
        manager.after_step()

    def owners(self) -> dict[int, tuple[int, int]]:
        """Owner of each page in the tables; no page may have two."""
        owners: dict[int, tuple[int, int]] = {}
        scratch = self.manager.scratch_page
        for (layer, row, _), page in np.ndenumerate(self.manager.page_table_LBP.numpy()):
            if page != scratch:
                assert page not in owners
                owners[int(page)] = (layer, row)
        assert len(owners) == self.manager.pool.pages_taken
        return owners

    def most_pages(self) -> int:
        """Pages that the sequences may own, given what the host cannot know yet."""
        excess = MOST_LAG + self.manager.spare
        lengths = [len(kept) for row in self.kept if row is not None for kept in row]
        return sum(-(-(length + excess) // PAGE) for length in lengths)


def prefilled(
    lengths: Sequence[int], layers: int, share: float = 0.5, seed: int = 0
) -> tuple[list[PagedKVCache], list[list[list[int]]]]:
    """One cache a layer, and by row and layer the positions kept."""
    chance = torch.Generator().manual_seed(seed)
    caches, kept = [], [[] for _ in lengths]
    for layer in range(layers):
        cache = PagedKVCache(len(lengths), 1, 2, torch.empty(0), page_tokens=PAGE)
        longest = max(lengths)
        routed_BT = torch.rand(len(lengths), longest, generator=chance) < share
        routed_BT &= torch.arange(longest) < torch.tensor(lengths)[:, None]
        key_BTHK = (torch.arange(longest) + layer / 4).repeat(len(lengths), 1)
        key_BTHK = key_BTHK[:, :, None, None].expand(-1, -1, 1, 2)
        cache.append(key_BTHK, key_BTHK, routed_BT, 0)
        caches.append(cache)
        for row, routed_T in enumerate(routed_BT):
            kept[row].append(routed_T.nonzero().flatten().tolist())
    return caches, kept


def start(
    lengths: Sequence[int], layers: int = 2, lag: int = 0, share: float = 0.5, **options: int
) -> Device:
    caches, kept = prefilled(lengths, layers)
    copier = LateCopier(lag)
    manager = GrowthManager.from_caches(caches, 2000, **options)
    manager._copier = copier
    device = Device(manager, copier, seed=1, share=share)
    device.position = max(lengths)
    device.kept[: len(kept)] = kept
    return device


def assert_content(caches: list[PagedKVCache], kept: list[list[list[int]] | None]) -> None:
    for layer, cache in enumerate(caches):
        packed = cache.packed()
        for row, positions in enumerate(kept):
            expected = positions[layer] if positions is not None else []
            count = len(expected)
            assert cache.counts[row] == packed.counts_B[row] == count
            assert packed.positions_BN[row, :count].tolist() == expected
            keys = packed.k_BNHK[row, :count, 0, 0].tolist()
            assert keys == [position + layer / 4 for position in expected]


@pytest.mark.parametrize("lag", [0, 1, 7, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spare", [1, 8])
def test_a_slot_is_always_there_however_late_the_counts_are(lag, share, spare) -> None:
    device = start([5, 16], lag=lag, share=share, spare=spare)
    for _ in range(120):
        device.step()
        assert device.manager.pool.pages_taken <= device.most_pages()
    expected = [[len(layer) for layer in row] for row in device.kept]
    assert device.manager.counts().T.tolist() == expected
    assert_content(device.manager.to_caches(), device.kept)
    if lag == 0:
        assert device.copier.waits == 0


def test_a_thousand_steps_with_rows_coming_and_going() -> None:
    device = start([3, 30, 9], lag=6, share=0.4, batch=4)
    manager, chance = device.manager, np.random.default_rng(5)
    for step in range(1000):
        device.step()
        assert manager.pool.pages_taken <= device.most_pages()
        active = [row for row, kept in enumerate(device.kept) if kept is not None]
        idle = [row for row in range(4) if row not in active]
        event = chance.random()
        if event < 0.03 and active:
            row = int(chance.choice(active))
            manager.free(row)
            device.kept[row] = None
        elif event < 0.08 and idle:
            caches, kept = prefilled([20, 7, 1][: len(idle)], 2, seed=step)
            manager.place(idle[:3], caches)
            for row, positions in zip(idle, kept, strict=False):
                device.kept[row] = positions
        elif event < 0.1 and active:
            order = chance.choice(active, size=int(chance.integers(1, 5))).tolist()
            manager.select(order)
            picked = [[list(layer) for layer in device.kept[row]] for row in order]
            device.kept = [*picked, *[None] * (4 - len(order))]
    expected = [[len(layer) for layer in kept] if kept else [0, 0] for kept in device.kept]
    assert manager.counts().T.tolist() == expected
    caches = manager.to_caches()
    assert_content(caches, device.kept)
    pool = manager.pool
    listed = [*caches, manager]
    held = sum(t.nbytes for user in listed for kind in user.tensors().values() for t in kind)
    tables = sum(cache.page_table_BP.nbytes + cache.counts_B.nbytes for cache in caches)
    tables += manager.page_table_LBP.nbytes + manager.counts_LB.nbytes
    assert held == pool.bytes_allocated + tables + LAYOUT.page_bytes
    assert pool.pages_taken == sum(-(-n // PAGE) for row in expected for n in row)
    for cache in caches:
        cache.select(torch.tensor([], dtype=torch.int64))
    assert pool.bytes_allocated == 0


def test_tables_stay_where_a_graph_has_them() -> None:
    device = start([20, 3, 9], batch=5)
    manager = device.manager
    addresses = (manager.page_table_LBP.data_ptr(), manager.counts_LB.data_ptr())
    for change in (
        lambda: manager.select([2, 0, 2]),
        lambda: manager.free(1, 2),
        lambda: manager.place([4, 1], prefilled([6, 6], 2)[0]),
        manager.to_caches,
    ):
        change()
        manager.before_step()
        assert (manager.page_table_LBP.data_ptr(), manager.counts_LB.data_ptr()) == addresses


def test_a_sequence_returns_to_eager_decoding_and_back() -> None:
    device = start([12, 5], lag=2)
    for _ in range(30):
        device.step()
    caches = device.manager.to_caches()
    token = torch.full((2, 1, 1, 2), float(device.position))
    for layer, cache in enumerate(caches):
        both = torch.ones(2, 1, dtype=torch.bool)
        cache.append(token + layer / 4, token, both, device.position)
        for row in range(2):
            device.kept[row][layer].append(device.position)
    device.position += 1
    assert_content(caches, device.kept)
    device.manager.place([1, 0], caches)
    device.kept.reverse()
    for _ in range(30):
        device.step()
    assert_content(device.manager.to_caches(), device.kept)


def test_tables_change_at_most_every_spare_steps() -> None:
    device = start([40] * 6, layers=3, share=0.5, spare=8)
    previous, changed = device.manager.page_table_LBP.clone(), []
    for step in range(100):
        device.step()
        if not torch.equal(previous, device.manager.page_table_LBP):
            changed.append(step)
            previous = device.manager.page_table_LBP.clone()
    assert len(changed) > 3
    assert np.diff(changed).min() >= 8


def test_a_full_pool_is_used_to_the_last_slot_then_refused() -> None:
    device = start([1], layers=1, lag=10_000, share=1.0)
    device.manager.pool.limit_pages = 4
    used = len(device.kept[0][0])
    for _ in range(4 * PAGE - used):
        device.step()
    with pytest.raises(
        CachePoolFullError, match=r"needs 1 more pages .* 0 are free and 4 of at most"
    ):
        device.step()
    assert device.manager.counts().tolist() == [[4 * PAGE]]
    device.manager.pool.limit_pages = 5
    device.step()
    assert_content(device.manager.to_caches(), device.kept)


def test_growth_never_goes_beyond_the_table() -> None:
    caches, kept = prefilled([30], 1, share=1.0)
    manager = GrowthManager.from_caches(caches, max_positions=36, spare=3 * PAGE)
    device = Device(manager, LateCopier(0), seed=0, share=1.0)
    device.position, device.kept[0] = 30, kept[0]
    for _ in range(6):
        device.step()
    assert manager.page_table_LBP.shape == (1, 1, 5)
    assert manager.pool.pages_taken == 5
    assert_content(manager.to_caches(), device.kept)


def test_what_cannot_be_placed_or_selected_is_refused() -> None:
    manager = start([4, 4], batch=3).manager
    with pytest.raises(ValueError, match=r"rows \[0\] are not all idle"):
        manager.place([0], prefilled([3], 2)[0])
    with pytest.raises(ValueError, match=r"caches of \[1\] sequences for 1 rows and 2 layers"):
        manager.place([2], prefilled([3], 1)[0])
    with pytest.raises(ValueError, match="2001 tokens in a row with a table for 2000"):
        manager.place([2], prefilled([2001], 2, share=1.0)[0])
    with pytest.raises(ValueError, match=r"rows \[2\] selected; active are \[0, 1\] of 3"):
        manager.select([2])
    with pytest.raises(ValueError, match="spare must be at least 1"):
        GrowthManager(LAYOUT, 1, 1, 10, CPU, spare=0)


def read_text(lengths: Sequence[int], share: float, device: torch.device) -> list[PagedKVCache]:
    """Caches of two layers after prefill in pieces with a random ragged mask."""
    heads, size, longest = 2, 64, max(lengths)
    chance = torch.Generator().manual_seed(0)
    caches = []
    for _ in range(2):
        cache = PagedKVCache(len(lengths), heads, size, torch.empty(0, device=device))
        routed_BT = torch.rand(len(lengths), longest, generator=chance) < share
        routed_BT &= torch.arange(longest) < torch.tensor(lengths)[:, None]
        for first in range(0, longest, 1000):
            part_BT = routed_BT[:, first : first + 1000].to(device)
            kv_BTHK = torch.ones(*part_BT.shape, heads, size, device=device)
            cache.append(kv_BTHK, kv_BTHK, part_BT, first)
        caches.append(cache)
    return caches


def assert_bytes_follow_routing(device: torch.device, allocated: Callable[[], int] | None) -> None:
    before = allocated() if allocated else 0
    caches = read_text([6300, 7000, 8000], 0.35, device)
    counts = np.array([cache.counts for cache in caches])
    assert counts.min() >= 64 * caches[0].layout.page_tokens
    manager = GrowthManager.from_caches(caches, max_positions=8192)
    routed_share_bytes = 2 * 2 * 64 * 4
    for step in range(1, 81):
        manager.before_step()
        manager.counts_LB += 1
        manager.after_step()
        held = sum(t.nbytes for kind in manager.tensors().values() for t in kind)
        tables = manager.page_table_LBP.nbytes + manager.counts_LB.nbytes
        assert held == manager.pool.bytes_allocated + tables + manager.layout.page_bytes
        routed = counts.sum() + step * counts.size
        assert held <= 1.05 * routed * routed_share_bytes
        if allocated:
            assert held <= allocated() - before <= 1.05 * routed * routed_share_bytes


def test_bytes_are_within_five_percent_of_the_routed_share() -> None:
    assert_bytes_follow_routing(CPU, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocator_agrees() -> None:
    with torch.inference_mode():
        assert_bytes_follow_routing(torch.device("cuda"), torch.cuda.memory_allocated)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_slow_device_gets_its_pages_in_time() -> None:
    device = torch.device("cuda")
    caches = read_text([900, 300], 0.5, device)
    before = np.array([cache.counts for cache in caches])
    manager = GrowthManager.from_caches(caches, max_positions=2000)
    rows_LB = torch.arange(4, device=device).view(2, 2) * manager.page_table_LBP.shape[2]
    used = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(300):
            manager.before_step()
            torch.cuda._sleep(200_000)
            flat_LB = rows_LB + manager.counts_LB // manager.layout.page_tokens
            used.append(manager.page_table_LBP.view(-1)[flat_LB])
            manager.counts_LB += 1
            manager.after_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(manager.counts(), before + 300)
    assert (torch.stack(used) != manager.scratch_page).all()
    manager.select([1, 1])
    table = manager.page_table_LBP.tolist()
    caches = manager.to_caches()
    assert [cache.counts for cache in caches] == [[count[1] + 300] * 2 for count in before.tolist()]
    for cache, table_BP in zip(caches, table, strict=True):
        for row, pages in enumerate(table_BP):
            owned = cache.pages_of(row)
            assert pages[: len(owned)] == owned
    for cache in caches:
        kept = slice(0, cache.counts[0] - 300)
        packed = cache.packed()
        assert (packed.k_BNHK[:, kept] == 1).all()
        assert torch.equal(packed.positions_BN[0, kept], packed.positions_BN[1, kept])
