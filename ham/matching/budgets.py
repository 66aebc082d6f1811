"""One rival at one budget of the reference: what is wanted, what it has, and how close it can get.

- `parameters`: of the whole model, through the width of the MLP; they must agree within 1 %.
- `bytes`: everything that decoding has allocated for one sequence after `context` tokens, unused
  slots included, through a knob that the mixer declares (`ham.model.knob`); for an arm
  with eviction through the tokens that stay; for an arm with a placement also through the number of
  layers that its own mixer takes.
- `flops`: of training, three forward passes for every token read, through the number of steps. The
  model stays as it is, and reads more or fewer tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ham.config import ArmConfig
from ham.errors import ConfigError, HamError
from ham.matching import BUDGETS
from ham.matching.bench import Bench, changed
from ham.matching.search import Refusal, closest
from ham.model.mixer import MixerShape
from ham.model.sizing import MLP_MULTIPLE
from ham.model.sizing import TOLERANCE as PARAMETER_TOLERANCE

PLACEMENT, EVICTION = "placement.layers", "eviction.tokens"


@dataclass(frozen=True)
class Match:
    """How close a rival comes to one budget.

    Attributes:
        rival: The arm as configured.
        budget: One of `BUDGETS`.
        context: Length in tokens at which bytes were compared; None for the other budgets.
        wanted: What the reference has.
        before: What the rival has as configured; None where it cannot be built.
        got: What it has as matched; None where no value can be used.
        knob: What was turned.
        value: What it was set to.
        arm: The rival with that value; `rival` itself where it stays as it is.
        tolerance: Legal relative difference.
        limit: What stands between `got` and `wanted`.
    """

    rival: ArmConfig
    budget: str
    context: int | None
    wanted: float
    before: float | None
    got: float | None = None
    knob: str = "none"
    value: Any = None
    arm: ArmConfig | None = None
    tolerance: float = 0.0
    limit: str = ""

    @property
    def matched(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.got is not None and abs(self.difference(self.got)) <= self.tolerance

    @property
    def label(self) -> str:
        """The budget, and the length where it has one."""
        return self.budget if self.context is None else f"{self.budget}@{self.context}"

    def number(self, value: float) -> str:
        """A value as text: FLOPs with four digits, the rest whole."""
        return f"{value:.4g}" if self.budget == "flops" else f"{value:,.0f}"

    def difference(self, value: float) -> float:
        """Relative difference of a value from what is wanted."""
        return value / self.wanted - 1


@dataclass(frozen=True)
class _Lever:
    """Something to turn: its name, its values, where it stands, and the rival with a value."""

    name: str
    values: Sequence[Any]
    start: int
    turned: Callable[[Any], ArmConfig]


def match_rival(
    bench: Bench,
    rival: ArmConfig,
    contexts: Sequence[int],
    budgets: Sequence[str] = BUDGETS,
    tolerance: float = 0.02,
) -> list[Match]:
    """Match one rival to the reference; a budget that it cannot meet is reported, never raised.

    Args:
        bench: The reference.
        rival: An arm, of the configuration or not.
        contexts: Lengths in tokens at which bytes are compared.
        budgets: Which of `BUDGETS`.
        tolerance: Legal relative difference of bytes and FLOPs.

    Raises:
        ConfigError: If the reference does not say what it costs.
    """
    matches = []
    if "parameters" in budgets:
        matches.append(_match_parameters(bench, rival))
    if "bytes" in budgets:
        matches += [_match_bytes(bench, rival, context, tolerance) for context in contexts]
    # The training of an arm that reads another one's checkpoint is that of the other one.
    if "flops" in budgets and rival.trained:
        matches.append(_match_flops(bench, rival, tolerance))
    return matches


def _match_parameters(bench: Bench, rival: ArmConfig) -> Match:
    wanted = bench.measure(bench.reference).sizing.parameters
    measured = bench.measure(rival)
    if isinstance(measured, Refusal):
        return Match(rival, "parameters", None, wanted, None, limit=measured.reason)
    sizing = measured.sizing
    return Match(
        rival,
        "parameters",
        None,
        wanted,
        before=sizing.plain,
        got=sizing.parameters,
        knob="mlp_width",
        value=sizing.model.mlp_width,
        arm=rival,
        tolerance=PARAMETER_TOLERANCE,
        limit=sizing.fault or f"the width goes in steps of {MLP_MULTIPLE}",
    )


def _of_reference(bench: Bench, cost: float | Refusal) -> float:
    if isinstance(cost, Refusal):
        raise ConfigError(f"arm {bench.reference.name!r} cannot be matched to: {cost.reason}")
    return cost


def _match_bytes(bench: Bench, rival: ArmConfig, context: int, tolerance: float) -> Match:
    wanted = _of_reference(bench, bench.state_bytes(bench.reference, context))
    now = bench.state_bytes(rival, context)
    before, reason = (None, now.reason) if isinstance(now, Refusal) else (now, "")
    as_it_is = Match(
        rival, "bytes", context, wanted, before, before, arm=rival, tolerance=tolerance
    )
    try:
        levers = _levers(bench, rival, context)
    except HamError as error:
        return replace(as_it_is, limit=str(error))
    if not levers:
        return replace(as_it_is, limit=reason or f"mixer {rival.mixer!r} declares no knob")
    tries: list[Match] = []
    for lever in levers:
        tries.append(_turned(bench, as_it_is, lever))
        if tries[-1].matched:
            return tries[-1]
    best = min(tries, key=_distance)
    return replace(best, limit="; ".join(one.limit for one in tries))


def _turned(bench: Bench, as_it_is: Match, lever: _Lever) -> Match:
    """The match with the best value of one lever."""
    found = closest(
        lever.values,
        lambda value: bench.state_bytes(lever.turned(value), as_it_is.context),
        as_it_is.wanted,
        lever.start,
    )
    limit = f"{lever.name}: {found.limit}"
    if found.index is None:
        return replace(as_it_is, got=None, arm=None, knob=lever.name, limit=limit)
    value = lever.values[found.index]
    kept = found.cost == as_it_is.before
    arm = as_it_is.rival if kept else lever.turned(value)
    return replace(as_it_is, got=found.cost, knob=lever.name, value=value, arm=arm, limit=limit)


def _distance(match: Match) -> float:
    return math.inf if match.got is None else abs(match.difference(match.got))


def _levers(bench: Bench, rival: ArmConfig, context: int) -> list[_Lever]:
    """The knobs of the rival's mixer, its eviction, then the layers that it takes."""
    name, model = f"{rival.name}@{context}", bench.config.model
    shape = MixerShape(model.width, model.heads, 0, model.layers, model.max_positions)
    options = bench.options(rival)
    levers = []
    for knob in bench.knobs(rival):
        values, now = knob.values(shape, context), getattr(options, knob.option)
        start = 0 if now is None else min(bisect_left(values, now), len(values) - 1)
        levers.append(
            _Lever(
                knob.option,
                values,
                start,
                lambda value, knob=knob: changed(rival, {knob.option: value}, name=name),
            )
        )
    if rival.eviction is not None:
        tokens = range(rival.eviction.always_kept + 1, context + 1)
        levers.append(_Lever(EVICTION, tokens, 0, lambda value: _evicted(rival, value, name)))
    if rival.placement is not None and model.layers > 1:
        layers = [_spread(count, model.layers) for count in range(1, model.layers)]
        start = len(rival.placement.chosen(model.layers)) - 1
        start = min(start, len(layers) - 1)
        levers.append(_Lever(PLACEMENT, layers, start, lambda value: _placed(rival, value, name)))
    return levers


def _spread(count: int, layers: int) -> list[int]:
    """`count` of the layers at equal distances, the last one among them, as `every` has them."""
    return [(place + 1) * layers // count - 1 for place in range(count)]


def _placed(rival: ArmConfig, layers: list[int], name: str) -> ArmConfig:
    between = rival.placement.between.model_dump(mode="json", exclude_unset=True)
    return changed(rival, {}, name=name, placement={"layers": layers, "between": between})


def _evicted(rival: ArmConfig, tokens: int, name: str) -> ArmConfig:
    eviction = rival.eviction.model_dump(mode="json", exclude_none=True, exclude={"fraction"})
    return changed(rival, {}, name=name, eviction={**eviction, "tokens": tokens})


def _match_flops(bench: Bench, rival: ArmConfig, tolerance: float) -> Match:
    wanted = _of_reference(bench, bench.training_flops(bench.reference))
    before = bench.training_flops(rival)
    if isinstance(before, Refusal):
        return Match(rival, "flops", None, wanted, None, limit=before.reason)
    now = bench.config.training(rival).steps
    steps = max(1, round(now * wanted / before))
    arm = rival if steps == now else changed(rival, {}, name=f"{rival.name}@flops", steps=steps)
    return Match(
        rival,
        "flops",
        None,
        wanted,
        before=before,
        got=before / now * steps,
        knob="steps",
        value=steps,
        arm=arm,
        tolerance=tolerance,
        limit="only whole steps are trained",
    )
