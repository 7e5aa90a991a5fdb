"""Next-token prediction. Shapes: B batch, T length, D width, V vocabulary, S sources."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels.cross_entropy import Implementation, weighted_cross_entropy
from trainers.objectives import sown
from trainers.objectives.base import Batch, LossOut, Objective


def language_modelling(
    *,
    model: Any,
    num_sources: int = 0,
    z_loss: float = 0.0,
    implementation: Implementation = "auto",
) -> Objective:
    """Cross-entropy of the targets, plus `z_loss` * (log Z)^2 per token (PaLM, arXiv 2204.02311).

    What a module sows into the collection 'losses' (`self.sow("losses", "balance", value)`, a mean
    over the batch) is added to the loss per token and reported as metric 'auxiliary_loss'. What one sows
    into 'metrics' is reported in training, averaged over layers: 'mlp/load' for "load" of layers' MLPs,
    'mlp/load/0', 'mlp/load/1', ... where it is a vector. Modules that draw use the rng 'dropout', which is absent in evaluation: `self.has_rng("dropout")` tells.
    Modules may read and, in training, write their other collections.

    Args:
      model: a decoder-only module with `hidden`, `head_VD`, logit_scale and logit_softcap.
      num_sources: S; with S > 0, metric 'source_loss' is a vector over batch["source_ids"].
      z_loss: weight of the auxiliary loss; 1e-4 in T5 and PaLM.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.

    Returns:
      The loss function; its metric 'loss' is the cross-entropy in nats per token without z-loss.
    """

    def loss_fn(
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        *,
        variables: Mapping[str, Any],
        extras: Any,
    ) -> LossOut:
        del extras
        kept, watched = ([], []) if rng is None else (list(variables), ["metrics"])
        out, written = model.apply(
            {"params": params, **variables},
            batch["decoder_input_tokens"],
            positions_BT=batch["decoder_positions"],
            segments_BT=batch["decoder_segment_ids"],
            rngs=None if rng is None else {"dropout": rng},
            mutable=["losses", *watched, *kept],
            method="hidden",
        )
        weights_BT = batch["decoder_loss_weights"].astype(jnp.float32)
        total, nll_X, log_z_X = weighted_cross_entropy(
            out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1]),
            model.apply({"params": params}, method="head_VD"),
            batch["decoder_target_tokens"].reshape(-1),
            weights_BT.reshape(-1),
            logit_scale=model.logit_scale,
            softcap=model.logit_softcap,
            z_loss=z_loss,
            implementation=implementation,
        )
        weighted_BT = nll_X.reshape(weights_BT.shape) * weights_BT
        weight = weights_BT.sum()
        metrics = {"loss": (weighted_BT.sum(), weight)}
        if z_loss:
            squares = (log_z_X.reshape(weights_BT.shape) ** 2 * weights_BT).sum()
            metrics["z_loss"] = (z_loss * squares, weight)
        added, reported = sown.added(written, weight, scanned=model.config.scan_layers)
        total = total + added
        metrics |= reported
        if num_sources:
            one_hot_BS = jax.nn.one_hot(batch["source_ids"], num_sources, dtype=jnp.float32)
            metrics["source_loss"] = (
                weighted_BT.sum(-1) @ one_hot_BS,
                weights_BT.sum(-1) @ one_hot_BS,
            )
        updates = {name: written[name] for name in kept}
        return LossOut(sum=total, weight=weight, metrics=metrics, variables=updates)

    return Objective(loss_fn=loss_fn)
