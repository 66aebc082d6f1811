"""What scores of lm-eval tasks are to be compared with: a uniform and an untrained model.

Both answer the very requests of the model that is judged, and the task's own scoring makes numbers
of them. The uniform model gives every token the same probability, so it prefers the shortest
option, and its accuracy is not 1 / options. The untrained model has the same architecture and the
weights that training started from; what a task gives away to it was not learned from text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ham.evaluate.part import Fields
from ham.report.statistics import wilson_interval
from ham.routing.router import UnigramSurprise

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from ham.evaluate.lm_eval_adapter import HamLM
    from ham.model.language_model import LanguageModel

METRIC_NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}
"""Names in rows of metrics that lm-eval calls otherwise; these are shares of documents."""

UNIFORM, UNTRAINED = "chance", "untrained"
"""What stands before the metrics of the two models in rows."""

Respond = Callable[[list["Instance"]], list[Any]]


def metric_fields(metric: str, value: float, count: int) -> Fields:
    """The fields of one score; accuracies get Wilson intervals."""
    fields = {"metric": METRIC_NAMES.get(metric, metric), "value": value, "n": count}
    if metric in METRIC_NAMES:
        fields = {**wilson_interval(round(value * count), count).row_fields(), **fields}
    return fields


def reference_rows(task: Task, prefix: str, respond: Respond, common: Fields) -> list[Fields]:
    """Rows `PREFIX_METRIC` of a model that answers the requests of an evaluated task.

    Args:
        task: A task that lm-eval has evaluated.
        prefix: `UNIFORM` or `UNTRAINED`.
        respond: Answers log-likelihood requests of one kind.
        common: Further fields of the rows.

    Returns:
        One row a metric; none for a task that generates text, where these models say nothing.
    """
    instances = sorted(task.instances, key=lambda one: (one.doc_id, one.idx))
    if not instances or any(one.request_type not in _KINDS for one in instances):
        return []
    answers: dict[int, list[Any]] = {}
    documents: dict[int, Any] = {}
    for one, answer in zip(instances, respond(instances), strict=True):
        answers.setdefault(one.doc_id, []).append(answer)
        documents[one.doc_id] = one.doc
    values: dict[str, list[Any]] = {}
    for number, given in answers.items():
        for metric, value in task.process_results(documents[number], given).items():
            values.setdefault(metric, []).append(value)
    rows = []
    for metric, per_document in values.items():
        total = float(task.aggregation()[metric](per_document))
        fields = metric_fields(metric, total, len(per_document))
        rows.append({**common, **fields, "metric": f"{prefix}_{fields['metric']}"})
    return rows


_KINDS = ("loglikelihood", "loglikelihood_rolling")


def uniform(lm: HamLM, task: str) -> Respond:
    """Answers by the number of tokens that `lm` scored in each request of a task.

    No token is the greedy one: it shares its probability with all others.
    """
    scored = lm.records[task].scored_tokens
    nats = math.log(lm.model.config.vocabulary_size)

    def respond(instances: list[Instance]) -> list[Any]:
        found = [-nats * scored[tuple(one.args)] for one in instances]
        rolling = instances[0].request_type == "loglikelihood_rolling"
        return found if rolling else [(value, False) for value in found]

    return respond


def asked(lm: HamLM) -> Respond:
    """Answers of a model."""

    def respond(instances: list[Instance]) -> list[Any]:
        requests = [copy.copy(one) for one in instances]
        return getattr(lm, requests[0].request_type)(requests)

    return respond


def untrained_twin(model: LanguageModel, seed: int) -> LanguageModel:
    """The model as it was before the first step of training.

    A router starts where training starts it, usually keeping about its target share; what it was
    told of the training text (`needs_unigram_counts`) it is told again.

    Args:
        model: A trained model.
        seed: The seed of its training run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = model.config.build()
    if model.needs_unigram_counts:
        for told, new in zip(model.modules(), twin.modules(), strict=True):
            if isinstance(told, UnigramSurprise):
                new.load_state_dict(told.state_dict())
    return twin.to(model.device).eval()
