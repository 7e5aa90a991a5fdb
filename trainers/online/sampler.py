"""Several continuations of each prompt by a policy in training: one program, compiled once.

Shapes: P prompts, T prompt length, G samples of a prompt, R = P G rows, M new tokens at most.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.actor_critic import language_model, language_model_params
from model.kv_cache.full import FullCache
from model.surgery import layer_stack
from trainers import decode
from trainers.decoder import repeated
from trainers.prefill import prefill


class Sampler:
    """Samples with the weights of any step, within their mesh.

    What follows a prompt is a function of the weights, the seed, the number of the rollout, the place of the prompt
    in it and the number of the sample.

    Args:
      model: a decoder-only module, or an actor and critic.
      settings: what to generate, with samples of each prompt.
      sharding: of prompts.
      seed: of the draws.
    """

    def __init__(
        self, model: Any, settings: decode.Settings, *, sharding: NamedSharding, seed: int
    ):
        policy, copies = FullCache(), settings.num_samples
        room = max(settings.max_new_tokens - 1, 1)

        def sample(params, tokens_PT, lengths_P, rollout):
            written_by, params = language_model(model), language_model_params(model, params)
            # Slices of stacked weights inside the loop would copy them for every token.
            unrolled = layer_stack.unrolled(written_by)
            params = layer_stack.unroll(params, written_by.config)
            logits_PV, caches = prefill(unrolled, params, policy, tokens_PT, lengths_P, room=room)
            logits_RV, lengths_R = repeated((logits_PV, lengths_P), copies)
            key = jax.random.fold_in(jax.random.key(seed), rollout)
            keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(lengths_R)))
            decoded, _ = decode.decode(
                unrolled,
                params,
                policy,
                logits_RV,
                repeated(caches, copies),
                lengths_R,
                jnp.ones_like(lengths_R, bool),
                keys_R,
                settings,
            )
            return decoded.tokens_BM, decoded.lengths_B

        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._sample = jax.jit(sample, out_shardings=everywhere)
        self._ends = frozenset(settings.ends)

    def __call__(
        self, params: Any, tokens_PT: jax.Array, lengths_P: jax.Array, *, rollout: int
    ) -> list[list[int]]:
        """The tokens of R continuations, with the one that ended each; those of a prompt side by side."""
        arrays = self._sample(params, tokens_PT, lengths_P, np.uint32(rollout))
        tokens_RM, counts_R = jax.device_get(arrays)
        return [row[:n].tolist() for row, n in zip(tokens_RM, counts_R, strict=True)]

    def ended(self, tokens: list[int]) -> bool:
        """Whether a continuation ended by itself."""
        return bool(tokens) and tokens[-1] in self._ends
