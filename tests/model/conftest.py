"""Fixtures of the tests about registered and outside baselines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ham.model import outside, registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_MIXERS", dict(registry.registered_mixers()))
    monkeypatch.setattr(registry, "_FAULTS", {})
    outside.announcements.cache_clear()
    yield
    outside.announcements.cache_clear()
