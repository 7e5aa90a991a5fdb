"""Classification of images. Shapes: B batch, N classes."""

from typing import Any

import jax
import jax.numpy as jnp

from espalier.common.ranges import Count, Fraction
from espalier.trainers.objectives.base import Batch, LossOut, Objective, loss_in
from espalier.trainers.objectives.forward import Forward, forward_objective


@loss_in("nats per image")
def classification(
    *, model: Any, num_sources: Count = 0, label_smoothing: Fraction = 0.0
) -> Objective:
    """Cross-entropy of labels, smoothed towards the uniform distribution (arXiv 1512.00567).

    In training, batch normalisation uses the statistics of the batch and averages them into the model's collection
    'batch_stats'. Evaluation uses these averages, so that a row of weight 0 changes nothing.

    Args:
      model: a module called with (images, train=), whose logits are [B, N].
      num_sources: number of sources of the training stream; not used, because there is one source.
      label_smoothing: share of a label's weight that is spread over all classes.

    Returns:
      The objective. Its metric 'loss' is the cross-entropy in nats without smoothing, and 'accuracy' the share of
      images whose label has the largest logit.
    """
    del num_sources
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"classification: label_smoothing = {label_smoothing} must lie in [0, 1).")

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        del extras
        batch = out.batch
        log_p_BN = jax.nn.log_softmax(out.output.astype(jnp.float32))
        labels_B, weights_B = batch["labels"], batch["weights"].astype(jnp.float32)
        nll_B = -jnp.take_along_axis(log_p_BN, labels_B[:, None], axis=-1)[:, 0]
        smoothed_B = (1 - label_smoothing) * nll_B - label_smoothing * log_p_BN.mean(-1)
        right_B = (log_p_BN.argmax(-1) == labels_B).astype(jnp.float32)
        weight, total = weights_B.sum(), (smoothed_B * weights_B).sum()
        metrics = {
            "loss": ((nll_B * weights_B).sum(), weight),
            "accuracy": ((right_B * weights_B).sum(), weight),
        }
        return LossOut(sum=total, weight=weight, metrics=metrics, variables=out.updates)

    return forward_objective(model, loss_fn, method=None, arguments=_images)


def _images(batch: Batch, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (batch["images"],), {"train": training}
