"""The only door to `ham.external`, which is named and not imported.

A fingerprint counts what is imported, and an edit of that package must not touch the arms that
never use it; `ArmConfig.code` names it for those that do.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def external_models() -> ModuleType:
    """The package `ham.external`."""
    return importlib.import_module(".".join(("ham", "external")))
