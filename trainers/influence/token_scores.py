"""Influence of single tokens of a document, by forward passes alone, and the rule for spurious documents.

Shapes: B documents, T length.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.kernels.platform import use_reference_forms
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence.conjugate import Matrices, logits_of, tangents, with_changed
from espalier.trainers.influence.sites import Site
from espalier.trainers.objectives.base import Batch

SPURIOUS = 2 / 3


def output_token_scores(model: Any, sites: Mapping[str, Site]) -> Callable[..., jax.Array]:
    """Returns the compiled function (params, batch, matrices) -> scores [B, T] of the predicted tokens.

    A token's score is the change of its log-probability along the query's direction (G + lambda)^-1 grad log p(completion),
    which `jvp` computes exactly; a document's add up to its score. (Grosse et al., arXiv 2308.03296, take a difference
    quotient.)

    The function's `matrices` are one query's preconditioned gradient [L, E, X, Y] by site.
    """

    def scores(params: Any, batch: Batch, matrices: Matrices) -> jax.Array:
        flat = state_tree.flatten(params)
        # The loss is the negative log-probability: its gradient points the other way.
        change = {path: -x for path, x in tangents(sites, matrices, params).items()}

        def log_probs(own: Any) -> jax.Array:
            log_probs_BTV = jax.nn.log_softmax(logits_of(model, with_changed(params, own), batch))
            targets_BT1 = batch["decoder_target_tokens"][..., None]
            return jnp.take_along_axis(log_probs_BTV, targets_BT1, axis=-1)[..., 0]

        _, scores_BT = jax.jvp(log_probs, ({p: flat[p] for p in change},), (change,))
        return scores_BT * batch["decoder_loss_weights"].astype(scores_BT.dtype)

    compiled = jax.jit(scores)

    def call(params: Any, batch: Batch, matrices: Matrices) -> jax.Array:
        with use_reference_forms():
            return compiled(params, batch, matrices)

    return call


def concentration(scores: Any) -> float:
    """Returns the L2 norm of a document's token scores over their L1 norm: 1 if one token has all influence; 0 without any."""
    scores = np.asarray(scores, np.float64)
    total = np.abs(scores).sum()
    return float(np.sqrt(np.square(scores).sum()) / total) if total else 0.0


def is_spurious(scores: Any) -> bool:
    """Returns whether a document is marked as spurious: its influence is that of one or two tokens (Grosse et al.)."""
    return concentration(scores) > SPURIOUS
