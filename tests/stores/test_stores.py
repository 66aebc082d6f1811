"""Every rule of visibility against its definition, written out token by token in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from ham.stores import StoreOptions, TokenStore, make_store

BATCH, TIME, HEADS, SIZE = 2, 37, 2, 4
BUDGETS = {
    "threshold": {},
    "bounded": {"budget": "bounded", "slots": 5},
    "bounded-1": {"budget": "bounded", "slots": 1},
    "chunk": {"budget": "chunk_topk", "chunk": 8, "top_k": 3},
    "chunk-full": {"budget": "chunk_topk", "chunk": 5, "top_k": 5},
}
SWITCHES = {
    "plain": {},
    "self": {"self_visible": True},
    "window": {"window": 6},
    "wide": {"window": 50},
    "sink": {"sink": "learned"},
    "window+sink": {"window": 3, "sink": "zero"},
}
RULES = [
    pytest.param({**budget, **switch}, per_head, id=f"{name}-{of}-{'heads' if per_head else 'all'}")
    for (name, budget), (of, switch), per_head in product(
        BUDGETS.items(), SWITCHES.items(), (False, True)
    )
]
SOME_RULES = [rule for rule in RULES if "-1-" not in rule.id and "wide" not in rule.id]
CUTS = [(1,) * TIME, (7, 1, 1, 28), (16, 21), (TIME,)]


class Text:
    """Random queries, keys, values and scores with many ties."""

    def __init__(self, per_head: bool, time: int = TIME, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shape = (BATCH, time, HEADS, SIZE)
        self.q, self.k, self.v = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        score_shape = (BATCH, time, HEADS) if per_head else (BATCH, time)
        levels = torch.randint(0, 6, score_shape, generator=generator)
        self.score = levels.double() / 4
        self.routed = levels >= 4

    def part(self, piece: slice) -> list[Tensor]:
        return [x[:, piece] for x in (self.q, self.k, self.v, self.score, self.routed)]

    def rows(self, index: Tensor) -> Text:
        chosen = object.__new__(Text)
        chosen.__dict__ = {name: tensor[index] for name, tensor in self.__dict__.items()}
        return chosen


def build(options: dict, per_head: bool, seed: int = 0) -> TokenStore:
    store = make_store(StoreOptions(**options), HEADS, SIZE, per_head, "torch").double()
    if options.get("sink") == "learned":
        torch.manual_seed(seed)
        torch.nn.init.normal_(store.sink_HK)
    return store


def kept_at(options: dict, score: list[float], routed: list[bool], t: int) -> set[int]:
    """The cache after token t of one sequence and head, by its definition."""
    budget = options.get("budget", "threshold")
    if budget == "threshold":
        return {j for j in range(t + 1) if routed[j]}
    if budget == "bounded":
        return set(sorted(range(t + 1), key=lambda j: (-score[j], j))[: options["slots"]])
    size, kept = options["chunk"], set()
    for first in range(0, (t + 1) // size * size, size):
        chunk = range(first, first + size)
        kept |= set(sorted(chunk, key=lambda j: (-score[j], j))[: options["top_k"]])
    return kept


def by_definition(options: dict, store: TokenStore, text: Text, path: Tensor | None = None):
    """Outputs, and the mask of tokens that entered the cache, one query at a time."""
    window = max(options.get("window", 0), int(options.get("self_visible", False)))
    chunked = options.get("budget") == "chunk_topk"
    time = text.q.shape[1]
    o, kept = torch.zeros_like(text.v), torch.zeros(BATCH, time, HEADS, dtype=torch.bool)
    rows = []
    for b, h in product(range(BATCH), range(HEADS)):
        score, routed = (x[b, :, h] if x.ndim == 3 else x[b] for x in (text.score, text.routed))
        factor = 0.0 if path is None else (path[b, :, h] if path.ndim == 3 else path[b])
        v_path = text.v[b, :, h] * (1 + factor - torch.as_tensor(factor).detach())[..., None]
        out = []
        for t in range(time):
            cache = kept_at(options, score.tolist(), routed.tolist(), t)
            new = (
                {j for j in cache if j // options["chunk"] == t // options["chunk"]}
                if (chunked)
                else {t} & cache
            )
            kept[b, list(new), h] = True
            # A chunk's tokens are read from the next chunk on.
            read = cache - new if chunked else cache
            near = set(range(max(t - window + 1, 0), t + 1))
            far = sorted(read - near)
            keys = [text.k[b, far, h], text.k[b, sorted(near), h]]
            values = [v_path[far], text.v[b, sorted(near), h]]
            if store.sink_HK is not None:
                keys.append(store.sink_HK[h][None])
                values.append(torch.zeros(1, SIZE, dtype=torch.float64))
            keys, values = torch.cat(keys), torch.cat(values)
            weights = (keys @ text.q[b, t, h] * SIZE**-0.5).softmax(0)
            out.append(weights @ values)
        rows.append(torch.stack(out))
    o = torch.stack(rows).unflatten(0, (BATCH, HEADS)).transpose(1, 2)
    return o, kept if text.score.ndim == 3 else kept[:, :, 0]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch) -> None:
    """Blocks of 8 queries, so that short texts need several."""
    for module in ("bounded", "chunk_topk"):
        monkeypatch.setattr(f"ham.stores.{module}.QUERY_BLOCK", 8)


@pytest.mark.parametrize(("options", "per_head"), RULES)
def test_the_parallel_form_is_the_definition_with_its_gradients(options, per_head) -> None:
    store, text = build(options, per_head), Text(per_head)
    path = torch.rand_like(text.score)
    leaves = [text.q, text.k, text.v, path, *store.parameters()]
    gradients, results = [], []
    for function in (
        lambda: by_definition(options, store, text, path),
        lambda: store.attend(*text.part(slice(None)), path),
    ):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        results.append(function())
        (results[-1][0] * torch.linspace(-1, 1, SIZE, dtype=torch.float64)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    (expected, kept), (found, found_kept) = results
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(found_kept, kept)
    for found_grad, grad in zip(gradients[1], gradients[0], strict=True):
        grad = torch.zeros_like(found_grad) if grad is None else grad
        torch.testing.assert_close(found_grad, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts)}-pieces")
@pytest.mark.parametrize(("options", "per_head"), RULES)
def test_any_division_gives_the_parallel_form(options, per_head, cuts) -> None:
    store, text = build(options, per_head), Text(per_head)
    expected, kept = store.attend(*text.part(slice(None)))
    cache = store.init_cache(BATCH, torch.device("cpu"), torch.float64)
    outputs, masks, start = [], [], 0
    for size in cuts:
        o, mask = store.attend_cached(*text.part(slice(start, start + size)), cache, start)
        outputs.append(o)
        masks.append(mask)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-12)
    found = torch.cat(masks, 1)
    if options.get("budget") == "chunk_topk":
        # What ends in a later call is not marked; what a call marks is right.
        assert not (found & ~kept).any()
        kept = kept if len(cuts) == 1 else found
    assert torch.equal(found, kept)


@pytest.mark.parametrize(("options", "per_head"), SOME_RULES)
def test_a_batch_may_be_reordered(options, per_head) -> None:
    store, text = build(options, per_head), Text(per_head)
    order = torch.tensor([1, 0, 1])
    expected, _ = store.attend(*text.rows(order).part(slice(None)))
    cache = store.init_cache(BATCH, torch.device("cpu"), torch.float64)
    store.attend_cached(*text.part(slice(0, 21)), cache, 0)
    cache.select(order)
    chosen = text.rows(order)
    parts = [slice(21, 22), slice(22, 33), slice(33, TIME)]
    found = [store.attend_cached(*chosen.part(part), cache, part.start)[0] for part in parts]
    torch.testing.assert_close(torch.cat(found, 1), expected[:, 21:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 5), (1, 8)], ids=str)
@pytest.mark.parametrize(
    ("options", "per_head"), [rule for rule in SOME_RULES if rule.values[0].get("budget")]
)
def test_sequences_at_different_positions_share_a_batch(options, per_head, pieces) -> None:
    store = build(options, per_head)
    texts, reads = [Text(per_head, seed=seed) for seed in (3, 4)], (20, 11)
    caches, expected, new = [], [], []
    for text, read in zip(texts, reads, strict=True):
        cache = store.init_cache(BATCH, torch.device("cpu"), torch.float64)
        store.attend_cached(*text.part(slice(0, read)), cache, 0)
        caches.append(cache)
        expected.append(store.attend(*text.part(slice(0, read + 9)))[0][:, read:])
        new.append(text.part(slice(read, read + 9)))
    joined = type(caches[0]).join(caches)
    position_B = torch.tensor(reads).repeat_interleave(BATCH)
    found, start = [], 0
    for size in pieces:
        part = [torch.cat(pair)[:, start : start + size] for pair in zip(*new, strict=True)]
        found.append(store.attend_cached(*part, joined, position_B + start)[0])
        start += size
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changed", [0, 13, 24])
@pytest.mark.parametrize(("options", "per_head"), SOME_RULES)
def test_nothing_before_a_changed_token_moves(options, per_head, changed) -> None:
    store, text, other = build(options, per_head), Text(per_head), Text(per_head)
    for tensor in (other.q, other.k, other.v, other.score):
        tensor[:, changed] += 3.0
    other.routed[:, changed] ^= True
    before, after = (store.attend(*each.part(slice(None))) for each in (text, other))
    # Not to the last bit: how many keys are packed decides the order of the sums.
    torch.testing.assert_close(
        before[0][:, :changed], after[0][:, :changed], rtol=1e-13, atol=1e-14
    )
    assert not torch.equal(before[0], after[0])
    # A chunk is chosen when it ends, so its choice is that of its last token.
    first = changed // options["chunk"] * options["chunk"] if "chunk" in options else changed
    assert torch.equal(before[1][:, :first], after[1][:, :first])


@pytest.mark.parametrize("sink", ["none", "learned"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_an_empty_memory_gives_exactly_zero(budget, per_head, sink) -> None:
    store, text = build({**BUDGETS[budget], "sink": sink}, per_head), Text(per_head)
    text.score.fill_(-torch.inf)
    text.score[:, ::2] = torch.nan
    text.routed.fill_(False)
    leaves = [x.requires_grad_() for x in (text.q, text.k, text.v)]
    o, kept = store.attend(*text.part(slice(None)))
    o.sum().backward()
    assert not o.any()
    assert not kept.any()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    cache = store.init_cache(BATCH, torch.device("cpu"), torch.float64)
    for start, stop in ((0, 9), (9, 10), (10, 30)):
        o, kept = store.attend_cached(*text.part(slice(start, stop)), cache, start)
        assert not o.any()
        assert not kept.any()
    assert not cache.kept_B().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("options", "per_head"), SOME_RULES)
def test_declared_bytes_are_the_allocated_ones(options, per_head, dtype) -> None:
    store = build(options, per_head).to(dtype)
    for time in (1, 8, 31, 32, 33, 100):
        q, k, v, score, routed = Text(per_head, time).rows(torch.tensor([0])).part(slice(None))
        cache = store.init_cache(1, torch.device("cpu"), dtype)
        store.attend_cached(q.to(dtype), k.to(dtype), v.to(dtype), score, routed, cache, 0)
        share = routed.double().mean(1)[0].tolist()
        declared = store.state_bytes(time, share, torch.finfo(dtype).bits // 8)
        held = {
            kind: sum(x.numel() * x.element_size() for x in tensors)
            for kind, tensors in cache.tensors().items()
        }
        assert declared.allocated == sum(held.values())
        assert declared.used <= declared.allocated
        assert declared.kv <= held["kv"]
        assert declared.positions <= held["positions"]
        assert declared.page_table == held.get("page_table", 0)


@pytest.mark.parametrize("name", BUDGETS)
def test_kept_tokens_are_counted(name) -> None:
    for per_head in (False, True):
        store, text = build(BUDGETS[name], per_head), Text(per_head)
        cache = store.init_cache(BATCH, torch.device("cpu"), torch.float64)
        store.attend_cached(*text.part(slice(None)), cache, 0)
        for b in range(BATCH):
            sizes = [
                len(
                    kept_at(
                        BUDGETS[name],
                        *(
                            (x[b, :, h] if per_head else x[b]).tolist()
                            for x in (text.score, text.routed)
                        ),
                        TIME - 1,
                    )
                )
                for h in range(HEADS)
            ]
            assert float(cache.kept_B()[b]) == sum(sizes) / HEADS


def test_flops_count_the_visible_pairs() -> None:
    pair = 2 * HEADS * 2 * SIZE
    cases = [
        ({}, 0.5, 37 * 38 / 4),
        ({"window": 6}, 0.5, 31 * 32 / 4 + 6 * 37 - 15),
        ({"sink": "zero"}, 1.0, 37 * 38 / 2 + 37),
        (BUDGETS["bounded"], 1.0, 5 * 37 - 10),
        (BUDGETS["chunk"], 1.0, 3 * (8 * (0 + 1 + 2 + 3) + 5 * 4)),
    ]
    for options, fraction, pairs in cases:
        store = build(options, False)
        assert store.forward_flops(TIME, fraction) == pair * pairs
        # The steps of decoding add up to the parallel form.
        steps = sum(store.decode_flops(position, fraction) for position in range(TIME))
        assert steps == pytest.approx(pair * pairs)
