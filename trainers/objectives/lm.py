"""Next-token prediction. Shapes: B batch, T length, X = B T tokens, D width, V vocabulary, S sources."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from espalier.common.ranges import Count, Fraction, NonNegative
from espalier.model.kernels.cross_entropy import Implementation, weighted_cross_entropy
from espalier.trainers.objectives.base import LossOut, Objective, loss_in
from espalier.trainers.objectives.forward import Forward, forward_objective

# T5X's names of what a loss is divided by.
Normalisation = Literal["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"]


@loss_in("nats per token")
def language_modelling(
    *,
    model: Any,
    num_sources: Count = 0,
    z_loss: NonNegative = 0.0,
    label_smoothing: Fraction = 0.0,
    loss_normalizing_factor: Normalisation = "NUM_REAL_TARGET_TOKENS",
    implementation: Implementation = "auto",
) -> Objective:
    """Cross-entropy of the targets, plus `z_loss` * (log Z)^2 per token (PaLM, arXiv 2204.02311).

    Values that a module sows into the collection 'losses' (`self.sow("losses", "balance", value)`, a mean over the
    batch) are added to the loss per token and reported as metric 'auxiliary_loss'. Values sown into 'metrics' are
    reported in training, averaged over layers: 'mlp/load' for "load" of the layers' MLPs, 'mlp/load/0', 'mlp/load/1',
    ... for a vector; a value whose name ends in '_max' also of the layer where it is largest, as '..._worst_layer'.
    Modules with random numbers use the rng 'dropout', which is absent in evaluation (`self.has_rng("dropout")` is then
    False). Modules may read and, in training, write their other collections.

    Args:
      model: a language model with `hidden`, `head_VD`, logit_scale and logit_softcap.
      num_sources: S; with S > 0, metric 'source_loss' is a vector over batch["source_ids"].
      z_loss: weight of the z-loss; 1e-4 in T5 and PaLM.
      label_smoothing: share of a target's weight that is spread evenly over the other rows of the table, as in T5X,
        but without T5X's constant, which makes the smallest possible loss 0.
      loss_normalizing_factor: the loss is divided by 'NUM_REAL_TARGET_TOKENS', the sum of the loss weights;
        'NUM_TOTAL_TARGET_TOKENS', all places of the targets, padding included; or it is, 'AVERAGE_PER_SEQUENCE', the mean over
        sequences of each one's mean over its tokens. A sequence is a segment, which attention does not leave: an example
        of a packed row, or a piece of one that was split.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.

    Returns:
      The loss function; its metric 'loss' is the cross-entropy in nats per token without z-loss and smoothing, however the
      loss is normalised. With 'AVERAGE_PER_SEQUENCE', 'loss_per_sequence' is the mean over sequences.

    Raises:
      ValueError: `label_smoothing` is not in [0, 1), or the model has a softcap, with which it is not supported; or an
        unknown normalisation, as T5X's None (the sum) and numbers are here.
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

    if loss_normalizing_factor not in get_args(Normalisation):
        raise ValueError(
            f"LOSS_NORMALIZING_FACTOR = {loss_normalizing_factor!r} must be one of {', '.join(get_args(Normalisation))}: a batch "
            "is divided into microbatches, whose losses are sums over what is counted. T5X's number for its checkpoints, 233472, is "
            "NUM_TOTAL_TARGET_TOKENS of 2048 rows of 114 targets."
        )

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        del extras
        weights_BT = out.batch["decoder_loss_weights"].astype(jnp.float32)
        learnt_BT, weight = weights_BT, weights_BT.sum()
        if loss_normalizing_factor == "NUM_TOTAL_TARGET_TOKENS":
            weight = jnp.float32(weights_BT.size)
        elif loss_normalizing_factor == "AVERAGE_PER_SEQUENCE":
            learnt_BT = _per_segment(weights_BT, out.batch["decoder_segment_ids"])
            weight = learnt_BT.sum()
        total, nll_X, log_z_X = weighted_cross_entropy(
            out.hidden_XD,
            out.head_VD(),
            out.batch["decoder_target_tokens"].reshape(-1),
            learnt_BT.reshape(-1),
            logit_scale=model.logit_scale,
            softcap=model.logit_softcap,
            z_loss=z_loss,
            implementation=implementation,
        )
        if label_smoothing:
            targets_X = out.batch["decoder_target_tokens"].reshape(-1)
            excess_X = model.logit_scale * _excess(out.hidden_XD, out.head_VD(), targets_X)
            total += label_smoothing * (learnt_BT.reshape(-1) * excess_X).sum()
        metrics = {}
        if z_loss:
            squares = (log_z_X.reshape(weights_BT.shape) ** 2 * weights_BT).sum()
            metrics["z_loss"] = (z_loss * squares, weights_BT.sum())
        nll_BT = nll_X.reshape(weights_BT.shape)
        if loss_normalizing_factor == "AVERAGE_PER_SEQUENCE":
            metrics["loss_per_sequence"] = ((nll_BT * learnt_BT).sum(), weight)
        return out.mean_loss(
            nll_BT,
            weights_BT,
            total=total,
            weight=weight,
            metrics=metrics,
            num_sources=num_sources,
        )

    return forward_objective(model, loss_fn)


def _per_segment(weights_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns the weights divided by their sum over their segment; 0 where this is 0, as in padding."""
    segments = weights_BT.shape[1] + 1  # a row has no more than tokens, and padding
    sum_of = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=segments))
    sums_BT = jnp.take_along_axis(sum_of(weights_BT, segments_BT), segments_BT, axis=1)
    return jnp.where(sums_BT > 0, weights_BT / jnp.where(sums_BT > 0, sums_BT, 1.0), 0.0)


def _excess(h_XD: jax.Array, head_VD: jax.Array, targets_X: jax.Array) -> jax.Array:
    """Returns each target's logit minus the mean logit of the other rows, float32, without logits of all rows.

    Smoothing by s adds s times this to the negative log-likelihood. Logits are linear in the rows, so that their mean is
    the logit of the mean row.
    """
    V = head_VD.shape[0]
    head_VD = head_VD.astype(h_XD.dtype).astype(jnp.float32)
    rows_XD = (V * head_VD[targets_X] - head_VD.sum(0)[None]) / (V - 1)
    return (h_XD.astype(jnp.float32) * rows_XD).sum(-1)
