"""Accuracy and routing of a trained model on examples that no arm trained on.

Every arm and seed answers the same examples. Thresholds are frozen, so nothing looks at the
evaluated sequence. Letters: N examples, T tokens, P pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.model.mixer import MixerAux
from ham.report.statistics import mean
from ham.study.config import MqarConfig, Size, Task
from ham.study.data import CLASSES, NEVER, Examples, draw_examples, generator
from ham.study.model import RecallModel


@dataclass(frozen=True)
class Tally:
    """Queries of one kind.

    Attributes:
        queries: How many there are.
        right: Answered right; greedy over the whole vocabulary.
        stale: Answered with the value that was overwritten.
    """

    queries: int
    right: int
    stale: int

    @property
    def accuracy(self) -> float:
        """Share answered right."""
        return self.right / self.queries

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.queries + other.queries, self.right + other.right, self.stale + other.stale
        )


@dataclass(frozen=True)
class SizeResult:
    """What a model did with the examples of one size.

    Attributes:
        once: Queries whose key was written with one value.
        updated: Queries whose key got another value later.
        class_tokens: Tokens of each of `CLASSES`.
        cached: Share of tokens in the KV cache of a model that does not route, by what its layers
            declare; None where that is nothing.
        routed: For each routing layer, the tokens of each of `CLASSES` that its cache holds after
            the text; where every head has a cache of its own, a token counts by the share of
            caches that hold it.
        held: For each routing layer, the pairs of which it holds at least one copy, counted in the
            same way.
    """

    size: Size
    once: Tally
    updated: Tally
    class_tokens: list[float]
    cached: float | None = None
    routed: dict[int, list[float]] = field(default_factory=dict)
    held: dict[int, float] = field(default_factory=dict)

    @property
    def all(self) -> Tally:
        """Every query."""
        return self.once + self.updated

    @property
    def kv_fraction(self) -> float | None:
        """Realised share of tokens in the KV cache, mean over layers; None without a cache."""
        if not self.routed:
            return self.cached
        return mean([self.fraction(layer) for layer in self.routed])

    def fraction(self, layer: int) -> float:
        """Realised share of tokens routed."""
        return sum(self.routed[layer]) / sum(self.class_tokens)

    def kept(self, layer: int, kind: int) -> float | None:
        """Share of the tokens of one class that were routed; None without such tokens."""
        tokens = self.class_tokens[kind]
        return self.routed[layer][kind] / tokens if tokens else None

    def recall(self, layer: int) -> float:
        """Share of pairs of which the value that a query asks for was routed, in any copy.

        The short convolution brings the key beside its value, so a value position holds a pair.
        """
        return self.held[layer] / self.all.queries

    def precision(self, layer: int) -> float | None:
        """Pairs held per routed token; None if nothing was routed.

        At most 1; further copies of a pair, stale values and everything else count as waste.
        """
        routed = sum(self.routed[layer])
        return self.held[layer] / routed if routed else None


def held_out(
    config: MqarConfig, size: Size, task: Task, device: torch.device, purpose: str = "test"
) -> Examples:
    """The examples of one size; `purpose` is `test`, or `tuning` to choose a learning rate."""
    return draw_examples(
        config.evaluate.examples,
        size,
        task,
        generator(device, purpose, *task.key, str(size)),
        vocabulary_size=config.vocabulary_size,
    )


@torch.no_grad()
def evaluate_size(model: RecallModel, examples: Examples, size: Size, batch: int) -> SizeResult:
    """Answer every query; waits for the device once."""
    model.eval()
    updated_NP = examples.stale_NP != NEVER
    counts: dict[str, Tensor] = {"classes": _count_classes(examples.classes_NT)}
    for start in range(0, len(examples.tokens_NT), batch):
        part = examples.map(lambda x, start=start: x[start : start + batch])
        logits_BPC, reports = model(part)
        answered_BP = logits_BPC.argmax(dim=-1)
        right_BP, stale_BP = answered_BP == part.answers_NP, answered_BP == part.stale_NP
        updated_BP = updated_NP[start : start + batch]
        tallies = (right_BP & ~updated_BP, right_BP & updated_BP, stale_BP)
        _add(counts, "answers", torch.stack([x_BP.sum().double() for x_BP in tallies]))
        for layer, (aux, slots) in enumerate(zip(reports, model.slots, strict=True)):
            kept_BTG = kept_at_the_end(aux, slots)
            if kept_BTG is not None:
                numbers = _count_classes(part.classes_NT, kept_BTG.double().mean(-1))
                held = _held_pairs(kept_BTG, part.places_NPC)
                _add(counts, str(layer), torch.cat([numbers, held[None]]))
    counts["updated"] = updated_NP.sum().double()[None]
    found = dict(zip(counts, _to_lists(list(counts.values())), strict=True))
    classes, (right, new, stale) = found.pop("classes"), found.pop("answers")
    updated = round(found.pop("updated")[0])
    return SizeResult(
        size,
        Tally(updated_NP.numel() - updated, round(right), 0),
        Tally(updated, round(new), round(stale)),
        classes,
        declared_kv_fraction(model, size.length),
        {int(layer): numbers[:-1] for layer, numbers in found.items()},
        {int(layer): numbers[-1] for layer, numbers in found.items()},
    )


def declared_kv_fraction(model: RecallModel, length: int) -> float | None:
    """Share of `length` tokens whose keys and values the layers hold; None without a cache."""
    mixers = [block.mixer for block in model.blocks]
    held = sum(mixer.state_bytes(length, element_size=2).kv for mixer in mixers)
    whole = sum(4 * mixer.shape.width * length for mixer in mixers)
    return held / whole if held else None


def kept_at_the_end(aux: MixerAux, slots: int | None) -> Tensor | None:
    """Which tokens each of a layer's caches holds after the text; None if it does not route.

    A cache of fixed size reports every token that got in; here those count that were not evicted:
    the `slots` largest scores, of equal ones the older.

    Returns:
        Boolean `kept_BTG`, for G caches: 1, or one for each head.
    """
    routed, score = aux.routed_BTH, aux.score_BTH
    if routed is None:
        if aux.routed_BT is None:
            return None
        routed = aux.routed_BT.unsqueeze(-1)
        score = None if aux.score_BT is None else aux.score_BT.unsqueeze(-1)
    if slots is None:
        return routed
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :slots]
    return torch.zeros_like(routed).scatter(1, best, True) & routed


def _held_pairs(kept_BTG: Tensor, places_BPC: Tensor) -> Tensor:
    """Pairs of which a copy is kept, by the share of caches that hold one; float64 scalar."""
    caches = kept_BTG.shape[-1]
    index_BXG = places_BPC.flatten(1).unsqueeze(-1).expand(-1, -1, caches)
    copies_BPCG = kept_BTG.gather(1, index_BXG).unflatten(1, places_BPC.shape[1:])
    return copies_BPCG.any(dim=2).double().mean(dim=-1).sum()


def _add(counts: dict[str, Tensor], name: str, numbers: Tensor) -> None:
    counts[name] = counts[name] + numbers if name in counts else numbers


def _to_lists(parts: list[Tensor]) -> list[list[float]]:
    """The numbers of several vectors, fetched from the device at once."""
    numbers = torch.cat(parts).tolist()
    ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).tolist()
    return [numbers[start:end] for start, end in itertools.pairwise(ends)]


def _count_classes(classes_NT: Tensor, kept_NT: Tensor | None = None) -> Tensor:
    """Tokens of each class, weighted by the share of caches that keep them; float64."""
    weights_NT = 1 if kept_NT is None else kept_NT
    return torch.stack(
        [((classes_NT == kind) * weights_NT).sum().double() for kind in range(len(CLASSES))]
    )
