"""Log-probabilities of a batch's target tokens, in one forward pass. Shapes: B rows, T length, X = B T, D width."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from model.kernels.cross_entropy import Implementation, token_log_probs


@dataclasses.dataclass(frozen=True)
class TargetsRead:
    """A model's predictions for a batch.

    Attributes:
      log_probs_BT: of all targets, of prompts and padding too; float32.
      hidden_BTD: final states.
      written: collections that the model has written.
    """

    log_probs_BT: jax.Array
    hidden_BTD: jax.Array
    written: Mapping[str, Any]


def read_targets(
    model: Any,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    implementation: Implementation = "auto",
    **applied: Any,
) -> TargetsRead:
    """Reads a batch of packed tokens.

    Args:
      model: decoder-only.
      variables: its parameters and other collections.
      batch: tokens, targets and segments, with positions where a row has several segments.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.
      **applied: for `model.apply`.
    """
    applied = {"mutable": [], **applied}
    out, written = model.apply(
        variables,
        batch["decoder_input_tokens"],
        positions_BT=batch.get("decoder_positions"),
        segments_BT=batch["decoder_segment_ids"],
        method="hidden",
        **applied,
    )
    targets_BT = batch["decoder_target_tokens"]
    log_p_X = token_log_probs(
        out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1]),
        model.apply(variables, method="head_VD"),
        targets_BT.reshape(-1),
        logit_scale=model.logit_scale,
        softcap=model.logit_softcap,
        implementation=implementation,
    )
    return TargetsRead(log_p_X.reshape(targets_BT.shape), out.hidden_BTD, written)
