"""The cache policies that are compared, each at any capacity."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.kv_cache.base import CachePolicy
from model.kv_cache.policies import policy_named


@dataclasses.dataclass(frozen=True)
class Method:
    """A policy of model/kv_cache and its settings without the capacity; `label` is its name in the report."""

    label: str
    policy: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache_dtype: str | None = None

    def at(self, capacity: int) -> CachePolicy:
        if self.policy == "full":
            return policy_named("full")
        return policy_named(self.policy, capacity=capacity, **self.settings)


FULL = Method("full cache", "full")


def methods(*, window: int, kernel: int, future: int = 0) -> dict[str, Method]:
    """Returns all methods by short name; with `future`, also the oracle, which reads so many later tokens."""
    snap = {"window": window, "kernel": kernel, "pooling": "max"}
    out = {
        "snapkv": Method("SnapKV", "snapkv", snap),
        "snapkv_avg": Method("SnapKV, average pooling", "snapkv", {**snap, "pooling": "average"}),
        "snapkv_int8": Method("SnapKV, int8", "snapkv", snap, "int8"),
        "pyramidkv": Method("PyramidKV", "pyramidkv", snap),
        "adakv": Method("Ada-KV", "adakv", snap),
        "h2o": Method("H2O", "h2o", {"window": window}),
        "tova": Method("TOVA", "tova"),
        "streaming_llm": Method("StreamingLLM", "streaming_llm"),
        "random": Method("random", "random", {"window": window}),
    }
    if future:
        out["oracle"] = Method("oracle", "oracle", {"future": future})
    return out


def kernels(*, window: int, sizes: tuple[int, ...]) -> dict[str, Method]:
    """Returns SnapKV with max pooling over so many positions."""
    return {
        f"kernel_{size}": Method(
            f"max pooling over {size}" if size > 1 else "no pooling",
            "snapkv",
            {"window": window, "kernel": size, "pooling": "max"},
        )
        for size in sizes
    }
