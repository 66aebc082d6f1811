"""Examples of multi-query associative recall as tokens.

Written from the description of Zoology (Arora et al. 2023, arXiv 2312.04927): P distinct keys, each
followed by its value, and later every key once more; at that position its value is to be
predicted, and the value itself never follows. Keys are tokens 1..V/2 - 1, values V/2..V - 1.

Layout `prefix` is Zoology's: the pairs stand first, the gap before a query, in units of two tokens,
is drawn without replacement with weights `x ** (POWER - 1)`, so that most queries come early.
Layout `scattered` puts the pairs at random even positions of the first half and the queries at
random even positions of the second, filler between them.

Filler `blank` is token 0; filler `random` is any token, keys and values included.

Letters: N examples, T tokens, P pairs, S steps, B batch. Examples are drawn on the device; the same
seed gives the same examples on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.files import stable_hash
from ham.study.config import Filler, Layout, Size

POWER = 0.01
BLANK = 0
CLASSES = ("filler", "key", "value", "query")
FILLER, KEY, VALUE, QUERY = range(4)


@dataclass(frozen=True)
class Examples:
    """Examples of one size; a leading axis of steps in a training set.

    Attributes:
        tokens_NT: int64.
        classes_NT: int8 index into `CLASSES`.
        queries_NP: int64 positions of the queries, in the order of their pairs.
        answers_NP: int64 values that the queries ask for.
    """

    tokens_NT: Tensor
    classes_NT: Tensor
    queries_NP: Tensor
    answers_NP: Tensor

    @property
    def wanted_NT(self) -> Tensor:
        """Boolean; the value positions, which an oracle would keep."""
        return self.classes_NT == VALUE

    def each(self) -> list[Examples]:
        """One for each entry of the leading axis."""
        return [self.map(lambda x, i=i: x[i]) for i in range(len(self.tokens_NT))]

    def map(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The same examples with `change` applied to every tensor."""
        return Examples(
            change(self.tokens_NT),
            change(self.classes_NT),
            change(self.queries_NP),
            change(self.answers_NP),
        )


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator on `device` whose seed is a hash of `key`."""
    made = torch.Generator(device)
    made.manual_seed(int(stable_hash([str(part) for part in key]), 16))
    return made


def draw_examples(
    count: int,
    size: Size,
    random: torch.Generator,
    *,
    vocabulary_size: int,
    filler: Filler,
    layout: Layout = "prefix",
) -> Examples:
    """Draw `count` examples on the generator's device.

    Raises:
        ConfigError: If there are fewer keys than pairs.
    """
    half = vocabulary_size // 2
    if size.pairs >= half:
        raise ConfigError(
            f"{size.pairs} pairs need more than {vocabulary_size} tokens; legal: up to {half - 1}"
        )
    device = random.device
    keys_NP = 1 + distinct(count, size.pairs, half - 1, random)
    values_NP = half + distinct(count, size.pairs, vocabulary_size - half, random)
    starts_NP, queries_NP = _places(count, size, layout, random)

    shape = (count, size.length)
    tokens_NT = torch.full(shape, BLANK, dtype=torch.int64, device=device)
    if filler == "random":
        tokens_NT.random_(0, vocabulary_size, generator=random)
    classes_NT = torch.full(shape, FILLER, dtype=torch.int8, device=device)
    for places_NP, content_NP, kind in (
        (starts_NP, keys_NP, KEY),
        (starts_NP + 1, values_NP, VALUE),
        (queries_NP, keys_NP, QUERY),
    ):
        tokens_NT.scatter_(1, places_NP, content_NP)
        classes_NT.scatter_(1, places_NP, kind)
    return Examples(tokens_NT, classes_NT, queries_NP, values_NP)


def distinct(count: int, drawn: int, choices: int, random: torch.Generator) -> Tensor:
    """`count` rows of `drawn` different numbers below `choices`, every such row equally likely.

    Rows with a repeated number are drawn again as a whole, which leaves the others uniform.
    """
    rows = torch.randint(choices, (count, drawn), generator=random, device=random.device)
    while True:
        ordered = rows.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[:, 0]
        if not len(repeated):
            return rows
        rows[repeated] = torch.randint(
            choices, (len(repeated), drawn), generator=random, device=random.device
        )


def weighted_order(count: int, drawn: int, weights_X: Tensor, random: torch.Generator) -> Tensor:
    """`count` rows of `drawn` indices without replacement, drawn one after another by weight.

    Adding Gumbel noise to log weights and sorting does that (Yellott 1977; Kool et al. 2019,
    arXiv 1903.06059).
    """
    uniform = torch.rand(count, len(weights_X), generator=random, device=random.device)
    noise = -(-uniform.clamp(min=1e-20).log()).log()
    return (weights_X.log() + noise).topk(drawn, dim=1).indices


def _places(
    count: int, size: Size, layout: Layout, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Positions of the keys and of the queries, `[N, P]` each, all even."""
    device, pairs = random.device, size.pairs
    if layout == "scattered":
        slots = size.length // 4
        even_X = torch.ones(slots, device=device)
        first = weighted_order(count, pairs, even_X, random)
        second = slots + weighted_order(count, pairs, even_X, random)
        return 2 * first, 2 * second
    starts_P = 2 * torch.arange(pairs, device=device)
    slots = (size.length - 2 * pairs) // 2
    weights_X = torch.arange(1, slots + 1, device=device, dtype=torch.float32) ** (POWER - 1)
    gaps_NP = weighted_order(count, pairs, weights_X, random)
    return starts_P.expand(count, -1).contiguous(), 2 * pairs + 2 * gaps_NP


def mixture_schedule(sizes: list[Size], steps: int, seed: int) -> list[int]:
    """Which size each training step uses, as indices.

    Steps go in cycles, in which every size comes as often as its weight says, in an order drawn
    anew for each cycle.
    """
    cycle = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size.weight)])
    random = generator(torch.device("cpu"), "schedule", seed)
    cycles = -(-steps // len(cycle))
    order = [cycle[torch.randperm(len(cycle), generator=random)] for _ in range(cycles)]
    return torch.cat(order)[:steps].tolist()
