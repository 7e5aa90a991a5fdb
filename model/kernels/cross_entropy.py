"""Cross-entropy of hidden states against a vocabulary, without storing the whole batch's logits.

Logits, log-sum-exp and losses are float32 whatever the operands are. Four implementations have the same
values and gradients:
  reference  computes logits [T, V], then gathers the targets' logits: the definition.
  onehot     computes the target's logit as a masked sum, which a TPU fuses into the product, so that
             float32 logits are never written.
  chunked    loops over chunks of tokens, gradients included; needs memory for [chunk, V].
  blocked    loops over blocks of the vocabulary, for large tables split over many devices
             (model/kernels/cross_entropy_blocked.py).

Shapes: T tokens (batch and length joined), C tokens of a chunk, J chunks, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from espalier.model.kernels.cross_entropy_blocked import blocked_nll
from espalier.model.kernels.platform import reference_forms, target_platform
from espalier.model.kernels.vocab_logits import LogitForm, join_rows, split_rows

Implementation = Literal["auto", "reference", "onehot", "chunked", "blocked"]
IMPLEMENTATIONS = get_args(Implementation)
# Above this, a batch of float32 logits does not fit in memory with a model.
LARGE_VOCABULARY = 65_536
CHUNK_LOGITS = 2**26  # maximum per chunk: 256 MiB


class _Form(NamedTuple):
    """The static arguments of a call."""

    logits: LogitForm
    z_loss: float
    chunk: int


def weighted_cross_entropy(
    h_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    implementation: str = "auto",
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns sum_t w_t (nll_t + z_loss * log_z_t^2), with logits softcap(logit_scale * h head^T).

    Args:
      h_TD: hidden states.
      head_VD: rows of the output matrix, cast to the dtype of h.
      targets_T: ids in [0, V).
      weights_T: nonnegative weights; 0 for padding.
      logit_scale, softcap: see LogitForm.
      z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311).
      implementation: 'auto' chooses by platform and vocabulary; see the top of this file.
      chunk: tokens per step of 'chunked', reduced if their logits would exceed CHUNK_LOGITS.

    Returns:
      (the sum, a differentiable float32 scalar; nll_T and log_z_T, float32, for metrics only: no
      gradient flows through them).
    """
    form, implementation = _resolve(head_VD, logit_scale, softcap, z_loss, implementation, chunk)
    head_VD = head_VD.astype(h_TD.dtype)
    weights_T = weights_T.astype(jnp.float32)
    if implementation == "chunked":
        total, nll_T, log_z_T = _chunked_sum(form, h_TD, head_VD, targets_T, weights_T)
    else:
        nll_T, log_z_T = _nll(form, implementation, h_TD, head_VD, targets_T)
        total = jnp.sum(weights_T * (nll_T + z_loss * log_z_T * log_z_T))
    return total, jax.lax.stop_gradient(nll_T), jax.lax.stop_gradient(log_z_T)


def token_log_probs(
    h_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    chunk: int = 512,
) -> jax.Array:
    """Returns log p(target) [T] of every token in nats, float32, differentiable.

    `weighted_cross_entropy` describes the arguments. 'auto' stores the logits of all tokens if they fit in one chunk. 'chunked' computes the logits twice here: the
    cotangent of each token is only known in the backward pass.
    """
    few = h_TD.shape[0] * head_VD.shape[0] <= CHUNK_LOGITS
    if implementation == "auto" and target_platform() == "cpu" and few:
        implementation = "onehot"
    form, implementation = _resolve(head_VD, logit_scale, softcap, 0.0, implementation, chunk)
    head_VD = head_VD.astype(h_TD.dtype)
    if implementation == "chunked":
        return -_chunked_nll(form, h_TD, head_VD, targets_T)[0]
    return -_nll(form, implementation, h_TD, head_VD, targets_T)[0]


def chunk_size(vocab: int, chunk: int = 512) -> int:
    """Returns the tokens per chunk: `chunk`, or fewer if their logits would exceed CHUNK_LOGITS."""
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be positive.")
    return min(chunk, max(1, CHUNK_LOGITS // vocab))


def map_tokens(fn: Callable[..., Any], *arrays: jax.Array, vocab: int, chunk: int = 512) -> Any:
    """Applies `fn` to all tokens, a chunk at a time, so that logits of all tokens are never in memory.

    The result is differentiable, also with respect to arrays that `fn` closes over, such as an output matrix. The
    backward pass recomputes each chunk instead of storing its logits.

    Args:
      fn: called with the arrays of a chunk, [C, ...] each; returns a pytree of [C, ...]. It must treat tokens
        independently, and be finite for padding, which is zeros.
      *arrays: arrays [T, ...], such as hidden states.
      vocab, chunk: see `chunk_size`.
    """
    T = arrays[0].shape[0]
    parts = split_rows(chunk_size(vocab, chunk), *arrays)
    outs = jax.lax.map(lambda part: jax.checkpoint(fn)(*part), parts)
    return jax.tree.map(functools.partial(join_rows, T), outs)


def _resolve(head_VD, logit_scale, softcap, z_loss, implementation, chunk) -> tuple[_Form, str]:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown cross-entropy implementation {implementation!r}: choose from {IMPLEMENTATIONS}."
        )
    chunk = chunk_size(head_VD.shape[0], chunk)
    if reference_forms():
        implementation = "reference"
    elif implementation == "auto":
        if target_platform() == "cpu":
            implementation = "chunked"
        else:
            implementation = "blocked" if head_VD.shape[0] > LARGE_VOCABULARY else "onehot"
    logits = LogitForm(float(logit_scale), None if softcap is None else float(softcap))
    return _Form(logits, z_loss, chunk), implementation


def _is_target(targets_T: jax.Array, vocab: int) -> jax.Array:
    return targets_T[:, None] == jnp.arange(vocab, dtype=targets_T.dtype)[None, :]


@jax.custom_vjp
def _gradients_together(h_TD, head_VD):
    """Identity whose two gradients are computed at the same time.

    Otherwise XLA may compute the head's gradient only after the backward pass of all layers. The logits'
    gradient, which is as large as the logits, would then stay in memory until the end.
    """
    return h_TD, head_VD


_gradients_together.defvjp(
    lambda h_TD, head_VD: ((h_TD, head_VD), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


def _nll(form: _Form, implementation: str, h_TD, head_VD, targets_T):
    """Returns (nll_T, log_z_T), computed by an implementation that needs no weights."""
    if implementation == "blocked":
        return blocked_nll(form.logits, h_TD, head_VD, targets_T)
    if implementation == "onehot":
        h_TD, head_VD = _gradients_together(h_TD, head_VD)
    logits_TV = form.logits.logits(h_TD, head_VD)
    log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
    if implementation == "onehot":
        hit_TV = _is_target(targets_T, head_VD.shape[0])
        target_T = jnp.where(hit_TV, logits_TV, 0).sum(-1)
    else:
        target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return log_z_T - target_T, log_z_T


def _chunk_losses(logits_CV: jax.Array, targets_C: jax.Array):
    """Returns (nll_C, log_z_C, exp_CV, total_C); exp_CV / total_C are the probabilities."""
    top_C = logits_CV.max(-1)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    total_C = exp_CV.sum(-1)
    log_z_C = top_C + jnp.log(total_C)
    target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    return log_z_C - target_C, log_z_C, exp_CV, total_C


def _chunk_gradients(form: _Form, logits_CV, exp_CV, h_CD, head_VD, targets_C, soft_C, hard_C):
    """Returns the gradients (dh_CD, dhead) of sum_c (soft_c log_z_c - hard_c logit_c[target]).

    exp_CV are probabilities up to a factor per token; soft_C must include the inverse factor. dhead is
    [D, V] on CPU, because that product runs at full rate there; elsewhere it is [V, D].
    """
    d_CV = soft_C[:, None] * exp_CV
    hit_CV = _is_target(targets_C, logits_CV.shape[-1])
    d_CV = d_CV - jnp.where(hit_CV, hard_C[:, None], 0)
    d_CV = form.logits.product_gradient(d_CV, logits_CV)
    wide = d_CV.dtype
    d_CV = d_CV.astype(h_CD.dtype)
    dh_CD = jnp.einsum("cv,vd->cd", d_CV, head_VD, preferred_element_type=wide)
    if target_platform() == "cpu":
        dhead = jnp.einsum("cd,cv->dv", h_CD, d_CV, preferred_element_type=wide)
    else:
        dhead = jnp.einsum("cv,cd->vd", d_CV, h_CD, preferred_element_type=wide)
    return dh_CD.astype(h_CD.dtype), dhead


def _zero_head_gradient(head_VD: jax.Array) -> jax.Array:
    shape = head_VD.shape[::-1] if target_platform() == "cpu" else head_VD.shape
    return jnp.zeros(shape, jnp.promote_types(head_VD.dtype, jnp.float32))


def _as_rows(dhead: jax.Array, head_VD: jax.Array) -> jax.Array:
    dhead_VD = dhead.T if target_platform() == "cpu" else dhead
    return dhead_VD.astype(head_VD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sum(form: _Form, h_TD, head_VD, targets_T, weights_T):
    nll_T, log_z_T = _chunked_nll(form, h_TD, head_VD, targets_T)
    total = jnp.sum(weights_T * (nll_T + form.z_loss * log_z_T * log_z_T))
    return total, nll_T, log_z_T


def _chunked_sum_fwd(form: _Form, h_TD, head_VD, targets_T, weights_T):
    """Computes the gradients in the forward pass, from each chunk's logits; the weights are known."""

    def body(dhead, xs):
        h_CD, targets_C, weights_C = xs
        logits_CV = form.logits.logits(h_CD, head_VD)
        nll_C, log_z_C, exp_CV, total_C = _chunk_losses(logits_CV, targets_C)
        soft_C = weights_C * (1 + 2 * form.z_loss * log_z_C) / total_C
        dh_CD, new = _chunk_gradients(
            form, logits_CV, exp_CV, h_CD, head_VD, targets_C, soft_C, weights_C
        )
        return dhead + new, (dh_CD, nll_C, log_z_C)

    T = h_TD.shape[0]
    dhead, outs = jax.lax.scan(
        body, _zero_head_gradient(head_VD), split_rows(form.chunk, h_TD, targets_T, weights_T)
    )
    dh_TD, nll_T, log_z_T = (join_rows(T, x) for x in outs)
    loss_T = nll_T + form.z_loss * log_z_T * log_z_T
    residuals = (dh_TD, _as_rows(dhead, head_VD), loss_T)
    return (jnp.sum(weights_T * loss_T), nll_T, log_z_T), residuals


def _chunked_sum_bwd(form: _Form, residuals, cotangents):
    del form
    dh_TD, dhead_VD, loss_T = residuals
    g = cotangents[0]  # nll_T and log_z_T have a stop_gradient
    scaled = ((g * x.astype(g.dtype)).astype(x.dtype) for x in (dh_TD, dhead_VD))
    return *scaled, None, g * loss_T


_chunked_sum.defvjp(_chunked_sum_fwd, _chunked_sum_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(form: _Form, h_TD, head_VD, targets_T):
    def body(_, xs):
        h_CD, targets_C = xs
        return None, _chunk_losses(form.logits.logits(h_CD, head_VD), targets_C)[:2]

    _, outs = jax.lax.scan(body, None, split_rows(form.chunk, h_TD, targets_T))
    nll_T, log_z_T = (join_rows(h_TD.shape[0], x) for x in outs)
    return nll_T, log_z_T


def _chunked_nll_fwd(form: _Form, h_TD, head_VD, targets_T):
    outs = _chunked_nll(form, h_TD, head_VD, targets_T)
    return outs, (h_TD, head_VD, targets_T, outs[1])


def _chunked_nll_bwd(form: _Form, residuals, cotangents):
    """Recomputes the logits of each chunk: the cotangents are known only in the backward pass."""
    h_TD, head_VD, targets_T, log_z_T = residuals
    dnll_T, dlog_z_T = cotangents

    def body(dhead, xs):
        h_CD, targets_C, log_z_C, dnll_C, dlog_z_C = xs
        logits_CV = form.logits.logits(h_CD, head_VD)
        exp_CV = jnp.exp(logits_CV - log_z_C[:, None])
        dh_CD, new = _chunk_gradients(
            form, logits_CV, exp_CV, h_CD, head_VD, targets_C, dnll_C + dlog_z_C, dnll_C
        )
        return dhead + new, dh_CD

    dhead, dh_JCD = jax.lax.scan(
        body,
        _zero_head_gradient(head_VD),
        split_rows(form.chunk, h_TD, targets_T, log_z_T, dnll_T, dlog_z_T),
    )
    return join_rows(h_TD.shape[0], dh_JCD), _as_rows(dhead, head_VD), None


_chunked_nll.defvjp(_chunked_nll_fwd, _chunked_nll_bwd)
