"""The choice and weights of each token's experts, auxiliary losses, statistics of the load, and the way to the experts.

`send` brings tokens to rows sorted by expert, and `collect` the experts' results back to the tokens; on a mesh,
model/moe/parallel.py does. Choices, losses and statistics are computed in float32. Tokens that are not `real` (padding) do not count.

Shapes: M tokens, of any leading dimensions; B rows of T tokens; D width; E experts; K experts per token. A choice is
one of a token's K experts, C = M * K in all; index E means no expert. R rows, of which `sizes_E` counts those of each
expert.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from espalier.common.ranges import CalledWith, check_choice
from espalier.model import axes

# The factory of a router, see `router_of`.
Router = Annotated[
    Callable[..., nn.Module], CalledWith("features", "axes", "dtype", "param_dtype", "name")
]

# What makes scores of logits: a softmax over the experts (Switch, Mixtral, Qwen3-MoE), or a sigmoid of each (DeepSeek-V3,
# arXiv 2412.19437, section 2.1.2; Cohere2-MoE).
Score = Literal["softmax", "sigmoid"]
_LEAST_SUM = 1e-20  # of weights that are divided by it; float32 sigmoids of logits below -103 are 0


@flax.struct.dataclass
class Scores:
    """The output of a router for tokens, float32.

    Attributes:
      logits_ME: the router's projection.
      scores_ME: the weights of experts before any renormalisation: softmax or sigmoids of the logits.
      probs_ME: the scores over their sum over all experts: of a softmax the scores themselves. Losses and statistics are of
        these.
    """

    logits_ME: jax.Array
    scores_ME: jax.Array
    probs_ME: jax.Array


@flax.struct.dataclass
class Routes:
    """The experts of each token, and the float32 weights of their outputs."""

    experts_MK: jax.Array
    weights_MK: jax.Array


def router_of(mixture: Any, **of_flax: Any) -> Any:
    """Returns the router of a mixture module, a float32 projection to E logits.

    The mixture has the attributes `router`, `num_experts` and `config`. `of_flax` may be parent=None, for a router whose
    settings alone are read.
    """
    return mixture.router(
        features=mixture.num_experts,
        axes=(axes.EMBED, axes.UNMODELED),
        dtype=jnp.float32,
        param_dtype=mixture.config.storage_dtype,
        name="router",
        **of_flax,
    )


def scored(mixture: Any, x_BTD: jax.Array, score: Score = "softmax") -> Scores:
    """Returns the scores of a mixture's router for each token, and sows the probabilities."""
    check_choice(f"{type(mixture).__name__}.score", score, get_args(Score))
    # A TPU's default would round float32 to bfloat16, and choose other experts than a CPU or an export does.
    with jax.default_matmul_precision("highest"):
        logits_BTE = router_of(mixture)(x_BTD)
    if score == "softmax":
        scores_BTE = probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        # The quotient of a sigmoid and the sum of all, which does not underflow.
        probs_BTE = jax.nn.softmax(jax.nn.log_sigmoid(logits_BTE), axis=-1)
    mixture.sow("intermediates", "router_probs", probs_BTE)
    return Scores(logits_BTE, scores_BTE, probs_BTE)


def route(
    scores_ME: jax.Array,
    *,
    top_k: int,
    renormalise: bool = True,
    order_ME: jax.Array | None = None,
) -> Routes:
    """Returns the `top_k` first experts of each token by `order_ME`; ties go to the first.

    Without renormalisation the weights are the scores: probabilities (Switch, arXiv 2101.03961; BAM, arXiv
    2408.08274; Nexus, arXiv 2408.15901) or sigmoids. With renormalisation they are the scores over their sum: of
    probabilities this is the softmax over the logits of the chosen experts (Mixtral, arXiv 2401.04088; BTX, arXiv
    2403.07816; Cohere2-MoE's 'softmax'; Qwen3-MoE's norm_topk_prob). With renormalisation and top-1 the
    weight is always 1, so the router learns only from auxiliary losses. With K = E all experts are mixed
    by their scores.

    Args:
      scores_ME: the weights of all experts, softmax or sigmoids.
      order_ME: what the choice goes by, for which a larger number is better; None for the scores. float32 sigmoids of
        logits above 17 are equal, so that these are to be ordered by their logits.
    """
    if order_ME is None:
        weights_MK, experts_MK = jax.lax.top_k(scores_ME, top_k)
    else:
        experts_MK = jax.lax.top_k(order_ME, top_k)[1]
        weights_MK = jnp.take_along_axis(scores_ME, experts_MK, axis=-1)
    if renormalise:
        total_M1 = jnp.sum(weights_MK, axis=-1, keepdims=True)
        weights_MK = weights_MK / jnp.maximum(total_M1, _LEAST_SUM)
    return Routes(experts_MK=experts_MK, weights_MK=weights_MK)


def real_tokens(x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Returns True [B, T] for tokens that are not padding."""
    return jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT != 0


# ---- Auxiliary losses and statistics.


def report(
    mixture: Any,
    probs_BTE: jax.Array,
    experts_BTK: jax.Array,
    real_BT: jax.Array,
    *,
    kept_BTK: jax.Array | None = None,
) -> None:
    """Sows the balance loss, the choices and the statistics of a mixture module; 'dropped' only with `kept_BTK`."""
    mixture.sow("intermediates", "router_experts", experts_BTK)
    if mixture.balance_loss:
        balance = balance_loss(probs_BTE, experts_BTK, real_BT)
        mixture.sow("losses", "balance", mixture.balance_loss * balance)
    if mixture.is_mutable_collection("metrics"):
        dispatched_BTK = jnp.ones(experts_BTK.shape, bool) if kept_BTK is None else kept_BTK
        for name, value in statistics(probs_BTE, experts_BTK, dispatched_BTK, real_BT).items():
            if name != "dropped" or kept_BTK is not None:
                mixture.sow("metrics", f"router_{name}", value)


def load(experts_MK: jax.Array, num_experts: int, real_M: jax.Array) -> jax.Array:
    """Returns each expert's share [E] of the choices of real tokens, which include choices without an expert."""
    counts_ME = jax.nn.one_hot(experts_MK, num_experts, dtype=jnp.float32).sum(-2)
    return mean_of(counts_ME, real_M) / experts_MK.shape[-1]


CHOICE_BIAS = "choice_bias"  # the name of a mixture's biases, and of the counts that move them


def choice_bias(mixture: Any, experts: int) -> jax.Array:
    """Returns the biases [E] of a mixture's scores where it chooses experts, which no gradient trains.

    They balance the load without a loss (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2): each rises
    after a step in which its expert had less than the mean load (trainers/optim/balance_bias.py).
    """
    zeros = nn.initializers.zeros_init()
    return axes.constant(mixture, CHOICE_BIAS, zeros, (experts,), jnp.float32)


def count_choices(
    mixture: Any, experts_BTK: jax.Array, num_experts: int, real_BT: jax.Array
) -> None:
    """Sows how many choices of real tokens each expert got, int32 [E], into the collection 'counts'."""
    chosen_BTK = jnp.where(real_BT[..., None], experts_BTK, num_experts)
    counts_E = jax.nn.one_hot(chosen_BTK, num_experts, dtype=jnp.int32).sum((0, 1, 2))
    mixture.sow("counts", CHOICE_BIAS, counts_E, reduce_fn=jnp.add, init_fn=lambda: 0)


def balance_loss(probs_ME: jax.Array, experts_MK: jax.Array, real_M: jax.Array) -> jax.Array:
    """Returns E * sum_e load_e * mean probability of e (Switch, arXiv 2101.03961, equation 4).

    The load is a share of choices. Whatever K is, the value is 1 for uniform probabilities. It is a product of two means
    over the tokens at hand, as in the paper: of a batch in microbatches it is the mean of theirs, which is another number.
    Of sigmoids, with `Scores.probs_ME`, it is DeepSeek-V3's (arXiv 2412.19437, equations 17 to 20) over the batch instead
    of each sequence.
    """
    num_experts = probs_ME.shape[-1]
    load_E = load(experts_MK, num_experts, real_M)
    return num_experts * jnp.sum(load_E * mean_of(probs_ME, real_M))


def z_loss(logits_ME: jax.Array, real_M: jax.Array) -> jax.Array:
    """Returns the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    return mean_of(jax.nn.logsumexp(logits_ME, axis=-1) ** 2, real_M)


def statistics(
    probs_ME: jax.Array, experts_MK: jax.Array, kept_MK: jax.Array, real_M: jax.Array
) -> dict[str, jax.Array]:
    """Returns statistics of how a router distributes tokens over experts.

    Returns:
      load: each expert's share of the choices, [E].
      load_max: the largest load.
      entropy: mean entropy of a token's probabilities, in nats; of sigmoids, see `Scores.probs_ME`.
      top_probability: mean of a token's largest probability.
      dropped: share of the choices where `kept_MK` is False.
    """
    load_E = load(experts_MK, probs_ME.shape[-1], real_M)
    entropy_M = -jnp.sum(jax.scipy.special.xlogy(probs_ME, probs_ME), axis=-1)
    return {
        "load": load_E,
        "load_max": load_E.max(),
        "entropy": mean_of(entropy_M, real_M),
        "top_probability": mean_of(probs_ME.max(-1), real_M),
        "dropped": 1.0 - mean_of(kept_MK.astype(jnp.float32).mean(-1), real_M),
    }


def mean_of(values: jax.Array, real_M: jax.Array) -> jax.Array:
    """Returns the mean over real tokens of values [M] or [M, E]; 0 without real tokens."""
    axes = tuple(range(real_M.ndim))
    mask = real_M.reshape(real_M.shape + (1,) * (values.ndim - real_M.ndim))
    return jnp.where(mask, values, 0.0).sum(axes) / jnp.maximum(real_M.sum(), 1)


# ---- Limits on the number of tokens of an expert.


def place_in_line(experts_BX: jax.Array) -> jax.Array:
    """Returns for each choice the number of earlier choices of the same expert in its row, [B, X].

    The choices of a row are in the order of its tokens. Whether a choice is among an expert's first n
    choices therefore does not depend on what later tokens or other rows are.
    """
    order_BX = jnp.argsort(experts_BX, axis=-1, stable=True)
    sorted_BX = jnp.take_along_axis(experts_BX, order_BX, axis=-1)
    first_BX = jax.vmap(lambda row_X: jnp.searchsorted(row_X, row_X, side="left"))(sorted_BX)
    place_BX = jnp.arange(experts_BX.shape[-1]).reshape(1, -1) - first_BX
    return jnp.put_along_axis(jnp.zeros_like(order_BX), order_BX, place_BX, axis=-1, inplace=False)


def first_in_line(experts_BTK: jax.Array, count_B11: jax.Array | int, *, none: int) -> jax.Array:
    """Returns the choices; `none` replaces those after the first `count` of their expert in their row."""
    place_BX = place_in_line(experts_BTK.reshape(len(experts_BTK), -1))
    return jnp.where(place_BX.reshape(experts_BTK.shape) < count_B11, experts_BTK, none)


# ---- The way of tokens to their experts and back.


@flax.struct.dataclass
class Dispatch:
    """Rows sorted by expert: row r has choice order_R[r]; choice c has row rank_C[c] if used_C[c]."""

    order_R: jax.Array
    rank_C: jax.Array
    used_C: jax.Array
    sizes_E: jax.Array


def dispatch(experts_C: jax.Array, num_experts: int, *, rows: int | None = None) -> Dispatch:
    """Sorts choices by expert, stably; choices without an expert are last.

    Args:
      experts_C: expert of each choice; num_experts for none.
      num_experts: E.
      rows: R; at most R choices may have an expert. None for one row per choice.
    """
    count = len(experts_C)
    sorted_C, order_C = jax.lax.sort((experts_C, jnp.arange(count)), num_keys=1, is_stable=True)
    rank_C = jnp.zeros_like(order_C).at[order_C].set(jnp.arange(count), unique_indices=True)
    ends_E = jnp.searchsorted(sorted_C, jnp.arange(num_experts), side="right")
    rows = count if rows is None else min(rows, count)
    return Dispatch(
        order_R=order_C[:rows],
        rank_C=jnp.minimum(rank_C, rows - 1),
        used_C=(experts_C < num_experts) & (rank_C < rows),
        sizes_E=jnp.diff(ends_E, prepend=0),
    )


def send(
    x_BTD: jax.Array, experts_BTK: jax.Array, num_experts: int, *, rows: int | None = None
) -> tuple[jax.Array, Dispatch]:
    """Returns the tokens' rows [R, D] sorted by expert, and the `Dispatch` for `collect`."""
    plan = dispatch(experts_BTK.reshape(-1), num_experts, rows=rows)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return x_MD[plan.order_R // experts_BTK.shape[-1]], plan


def collect(rows_RD: jax.Array, weights_BTK: jax.Array, plan: Dispatch) -> jax.Array:
    """Returns each token's weighted sum of its experts' rows, [B, T, D].

    The sum is computed in float32 and returned in the dtype of the rows. A choice without a row adds
    nothing.
    """
    rows_BTKD = by_choice(rows_RD, plan).reshape(*weights_BTK.shape, -1)
    summed = jnp.einsum("btk,btkd->btd", weights_BTK, rows_BTKD.astype(jnp.float32))
    return summed.astype(rows_RD.dtype)


def by_choice(rows_RD: jax.Array, plan: Dispatch) -> jax.Array:
    """Returns the rows in the order of the choices, [C, D]; zeros for choices without a row."""
    # `where`, not a product with zero: unused rows may contain NaN.
    return jnp.where(plan.used_C.reshape(-1, 1), rows_RD[plan.rank_C], 0)
