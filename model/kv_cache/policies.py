"""Cache policies by name, as `--cache_policy` chooses them."""

from collections.abc import Callable

from model.kv_cache.base import CachePolicy
from model.kv_cache.full import FullCache

POLICIES: dict[str, Callable[[], CachePolicy]] = {"full": FullCache}


def policy_named(name: str) -> CachePolicy:
    """A policy with its default settings.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in POLICIES:
        raise ValueError(f"Unknown cache policy {name!r}: choose from {sorted(POLICIES)}.")
    return POLICIES[name]()
