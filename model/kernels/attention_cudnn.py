"""Packed rows in cuDNN: every document is a sequence of its own, and no mask of queries and keys is in memory.

jax.nn.dot_product_attention has no argument for documents within a row; it takes them as a mask, which becomes a bias [B, 1,
T, T]. JAX's private binding of cuDNN has one, used here: lengths and first positions of the sequences of every row.

Shapes: B batch, T length, N query heads, K key/value heads, H head dim, M sequences of a row at most.
"""

import inspect

import jax
import jax.numpy as jnp
from jax.extend import backend

# Rows hold at most 64 documents, or 64 pairs of completions, and padding.
MAX_SEQUENCES = 129
_LEAST_CUDNN = 90_600  # 9.6.0, as for JAX's own test of this layout
_HOPPER = (9, 0)


def problem(q_BTNH: jax.Array) -> str:
    """Returns why cuDNN has to take the documents of rows as a bias, or does so in less memory; or ''.

    With documents as sequences, the binding stores float32 statistics [B * M, N, T] for the backward pass. The bias
    [B, 1, T, T] is smaller for short rows.
    """
    T, N = q_BTNH.shape[1:3]
    if q_BTNH.dtype.itemsize * T <= 4 * MAX_SEQUENCES * N:
        return f"rows of {T} tokens with {N} heads (a bias is smaller)"
    return _version_problem()


def _version_problem() -> str:
    """Returns why this machine has no such kernel, or ''."""
    try:
        # The binding has no public name.
        from jax._src.cudnn import fused_attention_stablehlo as binding
    except ImportError:
        return "this version of JAX"
    if "q_offsets" not in inspect.signature(binding.dot_product_attention).parameters:
        return "this version of JAX"
    try:
        client = backend.get_backend("gpu")
        if "cuda" not in client.platform_version:
            return "GPUs other than CUDA's"
        if binding.check_cudnn_version() < _LEAST_CUDNN:
            return "a cuDNN older than 9.6"
    except RuntimeError:  # JAX has no GPU, or no cuDNN
        return "a machine without a GPU and cuDNN"
    capability = client.local_devices()[0].compute_capability
    if tuple(int(part) for part in capability.split(".")) < _HOPPER:
        return "GPUs older than Hopper"
    return ""


def packed_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> jax.Array:
    """Returns attention [B, T, N, H] within documents; `problem` must be ''.

    Args:
      segments_BT: a document is a run of equal ids, so that ids must not return later in a row. Padding is one too. A row
        with more than MAX_SEQUENCES of them is not a number, which ends a training run.
      causal, window, scale: see `attention_ops.dot_product_attention`.
    """
    from jax._src.cudnn import fused_attention_stablehlo as binding

    # The binding takes the offsets of keys to be in units of the queries' heads, so that both need as many heads.
    k_BTNH, v_BTNH = (
        jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH)
    )
    count_B, lengths_BM, starts_BM = sequences(segments_BT, MAX_SEQUENCES)
    offsets = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    mask = binding.MaskType.PADDING_CAUSAL if causal else binding.MaskType.PADDING
    out_BTNH = binding.dot_product_attention(
        *(q_BTNH, k_BTNH.astype(q_BTNH.dtype), v_BTNH.astype(q_BTNH.dtype)),
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=mask,
        sliding_window_length=window,
    )
    return jnp.where((count_B <= MAX_SEQUENCES)[:, None, None, None], out_BTNH, jnp.nan)


def sequences(segments_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the runs of equal ids in rows: their number [B], and lengths and first positions of the first `most`.

    Lengths and positions are int32 [B, most], and -1 after the last run, as cuDNN's binding expects them.
    """
    begins_BT = jnp.diff(segments_BT, axis=1) != 0
    run_BT = jnp.pad(jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    runs_M = jnp.arange(most, dtype=jnp.int32)
    first_BM, end_BM = (
        jax.vmap(lambda run_T, side=side: jnp.searchsorted(run_T, runs_M, side=side))(run_BT)
        for side in ("left", "right")
    )
    count_B = run_BT[:, -1] + 1
    exists_BM = runs_M[None] < count_B[:, None]
    lengths_BM = jnp.where(exists_BM, end_BM - first_BM, -1)
    return (
        count_B,
        lengths_BM.astype(jnp.int32),
        jnp.where(exists_BM, first_BM, -1).astype(jnp.int32),
    )
