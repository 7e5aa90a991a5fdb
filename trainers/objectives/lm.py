"""Next-token prediction. Shapes: B batch, T length, D width, V vocabulary, S sources."""

from typing import Any

import jax.numpy as jnp

from model.kernels.cross_entropy import Implementation, weighted_cross_entropy
from model.ranges import Count, NonNegative
from trainers.objectives.base import LossOut, Objective
from trainers.objectives.forward import Forward, forward_objective


def language_modelling(
    *,
    model: Any,
    num_sources: Count = 0,
    z_loss: NonNegative = 0.0,
    implementation: Implementation = "auto",
) -> Objective:
    """Cross-entropy of the targets, plus `z_loss` * (log Z)^2 per token (PaLM, arXiv 2204.02311).

    Values that a module sows into the collection 'losses' (`self.sow("losses", "balance", value)`, a mean over the
    batch) are added to the loss per token and reported as metric 'auxiliary_loss'. Values sown into 'metrics' are
    reported in training, averaged over layers: 'mlp/load' for "load" of the layers' MLPs, 'mlp/load/0', 'mlp/load/1',
    ... for a vector. Modules with random numbers use the rng 'dropout', which is absent in evaluation
    (`self.has_rng("dropout")` is then False). Modules may read and, in training, write their other collections.

    Args:
      model: a language model with `hidden`, `head_VD`, logit_scale and logit_softcap.
      num_sources: S; with S > 0, metric 'source_loss' is a vector over batch["source_ids"].
      z_loss: weight of the z-loss; 1e-4 in T5 and PaLM.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.

    Returns:
      The loss function; its metric 'loss' is the cross-entropy in nats per token without z-loss.
    """

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        del extras
        weights_BT = out.batch["decoder_loss_weights"].astype(jnp.float32)
        total, nll_X, log_z_X = weighted_cross_entropy(
            out.hidden_XD,
            out.head_VD(),
            out.batch["decoder_target_tokens"].reshape(-1),
            weights_BT.reshape(-1),
            logit_scale=model.logit_scale,
            softcap=model.logit_softcap,
            z_loss=z_loss,
            implementation=implementation,
        )
        metrics = {}
        if z_loss:
            squares = (log_z_X.reshape(weights_BT.shape) ** 2 * weights_BT).sum()
            metrics["z_loss"] = (z_loss * squares, weights_BT.sum())
        nll_BT = nll_X.reshape(weights_BT.shape)
        return out.mean_loss(
            nll_BT, weights_BT, total=total, metrics=metrics, num_sources=num_sources
        )

    return forward_objective(model, loss_fn)
