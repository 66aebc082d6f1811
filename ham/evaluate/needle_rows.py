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
from ham.report.statistics import clustered_wilson_interval
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
        continued: The tokens of that text, or None.
    """

    sample: RulerSample
    score: RowScore
    generated: str | None = None
    continued: Sequence[int] | None = None

    @property
    def right(self) -> list[bool]:
        """Whether greedy decoding gives each answer."""
        return [self.score.span(start, end)[1] for start, end in self.sample.answers]

    @property
    def generated_as_scored(self) -> bool | None:
        """Whether the tokens made begin with the first answer just if its score says so.

        None where nothing was generated. Later answers depend on how the model joins them.
        """
        if self.continued is None:
            return None
        start, end = self.sample.answers[0]
        answer = self.sample.tokens[start:end].tolist()
        return (list(self.continued[: len(answer)]) == answer) == self.right[0]

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


def share_row(hits: Sequence[Sequence[bool] | np.ndarray], metric: str, common: Fields) -> Fields:
    """A row of a share of answers, given by sample, with the interval over samples.

    Raises:
        ValueError: If there is no answer.
    """
    some = [sample for sample in hits if len(sample)]
    right = [int(sum(sample)) for sample in some]
    share = clustered_wilson_interval(right, [len(sample) for sample in some])
    return {**common, "metric": metric, **share.row_fields()}


def left_out_row(common: Fields, metric: str, count: int, asked: int) -> Fields:
    """How many of the samples were beyond the model's range."""
    return {**common, "metric": metric, "value": count, "n": asked}


def too_long_rows(places: Sequence[Fields], metric: str, error: str) -> list[Fields]:
    """Error rows at these coordinates."""
    return [{**place, "metric": metric, "value": None, "error": error} for place in places]


def answer_rows(asked: Sequence[Asked], common: Fields) -> list[Fields]:
    """Teacher-forced: samples with all answers right, and the loss of the answers."""
    hits = [[all(one.right)] for one in asked]
    losses = [one.loss_nats for one in asked]
    loss = {"metric": "answer_loss_nats", "value": float(np.mean(losses)), "n": len(asked)}
    return [share_row(hits, "accuracy", common), {**common, **loss}]


def generation_rows(asked: Sequence[Asked], common: Fields) -> list[Fields]:
    """RULER's scores of the generated texts; nothing where there are none.

    `string_match_all` has one observation an answer, `string_match_part` one a sample. The latter
    is left out where there is one answer, as the two are equal then. `generated_as_scored`: samples
    whose first answer is generated just if its teacher-forced score says so.
    """
    done = [one for one in asked if one.generated is not None]
    if not done:
        return []
    texts = [clean_prediction(one.generated or "") for one in done]
    references = [one.sample.references for one in done]
    hits = [_matched(one) for one in done]
    every = share_row(hits, "string_match_all", common)
    # The scorers are RULER's; the shares of these hits are the same numbers.
    rows = [{**every, "value": string_match_all(texts, references)}]
    if len(references[0]) > 1:
        part = share_row([[any(hit)] for hit in hits], "string_match_part", common)
        rows.append({**part, "value": string_match_part(texts, references)})
    agreed = [[one.generated_as_scored] for one in done if one.generated_as_scored is not None]
    if agreed:
        rows.append(share_row(agreed, "generated_as_scored", common))
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
    layers = [np.array(one.layers_with_needle()) for one in asked]
    right = [np.array(one.right) for one in asked]
    matched = [np.array(_matched(one)) for one in asked]
    generated = [one.generated is not None for one in asked]
    rows = []
    for least in range(len(asked[0].score.routed) + 1):
        chosen = [counts >= least for counts in layers]
        here = {**common, "labels": {**common["labels"], "min_layers": least}}
        rows.append(share_row(chosen, "needles_routed", here))
        for metric, hits, able in (
            ("accuracy_if_routed", right, chosen),
            ("accuracy_if_not_routed", right, [~one for one in chosen]),
            (
                "string_match_if_routed",
                matched,
                [one & done for one, done in zip(chosen, generated, strict=True)],
            ),
        ):
            some = [hit[one] for hit, one in zip(hits, able, strict=True)]
            if any(map(len, some)):
                rows.append(share_row(some, metric, here))
    return rows


def _matched(one: Asked) -> list[bool]:
    text = clean_prediction(one.generated or "")
    return [found(text, reference) for reference in one.sample.references]
