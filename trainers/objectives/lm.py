"""Next-token prediction. Shapes: B batch, T length, X = B T tokens, D width, V vocabulary, S sources."""

from typing import Any

import jax
import jax.numpy as jnp

from model.kernels.cross_entropy import Implementation, weighted_cross_entropy
from model.ranges import Count, Fraction, NonNegative
from trainers.objectives.base import LossOut, Objective
from trainers.objectives.forward import Forward, forward_objective


def language_modelling(
    *,
    model: Any,
    num_sources: Count = 0,
    z_loss: NonNegative = 0.0,
    label_smoothing: Fraction = 0.0,
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
      label_smoothing: share of a target's weight that is spread evenly over the other rows of the table, as in T5X,
        but without T5X's constant, which makes the smallest possible loss 0.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.

    Returns:
      The loss function; its metric 'loss' is the cross-entropy in nats per token without z-loss and smoothing.

    Raises:
      ValueError: `label_smoothing` is not in [0, 1), or the model has a softcap, with which it is not supported.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"language_modelling: label_smoothing = {label_smoothing} must lie in [0, 1)."
        )
    if label_smoothing and model.logit_softcap is not None:
        raise ValueError(
            f"language_modelling: label_smoothing = {label_smoothing} does not support logit_softcap = "
            f"{model.logit_softcap} of the model: set label_smoothing = 0.0."
        )

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
        if label_smoothing:
            targets_X = out.batch["decoder_target_tokens"].reshape(-1)
            excess_X = model.logit_scale * _excess(out.hidden_XD, out.head_VD(), targets_X)
            total += label_smoothing * (weights_BT.reshape(-1) * excess_X).sum()
        metrics = {}
        if z_loss:
            squares = (log_z_X.reshape(weights_BT.shape) ** 2 * weights_BT).sum()
            metrics["z_loss"] = (z_loss * squares, weights_BT.sum())
        nll_BT = nll_X.reshape(weights_BT.shape)
        return out.mean_loss(
            nll_BT, weights_BT, total=total, metrics=metrics, num_sources=num_sources
        )

    return forward_objective(model, loss_fn)


def _excess(h_XD: jax.Array, head_VD: jax.Array, targets_X: jax.Array) -> jax.Array:
    """Returns each target's logit minus the mean logit of the other rows, float32, without logits of all rows.

    Smoothing by s adds s times this to the negative log-likelihood. Logits are linear in the rows, so that their mean is
    the logit of the mean row.
    """
    V = head_VD.shape[0]
    head_VD = head_VD.astype(h_XD.dtype).astype(jnp.float32)
    rows_XD = (V * head_VD[targets_X] - head_VD.sum(0)[None]) / (V - 1)
    return (h_XD.astype(jnp.float32) * rows_XD).sum(-1)
