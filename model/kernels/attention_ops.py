"""Scaled dot-product attention: one function, whose implementation is chosen by the device.

The plain implementation below is the reference. The fast implementations have the same values and
gradients. A query row that may see no key (padding) has output zero and zero gradients, exactly.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head dim.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.extend import backend

from espalier.model.kernels import attention_blocked, attention_context, attention_fused
from espalier.model.kernels.attention_fused import per_device, placement
from espalier.model.kernels.context_method import METHODS
from espalier.model.kernels.platform import reference_forms, target_platform

Implementation = Literal[
    "auto", "reference", "xla", "blocked", "splash", "cudnn", "ring", "all_to_all"
]
IMPLEMENTATIONS = get_args(Implementation)

# Far below any logit, and finite, to avoid inf - inf. The row maximum is clipped to at least half of it.
_MASKED = -1e30


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    q_segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    k_scale_BSK: jax.Array | None = None,
    v_scale_BSK: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns softmax(mask(softcap(scale * q k^T) + bias)) v, with grouped heads and a float32 softmax.

    Args:
      q_BTNH, k_BSKH, v_BSKH: K divides N, and query head n reads key/value head n // (N / K).
      q_positions_BT: position of every query. With kv_positions_BS, the causal mask compares positions
        (decoding with a cache). None compares indices (training, packed rows included).
      kv_positions_BS: position of every key; -1 marks an empty slot, which no query sees. [B, X, S]
        where heads see different slots: X is a multiple of K and divides N.
      q_segments_BT: a query sees only keys of an equal segment; the tokens of a segment are adjacent.
      kv_segments_BS: segments of the keys; None for the queries' segments.
      bias: added to the logits, [1 or B, N, T, S].
      causal: whether query i sees only keys j <= i.
      window: W; query i sees keys j with i - W < j <= i. Needs `causal`.
      scale: factor on q k^T; H^-1/2 when None.
      softcap: c in c * tanh(x / c), or None.
      k_scale_BSK: factors on integer keys, applied to the logits.
      v_scale_BSK: factors on integer values, applied to the weights.
      implementation: 'auto' chooses by platform; 'reference' is the plain implementation in float32;
        'xla' is jax.nn.dot_product_attention; 'blocked' processes blocks of query rows and skips masked
        keys (CPU); 'splash' is the Pallas kernel (TPU); 'cudnn' is the fused kernel (GPU); 'ring' and 'all_to_all' are for
        rows whose length the mesh splits (attention_context.py), and 'auto' for whole rows.

    Returns:
      out_BTNH, in the dtype of the queries.

    Raises:
      ValueError: contradictory arguments, or an implementation that cannot express them.
    """
    _check(q_BTNH, k_BSKH, q_positions_BT, kv_positions_BS, bias, causal, window, implementation)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    if q_segments_BT is not None and kv_segments_BS is None:
        kv_segments_BS = q_segments_BT
    if reference_forms():
        implementation = "reference"
    method = attention_context.method_of(implementation, q_BTNH.shape, k_BSKH.shape)
    if method and q_positions_BT is None:
        if bias is not None or q_BTNH.shape[1] != k_BSKH.shape[1]:
            raise ValueError(
                "Rules that split the length of rows support neither a bias of positions, such as T5's, nor attention over an "
                "encoder's output: use the rules 'fsdp' or 'fsdp_tp'."
            )
        return attention_context.context_attention(
            *(method, dot_product_attention, q_BTNH, k_BSKH, v_BSKH),
            *(q_segments_BT, kv_segments_BS),
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
        )
    if implementation in METHODS:
        implementation = "auto"
    # What only the plain implementation supports.
    plain = "positions" if q_positions_BT is not None else ""
    if k_scale_BSK is not None or v_scale_BSK is not None:
        plain = plain or "scales of keys and values"
    library = plain or _library_problem(q_BTNH, softcap, q_segments_BT, kv_segments_BS)
    own = plain or _kernel_problem(q_BTNH, k_BSKH)
    problem = {
        "blocked": own or _bias_problem(q_BTNH, k_BSKH, bias),
        "splash": own
        or _causal_problem(bias, causal)
        or attention_fused.splash_problem(q_BTNH.shape[1], k_BSKH.shape[1]),
        "cudnn": library or _cudnn_problem(q_BTNH, k_BSKH, q_segments_BT, bias),
    }
    if implementation == "auto":
        implementation = _choose(q_BTNH, bool(plain), problem)
    elif problem.get(implementation):
        raise ValueError(
            f"attention implementation {implementation!r} does not support "
            f"{problem[implementation]}: use 'auto' or 'xla'."
        )

    if implementation in ("blocked", "splash"):
        kernel: Any = attention_fused.splash_attention
        if implementation == "blocked":
            kernel = functools.partial(
                attention_blocked.blocked_attention, bias_1NTS=bias, causal=causal
            )
        return per_device(
            kernel,
            *(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS),
            window=window,
            scale=scale,
            softcap=softcap,
        )

    if (
        implementation == "cudnn"
        and q_segments_BT is not None
        and not attention_fused.cudnn_problem(q_BTNH)
    ):
        return attention_fused.packed_attention(
            *(q_BTNH, k_BSKH, v_BSKH, q_segments_BT), causal=causal, window=window, scale=scale
        )
    if implementation in ("xla", "cudnn") and not library:
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH.astype(q_BTNH.dtype),
            v_BSKH.astype(q_BTNH.dtype),
            bias=bias,
            mask=_same(q_segments_BT, kv_segments_BS),
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            scale=scale,
            implementation="cudnn" if implementation == "cudnn" else "xla",
        )

    mask = _mask(
        *(q_BTNH, k_BSKH, q_positions_BT, kv_positions_BS),
        *(q_segments_BT, kv_segments_BS, causal, window),
    )
    q, k, v = q_BTNH, k_BSKH, v_BSKH
    if implementation == "reference":
        wide = jnp.promote_types(q.dtype, jnp.float32)
        q, k, v = (x.astype(wide) for x in (q, k, v))
    weights_BKGTS, total_BKGT1 = _unnormalised(q, k, mask, bias, scale, softcap, k_scale_BSK)
    return _average(weights_BKGTS / total_BKGT1, v, v_scale_BSK, q.dtype).astype(q_BTNH.dtype)


def received_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Returns the attention weights of dot_product_attention, summed over queries: [B, K, G, S], float32.

    The normalised weights are never written to memory, which is the bottleneck.
    """
    mask = _mask(q_BTNH, k_BSKH, q_positions_BT, kv_positions_BS, None, None, True, window)
    weights_BKGTS, total_BKGT1 = _unnormalised(q_BTNH, k_BSKH, mask, None, scale, softcap, None)
    return jnp.einsum("bkgts,bkgt->bkgs", weights_BKGTS, 1 / total_BKGT1[..., 0])


def _choose(q_BTNH, plain: bool, problem: dict[str, str]) -> str:
    """Returns the implementation for the target platform.

    Decoding, of one query per row, always uses the plain implementation, because it is bound by memory bandwidth.
    """
    platform = target_platform()
    if plain or q_BTNH.shape[1] == 1:
        return "xla"
    if platform == "tpu" and not problem["splash"]:
        return "splash"
    if platform == "gpu" and not problem["cudnn"]:
        half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        fits = q_BTNH.shape[-1] <= 128 and q_BTNH.shape[-1] % 8 == 0
        return "cudnn" if half and fits else "xla"
    if platform == "cpu" and not problem["blocked"]:
        return "blocked"
    return "xla"


def _causal_problem(bias, causal: bool) -> str:
    """Returns what a kernel for causal attention without a bias does not support of a call, or ''."""
    if bias is not None:
        return "a bias"
    return "" if causal else "causal=False"


def _bias_problem(q_BTNH, k_BSKH, bias) -> str:
    """Returns why the blocked kernel does not support a bias, or ''."""
    if bias is None:
        return ""
    if len(bias) > 1:
        return "a bias for each row"
    specs = placement(q_BTNH.shape, k_BSKH.shape)
    # Its gradient would have to be summed over devices.
    return "a bias on several devices" if specs is None or len(specs[0]) else ""


def _kernel_problem(q_BTNH, k_BSKH) -> str:
    """Returns why this project's per-device kernels do not support the call, or ''."""
    if placement(q_BTNH.shape, k_BSKH.shape) is None:
        return "this mesh (it must divide batch and heads evenly and leave rows whole)"
    return ""


def _library_problem(q_BTNH, softcap, q_segments_BT, kv_segments_BS) -> str:
    """Returns why jax.nn.dot_product_attention does not support the call, or ''."""
    if q_BTNH.dtype == jnp.float16 and target_platform() != "gpu":
        return "float16 off GPUs"
    if softcap is not None:
        return "a soft cap"
    if q_segments_BT is not kv_segments_BS:
        return "segments of the keys that differ from the segments of the queries"  # a row may see no key
    return ""


def _cudnn_problem(q_BTNH, k_BSKH, q_segments_BT, bias) -> str:
    """Returns why cuDNN does not support a call that jax.nn.dot_product_attention supports, or ''."""
    # JAX calls ROCm "gpu" too. On a machine without a GPU, tracing for "gpu" means CUDA.
    if jax.default_backend() == "gpu" and "cuda" not in backend.get_backend().platform_version:
        return "GPUs other than CUDA's"
    if bias is not None:
        return "a bias"  # it would write its gradient for every row
    # Segments that are passed to the kernel as a bias: its backward pass does not support odd lengths.
    odd = q_BTNH.shape[1] % 2 or k_BSKH.shape[1] % 2
    if q_segments_BT is not None and odd and attention_fused.cudnn_problem(q_BTNH):
        return "segments at odd lengths"
    return ""


def _same(q_segments_BT, kv_segments_BS) -> jax.Array | None:
    """Returns True where query and key have the same segment, [B, 1, T, S]; None without segments."""
    if q_segments_BT is None:
        return None
    return (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])[:, None]


def _check(q, k, q_positions, kv_positions, bias, causal, window, implementation) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown attention implementation {implementation!r}: choose from {IMPLEMENTATIONS}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads.")
    if bias is not None and bias.shape[1] != q.shape[2]:
        raise ValueError(
            f"A bias of {bias.shape[1]} heads does not fit {q.shape[2]} query heads: attention experts support no bias of positions, "
            "such as T5's; make experts of FFNs only."
        )
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("Give q_positions_BT and kv_positions_BS together or not at all.")
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be positive.")
    if window is not None and not causal:
        raise ValueError(f"window = {window} needs causal=True.")


def _mask(
    q_BTNH, k_BSKH, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, causal, window
) -> jax.Array | None:
    """Returns True where a query sees a key, [1 or B, 1 or K, 1 or G, T, S]; None without a mask."""
    if q_positions_BT is None:
        at_q = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None, None, :, None]
        at_k = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)[None, None, None, :]
        parts = []
    else:
        at_q, at_k = q_positions_BT[:, None, :, None], kv_positions_BS[..., None, :]
        if at_k.ndim == 3:  # the same mask for all heads
            at_k = at_k[:, None]
        parts = [at_k >= 0]
    if causal:
        parts.append(at_k <= at_q)
    if window is not None:
        parts.append(at_k > at_q - window)
    if q_segments_BT is not None:
        parts.append(_same(q_segments_BT, kv_segments_BS))
    if not parts:
        return None
    mask = functools.reduce(jnp.logical_and, parts)
    B, X, T, S = mask.shape
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    if X in (1, K):
        return mask[:, :, None]
    return jnp.broadcast_to(mask[:, :, None], (B, X, N // X, T, S)).reshape(B, K, N // K, T, S)


def _unnormalised(
    q_BTNH, k_BSKH, mask, bias, scale, softcap, k_scale_BSK
) -> tuple[jax.Array, jax.Array]:
    """Returns the softmax's exponentials and their sums over keys, float32; the sum is 1 without a visible key.

    The products of queries and keys are in the queries' dtype.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    logits_BKGTS = scale * jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH.astype(q_BTNH.dtype), preferred_element_type=wide
    )
    if k_scale_BSK is not None:
        logits_BKGTS = logits_BKGTS * _per_key(k_scale_BSK)
    if softcap is not None:
        logits_BKGTS = softcap * jnp.tanh(logits_BKGTS / softcap)
    if bias is not None:
        logits_BKGTS = logits_BKGTS + bias.astype(wide).reshape(-1, K, N // K, *bias.shape[2:])
    if mask is not None:
        logits_BKGTS = jnp.where(mask, logits_BKGTS, _MASKED)
    # With a bounded maximum, exp(_MASKED - max) is zero also in rows without a visible key.
    top = jnp.maximum(logits_BKGTS.max(-1, keepdims=True), _MASKED / 2)
    weights_BKGTS = jnp.exp(logits_BKGTS - jax.lax.stop_gradient(top))
    total = weights_BKGTS.sum(-1, keepdims=True)
    return weights_BKGTS, jnp.where(total > 0, total, 1)


def _average(weights_BKGTS, v_BSKH, v_scale_BSK, dtype) -> jax.Array:
    """Returns the values' weighted sums, with products in `dtype`."""
    B, K, G, T, _ = weights_BKGTS.shape
    if v_scale_BSK is not None:
        weights_BKGTS = weights_BKGTS * _per_key(v_scale_BSK)
    # Weights are the first operand: in the other order, XLA's CPU backend transposes the values.
    out_BKGTH = jax.lax.dot_general(
        weights_BKGTS.astype(dtype),
        v_BSKH.astype(dtype),
        (((4,), (1,)), ((0, 1), (0, 2))),
        preferred_element_type=weights_BKGTS.dtype,
    )
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, K * G, v_BSKH.shape[-1]).astype(dtype)


def _per_key(scale_BSK: jax.Array) -> jax.Array:
    """Reshapes [B, S, K] to broadcast against logits or weights [B, K, G, T, S]."""
    return scale_BSK.swapaxes(1, 2)[:, :, None, None, :]
