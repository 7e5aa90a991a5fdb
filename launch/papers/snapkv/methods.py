"""The cache policies that are compared, each at any capacity."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.kv_cache.base import CachePolicy
from model.kv_cache.policies import policy_named


@dataclasses.dataclass(frozen=True)
class Method:
    """A policy of model/kv_cache and its settings without the capacity.

    Attributes:
      label: its name in the report.
      policy, settings, cache_dtype: of the policy.
      generated: slots of its capacity that hold generated tokens, which other policies do not count.
    """

    label: str
    policy: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache_dtype: str | None = None
    generated: int = 0

    def at(self, capacity: int) -> CachePolicy:
        """Returns the policy that holds `capacity` tokens of a prompt."""
        if self.policy == "full":
            return policy_named("full")
        return policy_named(self.policy, capacity=capacity + self.generated, **self.settings)


FULL = Method("full cache", "full")


def methods(*, window: int, kernel: int, generated: int, future: int = 0) -> dict[str, Method]:
    """Returns all methods by short name.

    Args:
      window, kernel: of SnapKV and its variants; H2O and the random choice keep the window too.
      generated: tokens after a prompt, for which StreamingLLM gets slots beside the capacity.
      future: tokens that the oracle reads ahead; without them there is no oracle.
    """
    snap = {"window": window, "kernel": kernel, "pooling": "max"}
    out = {
        "snapkv": Method("SnapKV", "snapkv", snap),
        "snapkv_avg": Method("SnapKV, average pooling", "snapkv", {**snap, "pooling": "average"}),
        "snapkv_int8": Method("SnapKV, int8", "snapkv", snap, "int8"),
        "pyramidkv": Method("PyramidKV", "pyramidkv", snap),
        "adakv": Method("Ada-KV", "adakv", snap),
        "h2o": Method("H2O", "h2o", {"window": window}),
        "tova": Method("TOVA", "tova"),
        "streaming_llm": Method("StreamingLLM", "streaming_llm", generated=generated),
        "random": Method("random", "random", {"window": window}),
    }
    if future:
        out["oracle"] = Method("oracle", "oracle", {"future": future})
    return out


def pooled(window: int, kernel: int) -> Method:
    """Returns SnapKV with max pooling over so many positions."""
    label = f"SnapKV, max pooling over {kernel}" if kernel > 1 else "SnapKV, no pooling"
    settings = {"window": window, "kernel": kernel, "pooling": "max"}
    return Method(label, "snapkv", settings)
