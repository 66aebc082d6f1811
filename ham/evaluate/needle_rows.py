"""Result rows of needle questions: shares of right answers, and what the router did with needles.

A needle counts as routed in a layer if at least half of the tokens of its value entered that
layer's cache. Where every head decides alone, a token counts by the share of heads that keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ham.evaluate.part import Fields
from ham.evaluate.scoring import RowScore
from ham.report.statistics import wilson_interval
from ham.ruler.sample import RulerSample
from ham.ruler.scorers import clean_prediction, found, string_match_all, string_match_part

EXPERIMENT = "needle"
ROUTED_SHARE = 0.5


@dataclass
class Asked:
    """A sample with what a model made of it.

    Attributes:
        sample: The question.
        score: Its teacher-forced scores.
        generated: Text that followed the prompt, or None.
    """

    sample: RulerSample
    score: RowScore
    generated: str | None = None

    @property
    def right(self) -> list[bool]:
        """Whether greedy decoding gives each answer."""
        return [self.score.span(start, end)[1] for start, end in self.sample.answers]

    @property
    def loss_nats(self) -> float:
        """Mean negative log-likelihood of the answers' tokens."""
        tokens = sum(end - start for start, end in self.sample.answers)
        return -sum(self.score.span(*answer)[0] for answer in self.sample.answers) / tokens

    def layers_with_needle(self) -> list[int]:
        """In how many layers each needle was routed; the model must route."""
        assert self.score.routed is not None
        shares = [self.score.routed[:, start:end].mean(axis=1) for start, end in self.sample.values]
        return [int((share >= ROUTED_SHARE).sum()) for share in shares]

    def needle_shares(self) -> np.ndarray:
        """Share of the needles' tokens that was routed, by layer."""
        assert self.score.routed is not None
        tokens = np.concatenate([np.arange(*needle) for needle in self.sample.needles])
        return self.score.routed[:, tokens].mean(axis=1)


def share_row(hits: int, n: int, metric: str, common: Fields) -> Fields:
    """A row of a share with Wilson's interval."""
    share = wilson_interval(hits, n)
    return {
        **common,
        "metric": metric,
        "value": share.value,
        "n": share.n,
        "low": share.low,
        "high": share.high,
        "interval": share.interval,
    }


def left_out_row(common: Fields, metric: str, count: int, asked: int) -> Fields:
    """How many of the samples were beyond the model's range."""
    return {**common, "metric": metric, "value": count, "n": asked}


def too_long_rows(places: Sequence[Fields], metric: str, error: str) -> list[Fields]:
    """Error rows at these coordinates."""
    return [{**place, "metric": metric, "value": None, "error": error} for place in places]


def answer_rows(asked: Sequence[Asked], common: Fields) -> list[Fields]:
    """Teacher-forced: samples with all answers right, and the loss of the answers."""
    hits = sum(all(one.right) for one in asked)
    losses = [one.loss_nats for one in asked]
    loss = {"metric": "answer_loss_nats", "value": float(np.mean(losses)), "n": len(asked)}
    return [share_row(hits, len(asked), "accuracy", common), {**common, **loss}]


def generation_rows(asked: Sequence[Asked], common: Fields) -> list[Fields]:
    """RULER's scores of the generated texts; nothing where there are none.

    `string_match_all` has one observation an answer, `string_match_part` one a sample. The latter
    is left out where there is one answer, as the two are equal then.
    """
    done = [one for one in asked if one.generated is not None]
    if not done:
        return []
    texts = [clean_prediction(one.generated or "") for one in done]
    references = [one.sample.references for one in done]
    answers = len(references[0])
    found_all = round(string_match_all(texts, references) * len(done) * answers)
    rows = [share_row(found_all, len(done) * answers, "string_match_all", common)]
    if answers > 1:
        found_any = round(string_match_part(texts, references) * len(done))
        rows.append(share_row(found_any, len(done), "string_match_part", common))
    return rows


def kept_rows(asked: Sequence[Asked], common: Fields, layers: Sequence[int]) -> list[Fields]:
    """Share of the needles' tokens that was routed: mean over layers, then each layer.

    Layers have a metric of their own, so that whoever looks for `kept_fraction` finds one row.
    """
    if not layers:
        return []
    per_layer = np.mean([one.needle_shares() for one in asked], axis=0)
    row = {**common, "metric": "kept_fraction", "n": len(asked)}
    rows = [{**row, "value": float(per_layer.mean())}]
    for layer, share in zip(layers, per_layer, strict=True):
        labels = {**common["labels"], "layer": layer}
        rows.append(
            {**row, "metric": "kept_fraction_layer", "value": float(share), "labels": labels}
        )
    return rows


def routed_rows(asked: Sequence[Asked], common: Fields) -> list[Fields]:
    """By needle: share routed in at least k layers, and share answered among those.

    The label `min_layers` is k = 0, 1, ..., all routing layers. Answered is teacher-forced
    (`accuracy_if_routed`, and `accuracy_if_not_routed` for the needles routed in fewer layers) and,
    where texts were generated, found in the text (`string_match_if_routed`). Where there is no
    such needle the row is missing, as there is nothing to take a share of; `needles_routed` says
    how many there are.
    """
    if not asked or asked[0].score.routed is None:
        return []
    layers = np.array([count for one in asked for count in one.layers_with_needle()])
    right = np.array([hit for one in asked for hit in one.right])
    generated = np.array([one.generated is not None for one in asked for _ in one.right])
    matched = np.array([hit for one in asked for hit in _matched(one)])
    rows = []
    for least in range(len(asked[0].score.routed) + 1):
        chosen = layers >= least
        here = {**common, "labels": {**common["labels"], "min_layers": least}}
        rows.append(share_row(int(chosen.sum()), len(chosen), "needles_routed", here))
        for metric, hits, able in (
            ("accuracy_if_routed", right, chosen),
            ("accuracy_if_not_routed", right, ~chosen),
            ("string_match_if_routed", matched, chosen & generated),
        ):
            if able.any():
                rows.append(share_row(int(hits[able].sum()), int(able.sum()), metric, here))
    return rows


def _matched(one: Asked) -> list[bool]:
    text = clean_prediction(one.generated or "")
    return [found(text, reference) for reference in one.sample.references]
