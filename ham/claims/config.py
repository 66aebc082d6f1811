"""What a claims file may say: statements, queries over result rows, tests and smallest effects.

A claim is a conjunction: it is supported when all of its tests are, refuted when one is. Each test
belongs to a family, over which Holm's correction runs, or to none (exploratory, or timings).
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ham.config import Fraction, Positive, PositiveFloat, Strict
from ham.config_files import read_yaml, validated
from ham.fingerprint import repository_root
from ham.report.metrics import CLAIMABLE, unit

Kind = Literal["superiority", "non_inferiority", "monotone", "threshold", "timing"]
RELATIVE = "relative"
TIMES = "times"
CLAIMS_FILE = "workflow/config/claims.yaml"

Text = Annotated[str, Field(min_length=1)]


def _with_time_zone(stated: datetime) -> datetime:
    if stated.tzinfo is None:
        raise ValueError("needs a time zone, e.g. 2026-11-25T19:00:00Z")
    return stated


class Delta(Strict):
    """The smallest effect of interest, decided before the runs.

    Attributes:
        value: The effect; never negative.
        unit: That of the metric; `relative` (share of the reference); `times` for timings.
        reason: Why this much matters.
    """

    value: Annotated[float, Field(ge=0.0)]
    unit: Text
    reason: Text


class Side(Strict):
    """One side of a comparison: an arm, and what else tells its rows from others."""

    model: Text
    provider: str | None = None
    labels: dict[str, str | int | float] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables and messages."""
        parts = [self.model, *([self.provider] if self.provider else [])]
        return " ".join([*parts, *(f"{key}={value}" for key, value in self.labels.items())])


class Where(Strict):
    """Which rows a test reads.

    Attributes:
        config: Name of the configuration that made the rows; any when None.
        x: One horizontal coordinate, a list of them, `smallest` or `largest` of those that occur;
            all of them when None.
        from_x: Only rows at this coordinate or beyond.
        label: Read the value from this label of the rows instead (sweeps store bytes there).
        labels: Labels that must have these values.
        over: Labels that tell the cells of a grid apart; rows that differ in other labels are
            ambiguous.
    """

    config: str | None = None
    experiment: Text
    metric: Text
    task: str | None = None
    x: float | list[float] | Literal["smallest", "largest"] | None = None
    from_x: float | None = None
    label: str | None = None
    labels: dict[str, str | int | float] = Field(default_factory=dict)
    over: list[str] = Field(default_factory=list)

    @field_validator("metric", "label")
    @classmethod
    def _is_comparable(cls, name: str | None) -> str | None:
        if name is not None and name not in CLAIMABLE:
            raise ValueError(f"unknown metric; known: {', '.join(sorted(CLAIMABLE))}")
        return name

    @field_validator("x", mode="before")
    @classmethod
    def _whole_numbers_are_numbers(cls, x: Any) -> Any:
        if isinstance(x, list):
            return [float(one) if isinstance(one, int) else one for one in x]
        return float(x) if isinstance(x, int) and not isinstance(x, bool) else x

    @field_validator("from_x", mode="before")
    @classmethod
    def _a_whole_number_is_a_number(cls, x: Any) -> Any:
        return float(x) if isinstance(x, int) and not isinstance(x, bool) else x

    @property
    def quantity(self) -> str:
        """The metric that is compared."""
        return self.label or self.metric


class Condition(Strict):
    """What must hold beside a comparison.

    Attributes:
        stated: When, if later than its claim; rows from before are marked.
    """

    stated: datetime | None = None

    @field_validator("stated")
    @classmethod
    def _has_a_time_zone(cls, stated: datetime | None) -> datetime | None:
        return None if stated is None else _with_time_zone(stated)


class SameFraction(Condition):
    """Both sides must keep as many tokens, or only the side that keeps fewer can win.

    Attributes:
        value: Largest difference of the realised share of tokens in the cache, at every place of
            the rows compared.
        reason: Why this much; empty in files that give the number alone.
    """

    value: PositiveFloat
    reason: str = ""


class SameMetric(Condition):
    """A number that must agree between both sides, or the comparison says nothing.

    Attributes:
        tolerance: Largest difference, relative to the reference.
        own_length: Whether it must be that of the task: at the length of the rows compared, and
            with the share of tokens in the cache that they have.
    """

    where: Where
    tolerance: PositiveFloat
    own_length: bool = False


class Test(Strict):
    """One test of a claim.

    Attributes:
        name: What tells it from the other tests of the claim, e.g. its budget.
        test: `superiority`: better than every reference by more than delta. `non_inferiority`:
            worse than none by delta or more. `monotone`: no step along the curve is worse than the
            one before by delta or more. `threshold`: the arm alone reaches delta. `timing`:
            `delta` times less than every reference, in cells instead of seeds.
        family: Holm's correction runs over its tests; None: not corrected.
        arm: The arm that the claim is about. For `monotone` with several arms the curve goes
            through them in this order, otherwise along the horizontal coordinate.
        same_fraction: Both sides must keep as many tokens; a plain number is its value.
        same_metric: Another number that must agree, e.g. bytes of the cache.
        points: Fewest points of a curve.
        largest_step: For `monotone`: the largest share of the whole gain that one step may carry;
            beyond it there is a cliff.
    """

    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    name: Text
    test: Kind
    family: str | None = None
    delta: Delta
    where: Where
    arm: Side | Annotated[list[Side], Field(min_length=3)]
    reference: list[Side] = Field(default_factory=list)
    same_fraction: SameFraction | None = None
    same_metric: SameMetric | None = None
    points: Annotated[int, Field(ge=3)] = 3
    largest_step: Fraction | None = None

    @field_validator("same_fraction", mode="before")
    @classmethod
    def _a_number_is_its_value(cls, given: Any) -> Any:
        return {"value": given} if isinstance(given, int | float) else given

    @model_validator(mode="after")
    def _consistent(self) -> Test:
        compares = self.test in ("superiority", "non_inferiority", "timing")
        if compares != bool(self.reference):
            needs = "needs a reference" if compares else "takes no reference"
            raise ValueError(f"test {self.test!r} {needs}")
        if self.test != "monotone" and (isinstance(self.arm, list) or self.largest_step):
            raise ValueError("several arms and largest_step belong to test 'monotone'")
        if (self.same_fraction or self.same_metric) and not compares:
            raise ValueError("same_fraction and same_metric need a reference")
        if self.test == "timing" and (self.family or self.same_fraction or self.same_metric):
            raise ValueError(
                "a timing rests on cells, not on seeds: no family, no same_fraction, no same_metric"
            )
        if self.test == "timing" and len(self.reference) > 1:
            raise ValueError("a timing has one reference; use several tests")
        legal = self._units()
        if self.delta.unit not in legal:
            raise ValueError(
                f"delta.unit {self.delta.unit!r} does not fit metric {self.where.quantity!r} in "
                f"test {self.test!r}; legal: {', '.join(legal)}"
            )
        return self

    def _units(self) -> list[str]:
        if self.test == "timing":
            return [TIMES]
        own = unit(self.where.quantity)
        return [own, RELATIVE] if self.test in ("superiority", "non_inferiority") else [own]

    @property
    def arms(self) -> list[Side]:
        """The arm or arms that the claim is about."""
        return self.arm if isinstance(self.arm, list) else [self.arm]


class Claim(Strict):
    """One claim.

    Attributes:
        source: Who says so, and where.
        expectation: What we expect and why, written before the runs.
        stated: When; rows from before are marked, because the claim may have been made to fit.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]*$")]
    statement: Text
    source: Text
    expectation: Text
    stated: datetime
    tests: Annotated[list[Test], Field(min_length=1)]

    @field_validator("stated")
    @classmethod
    def _has_a_time_zone(cls, stated: datetime) -> datetime:
        return _with_time_zone(stated)

    @model_validator(mode="after")
    def _names_differ(self) -> Claim:
        names = [test.name for test in self.tests]
        if len(set(names)) != len(names):
            raise ValueError(f"names of tests must differ; received {names}")
        return self


class Family(Strict):
    """Tests that are corrected together; alpha is the chance of any wrong decision among them."""

    about: Text
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05


class Claims(Strict):
    """One claims file."""

    version: Positive = 1
    families: dict[str, Family]
    claims: Annotated[list[Claim], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Claims:
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) != len(ids):
            raise ValueError(f"ids of claims must differ; received {ids}")
        for claim in self.claims:
            for test in claim.tests:
                if test.family is not None and test.family not in self.families:
                    known = ", ".join(sorted(self.families)) or "none"
                    raise ValueError(
                        f"claim {claim.id}, test {test.name!r}: unknown family {test.family!r}; "
                        f"known: {known}"
                    )
        return self


def shipped_claims() -> Path:
    """The project's own claims file."""
    return repository_root() / CLAIMS_FILE


def load_claims(path: str | os.PathLike) -> Claims:
    """Read and validate a claims file.

    Raises:
        MissingDataError: If the file does not exist.
        ConfigError: If it is not valid; one line per fault, with the legal values.
    """
    return parse_claims(read_yaml(path), source=str(path))


def parse_claims(values: dict[str, Any], source: str) -> Claims:
    """Validate a plain dictionary.

    Raises:
        ConfigError: With one line per fault.
    """
    return validated(Claims, values, source)
