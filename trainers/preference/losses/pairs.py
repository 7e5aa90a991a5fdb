"""The input of preference losses: log-probabilities of two completions of one prompt, in rows of packed pairs.

In the terms of arXiv 2410.11677: y_w is `chosen`, y_l `rejected`, pi_theta the policy, pi_ref the reference. Those of both
completions come from one forward pass.

Shapes: B rows, T length, K pairs of a row, S = 2 K completions of a row, P = B K pairs of a batch.
"""

import flax.struct
import jax
import jax.numpy as jnp

from espalier.trainers.objectives.base import Batch

_EMPTY = -1.0  # log-probability of a slot without a pair; losses are finite at this value


class MissingReferenceError(ValueError):
    """A loss needs log-probabilities by a reference, and there are none."""


class MissingLabelsError(ValueError):
    """A loss of single completions needs labels, and there are none."""


@flax.struct.dataclass
class PairLogProbs:
    """Natural log-probabilities, summed over a completion's tokens (including EOS); float32 [P].

    A slot without a pair has weight 0, lengths 1 and log-probabilities -1, so that every loss is finite there.

    Attributes:
      chosen, rejected: log-probabilities of the completions by the policy.
      chosen_length, rejected_length: tokens of the completions, at least 1.
      weights: 1 for a pair, 0 for a slot without a pair.
      mean_chosen_length: scalar, mean tokens of a chosen completion over the whole batch, not only over the P pairs of
        this microbatch. Dividing a sum over tokens by it gives a mean that does not depend on microbatches.
      ref_chosen, ref_rejected: log-probabilities by the reference; None without a reference.
      labels: labels of unpaired examples (KTO): 1 for a desirable completion, 0 for an undesirable one. `chosen` is
        then the completion, and `rejected` the completion of another example after the same prompt, for the estimate
        of the divergence. None for pairs.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    weights: jax.Array
    mean_chosen_length: jax.Array
    ref_chosen: jax.Array | None = None
    ref_rejected: jax.Array | None = None
    labels: jax.Array | None = None

    @property
    def chosen_log_ratio(self) -> jax.Array:
        """log pi_theta(y_w) / pi_ref(y_w); MissingReferenceError without a reference."""
        return self.chosen - self._reference()[0]

    @property
    def rejected_log_ratio(self) -> jax.Array:
        """log pi_theta(y_l) / pi_ref(y_l); MissingReferenceError without a reference."""
        return self.rejected - self._reference()[1]

    @property
    def margin(self) -> jax.Array:
        """Delta, the log-ratio of the chosen completion minus that of the rejected one."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    @property
    def ref_margin(self) -> jax.Array:
        """log pi_ref(y_w) / pi_ref(y_l); MissingReferenceError without a reference."""
        ref_chosen, ref_rejected = self._reference()
        return ref_chosen - ref_rejected

    @property
    def chosen_mean(self) -> jax.Array:
        """Log-probability of the chosen completion per token."""
        return self.chosen / self.chosen_length

    @property
    def rejected_mean(self) -> jax.Array:
        """Log-probability of the rejected completion per token."""
        return self.rejected / self.rejected_length

    def _reference(self) -> tuple[jax.Array, jax.Array]:
        if self.ref_chosen is None or self.ref_rejected is None:
            raise MissingReferenceError(
                "This loss compares with a reference model, but there is none: bind REFERENCE, or choose a loss "
                "without one (slic_hinge, simpo, cpo, alpha_po, orpo, nll)."
            )
        return self.ref_chosen, self.ref_rejected


def pairs_of(batch: Batch, sums_BS: jax.Array, reference_BS: jax.Array | None) -> PairLogProbs:
    """Returns the pairs of a batch in the order of its rows, from log-probabilities [B, 2K]."""
    weights_P = batch["pair_weights"].reshape(-1)
    lengths_BS = jax.lax.stop_gradient(by_completion(batch, jnp.ones_like(sums_BS[:, :1])))

    def sides(values_BS: jax.Array, empty: float) -> tuple[jax.Array, jax.Array]:
        chosen_rejected_P2 = values_BS.astype(jnp.float32).reshape(-1, 2)
        filled_P2 = jnp.where(weights_P[:, None] > 0, chosen_rejected_P2, empty)
        return filled_P2[:, 0], filled_P2[:, 1]

    chosen_P, rejected_P = sides(sums_BS, _EMPTY)
    chosen_length_P, rejected_length_P = sides(lengths_BS, 1.0)
    ref_chosen_P, ref_rejected_P = None, None
    if reference_BS is not None:
        ref_chosen_P, ref_rejected_P = sides(jax.lax.stop_gradient(reference_BS), _EMPTY)
    labels_BK = batch.get("pair_labels")
    return PairLogProbs(
        chosen=chosen_P,
        rejected=rejected_P,
        chosen_length=chosen_length_P,
        rejected_length=rejected_length_P,
        weights=weights_P,
        mean_chosen_length=batch["chosen_tokens_per_pair"][0],
        ref_chosen=ref_chosen_P,
        ref_rejected=ref_rejected_P,
        labels=None if labels_BK is None else labels_BK.reshape(-1),
    )


def tails_weighted(batch: Batch, weight: float) -> Batch:
    """Returns the batch with loss weight `weight` for tokens of a completion past the length of the shorter one.

    The batch then gives the log-probabilities of LD-DPO (arXiv 2409.06411, with alpha = `weight`): tokens within the length
    of the pair's shorter completion have weight 1.
    """
    counted_BT = batch["decoder_loss_weights"]
    segments = 2 * batch["pair_weights"].shape[-1]
    member_BTS = jax.nn.one_hot(batch["decoder_segment_ids"] - 1, segments) * counted_BT[..., None]
    lengths_BK2 = member_BTS.sum(1).reshape(len(counted_BT), -1, 2)
    shared_BS = jnp.repeat(lengths_BK2.min(-1), 2, axis=1)
    past_BTS = jnp.cumsum(member_BTS, axis=1) > shared_BS[:, None]
    tail_BT = (past_BTS * member_BTS).sum(-1) > 0
    return {**batch, "decoder_loss_weights": jnp.where(tail_BT, weight * counted_BT, counted_BT)}


def weights_on_policy(
    batch: Batch, log_probs_BT: jax.Array, log_collisions_BT: jax.Array
) -> jax.Array:
    """Returns weights of pairs, [P], by how likely the policy samples their completions: WPO (arXiv 2406.11827, eq. 2).

    A completion y has exp(mean_t(log p(y_t) - log sum_v p(v)^2)), which is 1 where its tokens are as likely as sampled ones
    are on average; a pair has the product of both, at most 1 as in the authors' code. No gradient flows through them.
    """
    ratios_BT = jax.lax.stop_gradient(log_probs_BT - log_collisions_BT)
    lengths_BS = by_completion(batch, jnp.ones_like(ratios_BT))
    means_BS = by_completion(batch, ratios_BT) / jnp.maximum(lengths_BS, 1.0)
    return jnp.exp(jnp.minimum(means_BS.reshape(-1, 2).sum(-1), 0.0))


def by_completion(
    batch: Batch, values_BT: jax.Array, weights: str = "decoder_loss_weights"
) -> jax.Array:
    """Returns sums over the tokens of each completion, [B, 2K], weighted by a column of the batch."""
    segments = 2 * batch["pair_weights"].shape[-1]
    # Weights are 0 at prompts and padding; segment 0 (padding) becomes an all-zero one-hot row.
    member_BTS = jax.nn.one_hot(batch["decoder_segment_ids"] - 1, segments, dtype=jnp.float32)
    counted_BT = values_BT * batch[weights].astype(jnp.float32)
    return jnp.einsum("bt,bts->bs", counted_BT, member_BTS)
