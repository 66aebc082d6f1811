"""What the attention branch of a HAM layer may read: budgets, window, sink."""

from __future__ import annotations

from ham.stores.base import StoreCache, TokenStore
from ham.stores.options import StoreOptions
from ham.stores.threshold import ThresholdStore

__all__ = ["StoreCache", "StoreOptions", "TokenStore", "make_store"]

_STORES: dict[str, type[TokenStore]] = {
    "threshold": ThresholdStore,
}


def make_store(
    options: StoreOptions,
    heads: int,
    head_dim: int,
    per_head: bool = False,
    provider: str = "auto",
) -> TokenStore:
    """The store that `options.budget` asks for; arguments as of `TokenStore`."""
    return _STORES[options.budget](options, heads, head_dim, per_head, provider)
