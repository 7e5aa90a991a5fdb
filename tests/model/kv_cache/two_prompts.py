"""Two small prompts that policies compress, and in float64 what they should make of them.

Shapes: B batch, T prompt length, S slots, C capacity, N query heads, K key/value heads, G = N / K, H head
dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.config import LayerKind
from espalier.model.kernels.attention_ops import dot_product_attention
from espalier.model.kv_cache.base import AttentionForm
from espalier.model.rope import Rope

B, T, N, K, H = 2, 20, 4, 2, 8
LENGTHS = np.array([20, 13])
ROPE = Rope(base=100.0)
FORM = AttentionForm(scale=1.0, rope=ROPE)
SNAP = {"capacity": 8, "window": 3, "kernel": 3}


@functools.cache
def draw(length):
    """Unrotated queries, keys and values; every length starts with the same tokens."""
    random = np.random.default_rng(0)
    return tuple(
        random.normal(size=(B, 40, heads, H)).astype(np.float32)[:, :length] for heads in (N, K, K)
    )


def positions(lengths=LENGTHS, length=T):
    at = np.arange(length)[None]
    return jnp.asarray(np.where(at < lengths[:, None], at, -1), jnp.int32)


def rotated(x_BTNH, at_BT):
    """Rotation of pairs (i, i + H/2) by position * 100^(-2i/H), in float64."""
    x, half = np.asarray(x_BTNH, np.float64), H // 2
    angle = np.asarray(at_BT)[..., None, None] * 100.0 ** (-2 * np.arange(half) / H)
    a, b = x[..., :half], x[..., half:]
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def read(policy, form=FORM, at=None, chunks=1, row=None, layer=0, num_layers=1):
    """The state after the prompt, uncompressed; of one row, or of both."""
    at = positions() if at is None else at
    rows = slice(None) if row is None else slice(row, row + 1)
    return _read(policy, form, chunks, layer, num_layers, at, *(x[rows] for x in draw(at.shape[1])))


@functools.partial(jax.jit, static_argnums=range(5))
def _read(policy, form, chunks, layer, num_layers, at, q, k, v):
    state = policy.init(
        batch=len(at),
        length=at.shape[1],
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        dtype=q.dtype,
        layer=layer,
        num_layers=num_layers,
        kind=LayerKind(window=form.window),
    )
    for part in np.array_split(np.arange(at.shape[1]), chunks):
        part = slice(part[0], part[-1] + 1)
        state = policy.append(
            state,
            q_BTNH=ROPE(q, at)[:, part],
            k_BTKH=ROPE(k, at)[:, part],
            v_BTKH=v[:, part],
            positions_BT=at[:, part],
            form=form,
        )
    return state


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def compress(policy, state, length, dtype=None):
    return policy.compress(state, length=length, dtype=dtype)


def step(policy, state, position, form=FORM, rows=range(B)):
    """One token more in every row, at its own position [B]; its output, and the state."""
    token = (x[np.array(rows), position][:, None] for x in draw(40))
    return _step(policy, form, state, jnp.asarray(position)[:, None], *token)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(policy, form, state, at, q, k, v):
    q, k = ROPE(q, at), ROPE(k, at)
    state = policy.append(state, q_BTNH=q, k_BTKH=k, v_BTKH=v, positions_BT=at, form=form)
    seen = policy.view(state)
    out = dot_product_attention(
        q,
        seen.k_BSKH,
        seen.v_BSKH,
        q_positions_BT=at,
        kv_positions_BS=seen.positions_BS,
        k_scale_BSK=seen.k_scale_BSK,
        v_scale_BSK=seen.v_scale_BSK,
        **form.arguments(),
    )
    return out, state


def kept(policy, state):
    """Positions held by each row and key/value head, a sorted list."""
    at = np.asarray(policy.view(state).positions_BS)
    at = np.broadcast_to(at if at.ndim == 3 else at[:, None], (len(at), K, at.shape[-1]))
    return [[sorted(head[head >= 0].tolist()) for head in row] for row in at]


def weights(b, form=FORM):
    """Attention [N, T, T] of row b's real tokens in float64, as its definition says."""
    real, at = LENGTHS[b], positions()
    q, k, _ = draw(T)
    q, k = (rotated(x, at)[b, :real] for x in (q, k))
    logits = form.scale * np.einsum("tnh,snh->nts", q, np.repeat(k, N // K, axis=1))
    seen = np.tril(np.ones((real, real))) > 0
    if form.window:
        seen &= ~(np.tril(np.ones((real, real)), -form.window) > 0)
    found = np.where(seen, np.exp(logits), 0)
    return found / found.sum(-1, keepdims=True)


def top(scores, count):
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def snap_scores(b, window, kernel, pooling, group_vote, form=FORM):
    """[K, P]: steps 2 to 5 of the paper's algorithm, loop by loop."""
    prefix = LENGTHS[b] - window
    votes = weights(b, form)[:, -window:, :prefix].sum(1).reshape(K, N // K, prefix)
    votes = votes.mean(1) if group_vote == "mean" else votes.max(1)
    return pool(votes, kernel, pooling)


def pool(votes, kernel, pooling):
    """Votes [X, P] pooled over each position and its neighbours; an average divides by the kernel at the ends too."""
    half, out = kernel // 2, np.zeros_like(votes)
    for j in range(votes.shape[1]):
        near = votes[:, max(0, j - half) : j + half + 1]
        out[:, j] = near.max(1) if pooling == "max" else near.sum(1) / kernel
    return out


def reference_step(position, form, only=None, moved=None):
    """Attention of tokens at `position` [B] to all before them, or to those of `only[b]`, from scratch.

    moved[b] gives other positions to some keys: {true: other}.
    """
    out = []
    for b, p in enumerate(position):
        q, k, v = (x[b] for x in draw(40))
        chosen = [j for j in range(p + 1) if only is None or j in only[b]]
        at = [(moved[b] if moved else {}).get(j, j) for j in chosen]
        q, k = rotated(q[p : p + 1], [p]), rotated(k[chosen], at)
        k, v = (np.repeat(x, N // K, axis=1) for x in (k, v[chosen]))
        logits = form.scale * np.einsum("tnh,snh->nts", q, k)
        seen = np.array(at) > p - (form.window or 10**9)
        w = np.where(seen, np.exp(logits), 0)
        out.append(np.einsum("nts,snh->tnh", w / w.sum(-1, keepdims=True), v))
    return np.stack(out)
