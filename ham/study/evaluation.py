"""Accuracy and routing of a trained model on examples that no arm trained on.

Every arm and seed answers the same examples. Thresholds are frozen, so nothing looks at the
evaluated sequence. Letters: N examples, T tokens, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.report.statistics import mean
from ham.study.config import Filler, MqarConfig, Size
from ham.study.data import CLASSES, VALUE, Examples, draw_examples, generator
from ham.study.model import RecallModel


@dataclass(frozen=True)
class SizeResult:
    """What a model did with the examples of one size.

    Attributes:
        right: Queries answered right out of `queries`; greedy over the whole vocabulary.
        class_tokens: Tokens of each of `CLASSES`.
        cached: Share of tokens in the KV cache of a model that does not route, by what its layers
            declare; None where that is nothing.
        routed: For each routing layer, the routed tokens of each of `CLASSES`; where every head has
            a cache of its own, a token counts by the share of caches that keep it.
    """

    size: Size
    right: int
    queries: int
    class_tokens: list[float]
    cached: float | None = None
    routed: dict[int, list[float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Share of queries answered right."""
        return self.right / self.queries

    @property
    def kv_fraction(self) -> float | None:
        """Realised share of tokens in the KV cache, mean over layers; None without a cache."""
        if not self.routed:
            return self.cached
        return mean([self.fraction(layer) for layer in self.routed])

    def fraction(self, layer: int) -> float:
        """Realised share of tokens routed."""
        return sum(self.routed[layer]) / sum(self.class_tokens)

    def kept(self, layer: int, kind: int = VALUE) -> float | None:
        """Share of the tokens of one class that were routed; None without such tokens.

        For values this is the share of pairs kept: the short convolution brings the key beside its
        value, so a value position holds a pair.
        """
        tokens = self.class_tokens[kind]
        return self.routed[layer][kind] / tokens if tokens else None

    def precision(self, layer: int) -> float | None:
        """Share of routed tokens that are values; None if nothing was routed."""
        routed = sum(self.routed[layer])
        return self.routed[layer][VALUE] / routed if routed else None


def held_out(
    config: MqarConfig, size: Size, filler: Filler, device: torch.device, purpose: str = "test"
) -> Examples:
    """The examples of one size; `purpose` is `test`, or `tuning` to choose a learning rate."""
    random = generator(device, purpose, filler, config.layout, str(size))
    return draw_examples(
        config.evaluate.examples,
        size,
        random,
        vocabulary_size=config.vocabulary_size,
        filler=filler,
        layout=config.layout,
    )


@torch.no_grad()
def evaluate_size(model: RecallModel, examples: Examples, size: Size, batch: int) -> SizeResult:
    """Answer every query; waits for the device once."""
    model.eval()
    right = torch.zeros((), dtype=torch.float64, device=model.device)
    routed: dict[int, Tensor] = {}
    class_tokens = _count_classes(examples.classes_NT)
    for start in range(0, len(examples.tokens_NT), batch):
        part = examples.map(lambda x, start=start: x[start : start + batch])
        logits_BPC, reports = model(part)
        right += (logits_BPC.argmax(dim=-1) == part.answers_NP).sum()
        for layer, aux in enumerate(reports):
            kept_BT = aux.kept_share_BT()
            if kept_BT is not None:
                counts = _count_classes(part.classes_NT, kept_BT)
                routed[layer] = routed.get(layer, 0) + counts
    numbers = torch.cat([right[None], class_tokens, *routed.values()]).tolist()
    per_class = len(CLASSES)
    lists = [numbers[i : i + per_class] for i in range(1, len(numbers), per_class)]
    return SizeResult(
        size,
        round(numbers[0]),
        examples.answers_NP.numel(),
        lists[0],
        declared_kv_fraction(model, size.length),
        dict(zip(routed, lists[1:], strict=True)),
    )


def declared_kv_fraction(model: RecallModel, length: int) -> float | None:
    """Share of `length` tokens whose keys and values the layers hold; None without a cache."""
    mixers = [block.mixer for block in model.blocks]
    held = sum(mixer.state_bytes(length, element_size=2).kv for mixer in mixers)
    whole = sum(4 * mixer.shape.width * length for mixer in mixers)
    return held / whole if held else None


def _count_classes(classes_NT: Tensor, kept_NT: Tensor | None = None) -> Tensor:
    """Tokens of each class, weighted by the share of caches that keep them; float64."""
    weights_NT = 1 if kept_NT is None else kept_NT.double()
    return torch.stack(
        [((classes_NT == kind) * weights_NT).sum().double() for kind in range(len(CLASSES))]
    )
