"""The input of preference losses: log-probabilities of two completions of one prompt. Shape: P pairs.

In the terms of arXiv 2410.11677: y_w is `chosen`, y_l `rejected`, pi_theta the policy, pi_ref the reference.
"""

import flax.struct
import jax


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
