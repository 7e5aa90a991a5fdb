"""Splash attention, JAX's sparse flash attention kernel for TPUs, with this project's array layout.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

from typing import Any

import jax

MIN_BLOCK = 128  # lanes of a TPU register: the kernel's smallest tile
MAX_BLOCK = 512


def block_size(length: int) -> int | None:
    """Returns the largest supported tile size that divides `length`, or None."""
    return next((b for b in (MAX_BLOCK, MAX_BLOCK // 2, MIN_BLOCK) if length % b == 0), None)


def problem(length: int, key_length: int) -> str:
    """Returns why the kernel does not support the call, or ''."""
    if length != key_length or block_size(length) is None:
        return f"lengths {length} and {key_length} (equal multiples of {MIN_BLOCK} are needed)"
    return ""


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    *,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns causal attention on one device; `interpret` runs the kernel on a CPU, for tests."""
    # Importing Pallas takes half a second, and only TPU programs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, S = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[1]
    block = block_size(T)
    reason = problem(T, S)
    if block is None or reason:
        raise ValueError(f"splash attention does not support {reason}.")
    mask: masks.Mask = masks.CausalMask((T, S))
    if window is not None:
        mask = masks.LocalMask((T, S), window_size=(window - 1, 0), offset=0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel does not scale the logits, and expects heads before length.
    q, k, v = ((q_BTNH * scale).swapaxes(1, 2), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    if q_segments_BT is None or kv_segments_BS is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_segments_BT, kv_segments_BS))
    return out.swapaxes(1, 2).astype(q_BTNH.dtype)
