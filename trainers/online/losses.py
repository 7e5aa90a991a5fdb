"""Policy gradients over sampled completions: advantages, and the losses that use them.

A loss maps `PolicyTokens` to (sum, weight); the training loss is the quotient of both, summed over all microbatches.
Formulas are TRL's (GRPOTrainer and RLOOTrainer, 1.16) unless noted otherwise.

Shapes: P prompts, G completions of a prompt, R completions, T tokens.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from espalier.common.ranges import NonNegative, Positive, Size, check_choice
from espalier.trainers.objectives.settings import check_not_negative, check_positive

_EPS = 1e-4  # added to the standard deviation of a group, as in TRL

Sum = tuple[jax.Array, jax.Array]  # numerator and weight
REDUCTIONS = ("grpo", "bnpo", "dapo", "dr_grpo")  # see `reduced`
RATIOS = ("token", "completion")  # see `grpo`


@flax.struct.dataclass
class PolicyTokens:
    """Sampled tokens with their log-probabilities and advantages; float32.

    Attributes:
      log_probs: [R, T], by the policy in training.
      old_log_probs: [R, T], by the policy that sampled the tokens; no gradient.
      advantages: [R, T], equal at all tokens of a completion if there is only one reward per completion.
      mask: [R, T], 1 at tokens of completions, including the end token.
      reference_log_probs: [R, T], by the reference; None without a reference.
    """

    log_probs: jax.Array
    old_log_probs: jax.Array
    advantages: jax.Array
    mask: jax.Array
    reference_log_probs: jax.Array | None = None


PolicyLoss = Callable[[PolicyTokens], Sum]


def leave_one_out(rewards_PG: jax.Array) -> jax.Array:
    """Each reward minus the mean of the prompt's other rewards: RLOO (arXiv 2402.14740, eq. 8)."""
    num_others = rewards_PG.shape[1] - 1
    return rewards_PG - (rewards_PG.sum(1, keepdims=True) - rewards_PG) / num_others


def group_normalised(rewards_PG: jax.Array) -> jax.Array:
    """(R - mean) / (standard deviation + 1e-4) within each prompt: GRPO (arXiv 2402.03300, section 4.1.2)."""
    return group_centred(rewards_PG) / (jnp.std(rewards_PG, axis=1, keepdims=True, ddof=1) + _EPS)


def group_centred(rewards_PG: jax.Array) -> jax.Array:
    """R - mean within each prompt: Dr. GRPO (arXiv 2503.20783), where dividing by the deviation is shown to bias."""
    return rewards_PG - rewards_PG.mean(1, keepdims=True)


def rloo(tokens: PolicyTokens, *, clip: Positive = 0.2) -> Sum:
    """RLOO's loss (arXiv 2402.14740): -min(w A, clip(w, 1 - clip, 1 + clip) A), averaged over completions.

    Args:
      tokens: log-probabilities and advantages A of completions, [rows, tokens]; w is the ratio of a whole completion's
        probabilities under the policy and under the policy that drew it.
      clip: distance of w from 1 beyond which it gives no gradient.

    Returns:
      The sum of the losses, and the number of completions.
    """
    check_positive(clip=clip)
    # Masked tokens contribute 0, and the advantage is the same at all tokens of a completion.
    log_ratio_R = ((tokens.log_probs - tokens.old_log_probs) * tokens.mask).sum(-1)
    count_R = tokens.mask.sum(-1)
    advantage_R = (tokens.advantages * tokens.mask).sum(-1) / jnp.maximum(count_R, 1.0)
    loss_R = clipped(log_ratio_R, advantage_R, clip, clip)
    present_R = (count_R > 0).astype(jnp.float32)
    return (loss_R * present_R).sum(), present_R.sum()


def grpo(
    tokens: PolicyTokens,
    *,
    clip: Positive = 0.2,
    clip_high: Positive | None = None,
    beta: NonNegative = 0.0,
    reduction: str = "grpo",
    max_length: Size | None = None,
    ratio: str = "token",
) -> Sum:
    """GRPO's loss (arXiv 2402.03300, eq. 3): -min(w A, clip(w) A) + beta k3; w is the ratio of a token or, in GSPO, a completion.

    Args:
      tokens: log-probabilities and advantages A of completions, [rows, tokens]; w is a probability under the policy
        divided by the one under the policy that drew the token.
      clip: the ratio is clipped below 1 - clip.
      clip_high: the ratio is clipped above 1 + clip_high; None for `clip` (DAPO, arXiv 2503.14476, uses 0.28).
      beta: weight of `k3`, the divergence from the reference.
      reduction, max_length: see `reduced`.
      ratio: 'token', or 'completion' for the geometric mean of the ratios of its tokens (GSPO, arXiv 2507.18071,
        eq. 7), with `reduction` 'grpo' only: other reductions would weigh a completion by its length.

    Returns:
      The sum of the losses, and the weight by which `reduction` divides it.

    Raises:
      ValueError: an unknown choice, a clip that is not positive, or `ratio` 'completion' with another reduction.
    """
    check_positive(clip=clip, **({} if clip_high is None else {"clip_high": clip_high}))
    check_choice("ratio", ratio, RATIOS)
    if ratio == "completion" and reduction != "grpo":
        raise ValueError(
            f"reduction = {reduction!r} weighs the one ratio of a completion by its length: ratio = 'completion' needs "
            "reduction = 'grpo'."
        )
    log_ratio_RT = tokens.log_probs - tokens.old_log_probs
    if ratio == "completion":
        count_R = jnp.maximum(tokens.mask.sum(-1), 1.0)
        log_ratio_RT = ((log_ratio_RT * tokens.mask).sum(-1) / count_R)[:, None]
    high = clip if clip_high is None else clip_high
    loss_RT = clipped(log_ratio_RT, tokens.advantages, clip, high)
    return _with_divergence(loss_RT, tokens, beta, reduction, max_length)


def cispo(
    tokens: PolicyTokens,
    *,
    clip_high: Positive = 4.0,
    beta: NonNegative = 0.0,
    reduction: str = "dapo",
    max_length: Size | None = None,
) -> Sum:
    """-min(w, 1 + clip_high) A log p + beta k3, where the weight has no gradient: CISPO (arXiv 2506.13585, eq. 4).

    No token loses its gradient, however far its ratio w has gone; the weight is bounded from above only, as in that paper's runs.

    Args:
      clip_high: largest weight minus 1.
      beta: weight of `k3`, the divergence from the reference.
      reduction, max_length: see `reduced`.
    """
    check_positive(clip_high=clip_high)
    ratio_RT = jnp.exp(tokens.log_probs - tokens.old_log_probs)
    weight_RT = jax.lax.stop_gradient(jnp.minimum(ratio_RT, 1 + clip_high))
    loss_RT = -weight_RT * tokens.advantages * tokens.log_probs
    return _with_divergence(loss_RT, tokens, beta, reduction, max_length)


def _with_divergence(
    loss_RT: jax.Array, tokens: PolicyTokens, beta: float, reduction: str, max_length: int | None
) -> Sum:
    check_not_negative(beta=beta)
    check_choice("reduction", reduction, REDUCTIONS)
    if beta:
        if tokens.reference_log_probs is None:
            raise ValueError(
                f"beta = {beta} weighs the divergence from a reference, but there is none: bind REFERENCE, or beta = 0."
            )
        loss_RT += beta * k3(tokens.log_probs, tokens.reference_log_probs)
    return reduced(loss_RT, tokens.mask, reduction, max_length)


def ppo(tokens: PolicyTokens, *, clip: float = 0.2) -> Sum:
    """PPO's loss (arXiv 1707.06347, eq. 7): -min(w A, clip(w, 1 - clip, 1 + clip) A), averaged over tokens.

    Args:
      tokens: log-probabilities and advantages A of completions, [rows, tokens]; w is the ratio of a token's probabilities
        under the policy and under the policy that drew it.
      clip: distance of w from 1 beyond which it gives no gradient.

    Returns:
      The sum of the losses, and the number of tokens.
    """
    return grpo(tokens, clip=clip, reduction="dapo")


def clipped(
    log_ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> jax.Array:
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A), w = exp(log_ratio)."""
    ratio = jnp.exp(log_ratio)
    limited = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio * advantages, limited * advantages)


def k3(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """q / p - log(q / p) - 1 with policy p and reference q: an unbiased estimate of KL(p, q), never negative.

    Schulman, http://joschu.net/blog/kl-approx.html.
    """
    difference = reference_log_probs - log_probs
    return jnp.expm1(difference) - difference


def reduced(
    loss_RT: jax.Array, mask_RT: jax.Array, reduction: str, max_length: int | None = None
) -> Sum:
    """Returns the sum and weight of token losses.

    'grpo' is the mean over completions of the mean over their tokens, and 'dapo' the mean over all tokens of the batch.
    'bnpo' is the mean over the tokens of each microbatch, averaged over microbatches by their number of completions.
    'dr_grpo' is the sum over a completion's tokens divided by `max_length`, averaged over completions.
    """
    if reduction == "dapo":
        return (loss_RT * mask_RT).sum(), mask_RT.sum()
    count_R = mask_RT.sum(-1)
    if reduction == "grpo":
        mean_R = (loss_RT * mask_RT).sum(-1) / jnp.maximum(count_R, 1.0)
        return mean_R.sum(), (count_R > 0).astype(jnp.float32).sum()
    total, present = (loss_RT * mask_RT).sum(), (count_R > 0).astype(jnp.float32).sum()
    if reduction == "bnpo":
        return total / jnp.maximum(mask_RT.sum(), 1.0) * present, present
    if max_length is None or max_length < 1:
        raise ValueError(
            f"max_length = {max_length}: reduction = 'dr_grpo' divides by the maximum tokens of a completion; give it."
        )
    return total / max_length, present


def generalised_advantages(
    rewards_RT: jax.Array,
    values_RT: jax.Array,
    mask_RT: jax.Array,
    *,
    gamma: float = 1.0,
    decay: float = 0.95,
) -> jax.Array:
    """Returns generalised advantage estimates [R, T] (arXiv 1506.02438, eq. 16), 0 where the mask is 0.

    A_t = delta_t + gamma decay A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t. Value and advantage after the last
    token of a completion are 0.

    Args:
      rewards_RT: reward of each token.
      values_RT: the critic's value before each token is sampled.
      mask_RT: 1 at the tokens of completions, which are contiguous.
      gamma: discount.
      decay: lambda; 1 gives the return minus the value, 0 the one-step error delta_t.
    """
    values_RT = values_RT * mask_RT
    after_RT = jnp.concatenate([values_RT[:, 1:], jnp.zeros_like(values_RT[:, :1])], axis=1)
    delta_RT = (rewards_RT + gamma * after_RT - values_RT) * mask_RT

    def back(later_R: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta_R, mask_R = now
        advantage_R = (delta_R + gamma * decay * later_R) * mask_R
        return advantage_R, advantage_R

    start = jnp.zeros_like(delta_RT[:, 0])
    _, advantages_TR = jax.lax.scan(back, start, (delta_RT.T, mask_RT.T), reverse=True)
    return advantages_TR.T


def whitened(values_RT: jax.Array, mask_RT: jax.Array) -> jax.Array:
    """Returns values scaled to mean 0 and variance 1 over the tokens with mask 1, and 0 elsewhere."""
    count = jnp.maximum(mask_RT.sum(), 1.0)
    mean = (values_RT * mask_RT).sum() / count
    variance = ((values_RT - mean) ** 2 * mask_RT).sum() / count
    return (values_RT - mean) * jax.lax.rsqrt(variance + 1e-8) * mask_RT


def value_loss(
    values_RT: jax.Array, old_values_RT: jax.Array, returns_RT: jax.Array, *, clip: float = 0.2
) -> jax.Array:
    """max((V - R)^2, (V' - R)^2) / 2 [R, T], where V' is V clipped to at most `clip` from the old value."""
    near_RT = old_values_RT + jnp.clip(values_RT - old_values_RT, -clip, clip)
    return 0.5 * jnp.maximum((values_RT - returns_RT) ** 2, (near_RT - returns_RT) ** 2)
