"""Names that a query may use: those of the shipped configurations, of the sweep and of the rows.

A claim about a model that nobody knows would read "not run" for ever. A known name without rows
may still get some, so that stays "not run". Metrics are checked where a claims file is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ham.claims.config import CLAIMS_FILE, Claims, Test, Where
from ham.claims.evidence import Observation
from ham.config_files import read_yaml
from ham.errors import unknown_choice
from ham.fingerprint import repository_root
from ham.measure.sweep import grid

EXPERIMENTS = (
    *("train", "tuning", "language_modelling", "gates", "lm_eval", "needle", "recall", "dial"),
    *("throughput", "memory", "inspect", "agreement", "kernel_speed", "kernel_training"),
    *("mqar", "mqar_tuning", "sweep_ceiling"),
    *grid.EXPERIMENTS,
)
"""What rows may call the stage that made them."""


def check_names(
    claims: Claims, evidence: Sequence[Observation], configurations: Path | None = None
) -> None:
    """Every experiment and model of every query is known.

    Args:
        claims: What asks.
        evidence: Rows, whose names are known too: of one's own configurations.
        configurations: Folder of shipped configurations; the project's own when None.

    Raises:
        ConfigError: With claim, test, the name received and the legal ones.
    """
    folder = configurations or (repository_root() / CLAIMS_FILE).parent
    models = {one.row.model for one in evidence} | shipped_models(folder)
    experiments = {one.row.experiment for one in evidence} | set(EXPERIMENTS)
    for claim in claims.claims:
        for test in claim.tests:
            place = f"claim {claim.id}, test {test.name!r}"
            for where in _queries(test):
                if where.experiment not in experiments:
                    raise unknown_choice(f"experiment of {place}:", where.experiment, experiments)
            for side in (*test.arms, *test.reference):
                if side.model not in models:
                    raise unknown_choice(f"model of {place}:", side.model, models)


def shipped_models(folder: Path) -> set[str]:
    """Arms of every configuration in a folder, and the models of the sweep."""
    arms = [
        arm
        for path in sorted(folder.glob("*.yaml"))
        if path.name != Path(CLAIMS_FILE).name
        for arm in read_yaml(path).get("arms") or ()
    ]
    swept = {name.replace("_", "-") for name in grid.MODELS}
    return {str(arm["name"]) for arm in arms} | swept


def _queries(test: Test) -> list[Where]:
    return [test.where, *([test.same_metric.where] if test.same_metric else [])]
