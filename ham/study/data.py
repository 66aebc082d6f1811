"""Examples of multi-query associative recall as tokens.

Written from the description of Zoology (Arora et al. 2023, arXiv 2312.04927), with its numbers: P
distinct keys, each followed by its value, and later every key once more; at that position its value
is to be predicted, and the value itself never follows. Keys are tokens 1..V/2 - 1, values
V/2..V - 1.

Layout `prefix` is Zoology's: the pairs stand first, the gap before a query, in units of two tokens,
is drawn without replacement with weights `x ** (POWER - 1)`, so that most queries come early.
Layout `scattered` puts the pairs at random even positions of the first half and the queries at
random even positions of the second, filler between them.

Filler `blank` is token 0; filler `random` is any token, keys and values included.

Variants, which change what is written before the queries:

- repeats (`passes`): the list of pairs is read out several times in the same order (JRT, Arora et
  al. 2024, arXiv 2407.05483); later copies can be predicted.
- overwrites (`updates`): after all pairs, `updates` of the keys, in random order, come again with
  another value, and the last value is the right answer ("forgetting" in Zoology's code). There the
  new value is drawn to differ from another key's first value by position in the list; here it
  differs from the first value of its own key.

Letters: N examples, T tokens, P pairs, W pairs written, C copies of a pair, S steps, B batch,
M rows with repeats, X numbers that are drawn again.
Examples are drawn on the device; the same seed gives the same examples on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.files import stable_hash
from ham.study.config import Size, Task

POWER = 0.01
BLANK = 0
CLASSES = ("filler", "key", "value", "query", "repeat", "stale")
FILLER, KEY, VALUE, QUERY, REPEAT, STALE = range(6)
NEVER = -1
_MANY = 1 << 62


class _Tensors:
    """Base of dataclasses that hold tensors alone."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with `change` applied to every tensor."""
        return type(self)(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Batch(_Tensors):
    """What training reads of `Examples`; axes of runs and steps may stand in front."""

    tokens_NT: Tensor
    wanted_NT: Tensor
    queries_NP: Tensor
    answers_NP: Tensor


@dataclass(frozen=True)
class Examples(_Tensors):
    """Examples of one size; a leading axis of steps in a training set.

    Attributes:
        tokens_NT: int64.
        classes_NT: int8 index into `CLASSES`: `value` is the first place of the value that a query
            asks for, `repeat` its later copies, `stale` a value that was overwritten; `key` is
            every key of a pair.
        queries_NP: int64 positions of the queries, in the order of their pairs.
        answers_NP: int64 values that the queries ask for.
        stale_NP: int64 values that they replaced; `NEVER` where the key was written once.
        places_NPC: int64 positions of the values that answer a query, one for each copy.
    """

    tokens_NT: Tensor
    classes_NT: Tensor
    queries_NP: Tensor
    answers_NP: Tensor
    stale_NP: Tensor
    places_NPC: Tensor

    @property
    def wanted_NT(self) -> Tensor:
        """Boolean; one value position for each pair, which an oracle would keep."""
        return self.classes_NT == VALUE

    @property
    def batch(self) -> Batch:
        """What training reads of them."""
        return Batch(self.tokens_NT, self.wanted_NT, self.queries_NP, self.answers_NP)


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator on `device` whose seed is a hash of `key`."""
    made = torch.Generator(device)
    made.manual_seed(int(stable_hash([str(part) for part in key]), 16))
    return made


def draw_examples(
    count: int, size: Size, task: Task, random: torch.Generator, *, vocabulary_size: int
) -> Examples:
    """Draw `count` examples on the generator's device.

    Raises:
        ConfigError: If the size does not fit the task, or there are fewer keys than pairs.
    """
    half = vocabulary_size // 2
    if size.pairs >= half:
        raise ConfigError(
            f"{size.pairs} pairs need more than {vocabulary_size} tokens; legal: up to {half - 1}"
        )
    if (fault := task.fault(size)) is not None:
        raise ConfigError(fault)
    keys_NP = 1 + distinct(count, size.pairs, half - 1, random)
    values_NP = half + distinct(count, size.pairs, vocabulary_size - half, random)
    starts_NW, queries_NP = _places(count, size, task, random)
    story = _write_pairs(values_NP, starts_NW + 1, task, vocabulary_size, random)

    shape = (count, size.length)
    tokens_NT = torch.full(shape, BLANK, dtype=torch.int64, device=random.device)
    if task.filler == "random":
        tokens_NT.random_(0, vocabulary_size, generator=random)
    classes_NT = torch.full(shape, FILLER, dtype=torch.int8, device=random.device)
    for places, content, kind in (
        (starts_NW, keys_NP.gather(1, story.pair_NW), KEY),
        (starts_NW + 1, story.value_NW, story.class_NW),
        (queries_NP, keys_NP, QUERY),
    ):
        tokens_NT.scatter_(1, places, content)
        classes_NT.scatter_(1, places, kind)
    answers_NP = story.answers_NP
    stale_NP = values_NP.masked_fill(values_NP == answers_NP, NEVER)
    return Examples(tokens_NT, classes_NT, queries_NP, answers_NP, stale_NP, story.places_NPC)


@dataclass(frozen=True)
class _Story:
    """What is written before the queries, in order: which pair, its value, the class of that.

    `answers_NP` and `places_NPC` are those of `Examples`.
    """

    pair_NW: Tensor
    value_NW: Tensor
    class_NW: Tensor
    answers_NP: Tensor
    places_NPC: Tensor


def _write_pairs(
    values_NP: Tensor, places_NW: Tensor, task: Task, vocabulary_size: int, random: torch.Generator
) -> _Story:
    """Decide what is written at the value positions `places_NW`, given the pairs' first values."""
    (count, pairs), device = values_NP.shape, random.device
    pair_NW = torch.arange(pairs, device=device).expand(count, -1).repeat(1, task.passes)
    class_NW = torch.full_like(pair_NW, REPEAT, dtype=torch.int8)
    class_NW[:, :pairs] = VALUE
    if not task.updates:
        places_NPC = places_NW.unflatten(1, (task.passes, pairs)).transpose(1, 2)
        value_NW = values_NP.gather(1, pair_NW)
        return _Story(pair_NW, value_NW, class_NW, values_NP, places_NPC.contiguous())

    updated_NU = weighted_order(count, task.updates, torch.ones(pairs, device=device), random)
    # Any other value is equally likely.
    first = vocabulary_size // 2
    choices = vocabulary_size - first
    step_NU = torch.randint(1, choices, updated_NU.shape, generator=random, device=device)
    new_NU = first + (values_NP.gather(1, updated_NU) - first + step_NU) % choices
    return _Story(
        torch.cat([pair_NW, updated_NU], dim=1),
        torch.cat([values_NP, new_NU], dim=1),
        torch.cat(
            [class_NW.scatter(1, updated_NU, STALE), torch.full_like(new_NU, VALUE).to(torch.int8)],
            dim=1,
        ),
        values_NP.scatter(1, updated_NU, new_NU),
        places_NW[:, :pairs].scatter(1, updated_NU, places_NW[:, pairs:]).unsqueeze(-1),
    )


def distinct(count: int, drawn: int, choices: int, random: torch.Generator) -> Tensor:
    """`count` rows of `drawn` different numbers below `choices`, every such row equally likely.

    Of equal numbers in a row all but the first are drawn again, until none are equal. Which are
    drawn again follows from which are equal and where, never from what they are. So renaming the
    choices changes no probability, and as some renaming turns any row of different numbers into any
    other, all of these have the same.

    Args:
        count: Rows N.
        drawn: Numbers P in a row, at most `choices`.
        choices: Numbers to draw from: 0..choices - 1.
        random: Where the rows are drawn and stay.

    Returns:
        int64 `[N, P]`.
    """
    if 2 * drawn > choices:
        # The last free numbers would take long to hit. All orders of different keys are as likely.
        return distinct(count, choices, _MANY, random).argsort(dim=1)[:, :drawn].contiguous()
    rows_NP = _integers(choices, (count, drawn), random)
    left_M = torch.arange(count, device=random.device)
    while True:
        ordered_MP, places_MP = rows_NP[left_M].sort(dim=1, stable=True)
        row_X, rank_X = (ordered_MP[:, 1:] == ordered_MP[:, :-1]).nonzero(as_tuple=True)
        if not len(row_X):
            return rows_NP
        again_X = left_M[row_X], places_MP[row_X, rank_X + 1]
        rows_NP[again_X] = _integers(choices, (len(row_X),), random)
        left_M = again_X[0].unique_consecutive()


def _integers(choices: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randint(choices, shape, generator=random, device=random.device)


def weighted_order(count: int, drawn: int, weights_X: Tensor, random: torch.Generator) -> Tensor:
    """`count` rows of `drawn` indices without replacement, drawn one after another by weight.

    Adding Gumbel noise to log weights and sorting does that (Yellott 1977; Kool et al. 2019,
    arXiv 1903.06059).
    """
    uniform = torch.rand(count, len(weights_X), generator=random, device=random.device)
    noise = -(-uniform.clamp(min=1e-20).log()).log()
    return (weights_X.log() + noise).topk(drawn, dim=1).indices


def _places(count: int, size: Size, task: Task, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of the keys in the order of writing, `[N, W]`, and of the queries, `[N, P]`.

    All are even.
    """
    device, written = random.device, task.written(size)
    if task.layout == "scattered":
        slots = size.length // 4
        even_X = torch.ones(slots, device=device)
        first_NW = weighted_order(count, written, even_X, random).sort(dim=1).values
        second_NP = slots + weighted_order(count, size.pairs, even_X, random)
        return 2 * first_NW, 2 * second_NP
    starts_W = 2 * torch.arange(written, device=device)
    slots = (size.length - 2 * written) // 2
    weights_X = torch.arange(1, slots + 1, device=device, dtype=torch.float32) ** (POWER - 1)
    gaps_NP = weighted_order(count, size.pairs, weights_X, random)
    return starts_W.expand(count, -1).contiguous(), 2 * written + 2 * gaps_NP


def mixture_schedule(sizes: list[Size], steps: int) -> list[int]:
    """Which size each training step uses, as indices.

    Steps go in cycles, in which every size comes as often as its weight says, in an order drawn
    anew for each cycle. It is the same for every seed, so that runs of several seeds can take
    their steps together.
    """
    cycle = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size.weight)])
    random = generator(torch.device("cpu"), "schedule")
    cycles = -(-steps // len(cycle))
    order = [cycle[torch.randperm(len(cycle), generator=random)] for _ in range(cycles)]
    return torch.cat(order)[:steps].tolist()
