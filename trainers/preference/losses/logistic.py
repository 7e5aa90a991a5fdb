"""The logistic loss of most preference losses, with label smoothing."""

import jax
from jax.nn import log_sigmoid

from trainers.preference.losses.settings import check_smoothing


def logistic(logits: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """-(1 - eps) log sigma(z) - eps log sigma(-z), of the shape of z.

    Args:
      logits: z, the log-odds that the chosen completion is preferred.
      label_smoothing: eps, the assumed share of swapped labels, in [0, 0.5). With DPO's z this is cDPO
        (https://ericmitchell.ai/cdpo.pdf).
    """
    check_smoothing(label_smoothing)
    if not label_smoothing:
        return -log_sigmoid(logits)
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
