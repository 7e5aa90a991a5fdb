"""The cache policies that are compared, each at any capacity, and compiled programs that read prompts and answer with them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.policies import policy_named
from espalier.model.transforms import layer_stack
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.snapkv import replay


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


@dataclasses.dataclass
class CachedModel:
    """A trained model, its layers unrolled."""

    model: Any
    params: Any

    @classmethod
    def of_run(cls, run: Any) -> "CachedModel":
        """Returns the model of a run that launch/load/load_run.py has loaded."""
        config = run.model.config
        params = jax.jit(lambda params: layer_stack.unroll(params, config))(run.params)
        return cls(layer_stack.unrolled(run.model), params)

    def record(self, tokens_BT: Any, lengths_B: Any = None) -> replay.Recording:
        """Reads prompts; those without lengths fill their rows."""
        if lengths_B is None:
            lengths_B = jnp.full(len(tokens_BT), tokens_BT.shape[1], jnp.int32)
        return _record(self.model, self.params, jnp.asarray(tokens_BT), lengths_B)

    def record_more(
        self, recording: replay.Recording, tokens_BX: Any, counts_B: jax.Array
    ) -> replay.Recording:
        return _record_more(self.model, self.params, recording, tokens_BX, counts_B)

    def compress(
        self, recording: replay.Recording, method: Method, capacity: int, room: int
    ) -> Any:
        """Returns the caches of a recording, with room for further tokens."""
        policy = method.at(capacity)
        return _compress(self.model, policy, room, method.cache_dtype, recording)

    def hold(
        self,
        recording: replay.Recording,
        method: Method,
        capacity: int,
        *,
        room: int,
        logits_BV: jax.Array | None = None,
    ) -> "Held":
        """Returns the prompts as a method holds them.

        Args:
          recording: of the prompts; the oracle's has the answer at its end.
          method: compresses the prompts.
          capacity: of the method.
          room: further tokens that the caches can hold.
          logits_BV: after the prompts, where the recording goes on.
        """
        policy = method.at(capacity)
        return Held(
            policy=replay.decoding_policy(policy),
            caches=self.compress(recording, method, capacity, room),
            lengths_B=recording.lengths_B - policy.future,
            logits_BV=recording.logits_BV if logits_BV is None else logits_BV,
        )

    def read_on(self, held: "Held", tokens_BX: Any, counts_B: Any = None) -> "Held":
        """Returns what is held after further tokens, `counts_B` of each row, or all of them if None."""
        if counts_B is None:
            counts_B = jnp.full(len(tokens_BX), tokens_BX.shape[1], jnp.int32)
        state = self.params, held.caches, held.lengths_B, jnp.asarray(tokens_BX), counts_B
        logits_BV, caches = _read_on(self.model, held.policy, *state)
        return Held(held.policy, caches, held.lengths_B + counts_B, logits_BV)

    def generate(self, held: "Held", settings: Settings) -> np.ndarray:
        """Returns the generated tokens [B, M]."""
        state = self.params, held.caches, held.lengths_B, held.logits_BV
        return np.asarray(_answer(self.model, held.policy, settings, *state))

    def log_probabilities(self, held: "Held", tokens_BX: Any, counts_B: Any) -> np.ndarray:
        """Returns the log-probabilities [B, X] of given answers of `counts_B` tokens, zeros at their padding."""
        state = self.params, held.caches, held.lengths_B, held.logits_BV
        given = jnp.asarray(tokens_BX), jnp.asarray(counts_B)
        return np.asarray(_log_probabilities(self.model, held.policy, *state, *given))


@dataclasses.dataclass(frozen=True)
class Held:
    """Prompts of lengths_B tokens in compressed caches, which `policy` continues, and the logits after them."""

    policy: CachePolicy
    caches: Any
    lengths_B: jax.Array
    logits_BV: jax.Array

    @classmethod
    def of(cls, some: Sequence["Held"]) -> "Held":
        """Returns prompts of one policy and padded length in one batch."""

        def joined(*leaves: jax.Array) -> jax.Array:
            return jnp.concatenate(leaves) if leaves[0].ndim else leaves[0]

        states = [(one.caches, one.lengths_B, one.logits_BV) for one in some]
        return cls(some[0].policy, *jax.tree.map(joined, *states))


_record = functools.partial(jax.jit, static_argnums=0)(replay.record)
_record_more = functools.partial(jax.jit, static_argnums=0)(replay.record_more)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compress(model, policy, room, cache_dtype, recording):
    return replay.compressed(model, policy, recording, room=room, cache_dtype=cache_dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_on(model, policy, params, caches, lengths_B, tokens_BX, counts_B):
    return replay.read_on(model, params, policy, caches, lengths_B, tokens_BX, counts_B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probabilities(model, policy, params, caches, lengths_B, logits_BV, tokens_BX, counts_B):
    return replay.log_probabilities(
        model, params, policy, caches, lengths_B, logits_BV, tokens_BX, counts_B
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(model, policy, settings, params, caches, lengths_B, logits_BV):
    output = replay.answer(model, params, policy, caches, lengths_B, logits_BV, settings)
    return output.tokens_BM
