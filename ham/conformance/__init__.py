"""What every sequence mixer must do, as rules that say by how much it did or did not.

`check("transformer")` runs them on a small model around a registered mixer; `ham baselines check`
prints the findings as a table and the tests demand them of every registered mixer.
"""

from ham.conformance.finding import Finding
from ham.conformance.subject import Subject, small_model
from ham.conformance.suite import RULES, Rule, check, choose_rules
from ham.conformance.survey import Examined, grid, survey

__all__ = [
    "RULES",
    "Examined",
    "Finding",
    "Rule",
    "Subject",
    "check",
    "choose_rules",
    "grid",
    "small_model",
    "survey",
]
