"""Fused attention of accelerators, and how an attention kernel runs on every device's own rows and heads.

cuDNN takes packed rows: every document is a sequence of its own, and no mask of queries and keys is in memory.
jax.nn.dot_product_attention has no argument for documents within a row; it takes them as a mask, which becomes a bias [B, 1,
T, T]. JAX's private binding of cuDNN has one, used here: lengths and first positions of the sequences of every row.

Splash attention is JAX's sparse flash attention kernel for TPUs, here with this project's array layout.

XLA cannot partition a loop over heads or a Pallas call. On a mesh of several devices such a kernel therefore runs inside
`shard_map` (`per_device`): the active logical rules split batch and heads, and nothing is gathered.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, M sequences of a row at most.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.sharding import PartitionSpec

from espalier.model import axes

# Rows hold at most 64 documents, or 64 pairs of completions, and padding.
MAX_SEQUENCES = 129
_LEAST_CUDNN = 90_600  # 9.6.0, as for JAX's own test of this layout
_HOPPER = (9, 0)
MIN_BLOCK = 128  # lanes of a TPU register: the kernel's smallest tile
MAX_BLOCK = 512


def cudnn_problem(q_BTNH: jax.Array) -> str:
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
    """Returns attention [B, T, N, H] within documents; `cudnn_problem` must be ''.

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


def block_size(length: int) -> int | None:
    """Returns the largest supported tile size that divides `length`, or None."""
    return next((b for b in (MAX_BLOCK, MAX_BLOCK // 2, MIN_BLOCK) if length % b == 0), None)


def splash_problem(length: int, key_length: int) -> str:
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
    reason = splash_problem(T, S)
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


def placement(
    q_shape, k_shape, *, parts: bool = False
) -> tuple[PartitionSpec, PartitionSpec] | None:
    """Returns the partition specs of queries and keys over batch, length and heads.

    The result is None if they do not divide evenly over the mesh, or if the length is split and `parts` is false.
    Both specs are empty outside a mesh, on a mesh of one device, and inside a `shard_map`, where the
    arrays are already local.
    """
    free = axes.free_mesh_axes()
    if not free:
        return PartitionSpec(), PartitionSpec()
    rules = nn.get_logical_axis_rules()
    if not rules:
        return None
    q_axes, k_axes = (
        _within(nn.logical_to_mesh_axes((axes.BATCH, axes.INNER_LENGTH, heads), rules), free)
        for heads in (axes.ACT_HEADS, axes.ACT_KV_HEADS)
    )
    if q_axes[1] and not parts:
        return None  # the length is split
    if q_axes[2] != k_axes[2] and k_shape[2] > 1:
        return None  # a device would have query heads without their key/value head
    for dims, shape in ((q_axes, q_shape), (k_axes, k_shape)):
        if any(shape[i] % math.prod(free[name] for name in dims[i]) for i in range(3)):
            return None
    return PartitionSpec(*q_axes), PartitionSpec(*k_axes)


def _within(spec: Any, free: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Returns the mesh axes of every dimension; axes that are not in `free` are dropped."""
    entries = ((part,) if isinstance(part, str) else part or () for part in spec or ())
    return [tuple(name for name in part if name in free) for part in entries]


def per_device(
    kernel: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    parts: bool = False,
    **options: Any,
) -> jax.Array:
    """Returns kernel(q, k, v, q_segments, kv_segments, **options), computed on local shards.

    Args:
      parts: whether the kernel takes parts of rows, where the mesh splits their length.

    Raises:
      ValueError: batch or heads do not divide over the mesh, or the length is split.
    """
    specs = placement(q_BTNH.shape, k_BSKH.shape, parts=parts)
    if specs is None:
        raise ValueError(
            "This attention implementation needs batch and heads divided evenly over the mesh by the "
            "active logical axis rules, and whole rows: use 'auto' or 'xla'."
        )

    def local(q_BTNH, k_BSKH, v_BSKH, *segments):
        return kernel(q_BTNH, k_BSKH, v_BSKH, *(segments or (None, None)), **options)

    segments = () if q_segments_BT is None else (q_segments_BT, kv_segments_BS)
    q_spec, k_spec = specs
    if not len(q_spec):
        return local(q_BTNH, k_BSKH, v_BSKH, *segments)
    rows = (PartitionSpec(*q_spec[:2]),) * len(segments)
    mapped = jax.shard_map(
        local, in_specs=(q_spec, k_spec, k_spec, *rows), out_specs=q_spec, check_vma=False
    )
    return mapped(q_BTNH, k_BSKH, v_BSKH, *segments)
