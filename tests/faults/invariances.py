"""Rows about equal computations: SnapKV's cache against its definition, and forms of one training step."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from tests.faults.table import Bench, Case, Row, Silent, refused

_HEADS, _DIM, _BATCH = 4, 8, 2
# Forms of a step round differently, so a difference of two says of neither that it is wrong; float64 decides. The plain
# step may be 16 roundings of float32 from it, and another form twice as far as the plain one.
_PLAIN = 16 * float(np.finfo(np.float32).eps)
_AS_NEAR = 2.0


def _snapkv(seed: int) -> Iterator[Case]:
    shapes = itertools.product((1, 2, 4), ((8, 3), (12, 5), (6, 1)), ("max", "average"))
    for kv_heads, (capacity, window), pooling in shapes:
        name = f"{kv_heads} key/value heads, {window} of {capacity}, {pooling}"
        act = functools.partial(_selects, seed, kv_heads, capacity, window, pooling)
        yield Case(name, act)
    for chunks in (2, 3, 7, 20):
        yield Case(f"{chunks} chunks", functools.partial(_chunks, seed, chunks))
    for length in (3, 5, 8, 13):
        yield Case(f"a prompt of {length} tokens in 20", functools.partial(_padded, seed, length))
    for capacity in (20, 21, 64):
        yield Case(f"room for {capacity} of 20", functools.partial(_fits, seed, capacity))
    for name, settings in {
        "capacity 0": {"capacity": 0},
        "capacity -1": {"capacity": -1},
        "window 0": {"capacity": 8, "window": 0},
        "window of all": {"capacity": 8, "window": 8},
        "window of more": {"capacity": 8, "window": 9},
        "even kernel": {"capacity": 8, "window": 3, "kernel": 2},
        "kernel 0": {"capacity": 8, "window": 3, "kernel": 0},
        "unknown pooling": {"capacity": 8, "window": 3, "pooling": "median"},
        "unknown vote": {"capacity": 8, "window": 3, "group_vote": "sum"},
    }.items():
        yield Case(name, functools.partial(_refuses, settings))


def _refuses(settings: dict[str, Any], bench: Bench) -> None:
    from espalier.model.kv_cache.policies import policy_named

    del bench
    refused(lambda: policy_named("snapkv", **settings), ValueError)


def _draw(seed: int, kv_heads: int, length: int = 20) -> tuple[np.ndarray, ...]:
    """Returns queries, keys and values, the same first tokens for every length."""
    random_ = np.random.default_rng(seed)
    heads = (_HEADS, kv_heads, kv_heads)
    return tuple(
        random_.normal(size=(_BATCH, 20, n, _DIM)).astype(np.float32)[:, :length] for n in heads
    )


def _compressed(policy: Any, q: Any, k: Any, v: Any, at: Any, chunks: int = 1) -> Any:
    """Returns the state after a prompt has been read in chunks and compressed."""
    import jax.numpy as jnp

    from espalier.model.config import LayerKind
    from espalier.model.kv_cache.base import AttentionForm

    state = policy.init(
        batch=q.shape[0],
        length=q.shape[1],
        num_heads=_HEADS,
        num_kv_heads=k.shape[2],
        head_dim=_DIM,
        dtype=jnp.float32,
        layer=0,
        num_layers=1,
        kind=LayerKind(),
    )
    for part in np.array_split(np.arange(q.shape[1]), chunks):
        new = {"q_BTNH": q, "k_BTKH": k, "v_BTKH": v, "positions_BT": at}
        arrays = {name: jnp.asarray(x[:, part[0] : part[-1] + 1]) for name, x in new.items()}
        state = policy.append(state, **arrays, form=AttentionForm(scale=1.0))
    return policy.compress(state, length=1)


def _positions(length: int, total: int = 20) -> np.ndarray:
    at = np.arange(total, dtype=np.int32)[None].repeat(_BATCH, 0)
    return np.where(at < length, at, -1)


def _held(policy: Any, state: Any, kv_heads: int) -> list[list[set[int]]]:
    """Returns the positions that each row and key/value head holds."""
    at = np.asarray(policy.view(state).positions_BS)
    at = np.broadcast_to(at if at.ndim == 3 else at[:, None], (len(at), kv_heads, at.shape[-1]))
    return [[set(head[head >= 0].tolist()) for head in row] for row in at]


def _selects(
    seed: int, kv_heads: int, capacity: int, window: int, pooling: str, bench: Bench
) -> None:
    """Compares what is held with the definition, in float64."""
    from espalier.model.kv_cache.policies import policy_named

    del bench
    policy = policy_named(
        "snapkv", capacity=capacity, window=window, kernel=3, pooling=pooling, group_vote="mean"
    )
    q, k, v = _draw(seed, kv_heads)
    held = _held(policy, _compressed(policy, q, k, v, _positions(20)), kv_heads)
    for row, head in itertools.product(range(_BATCH), range(kv_heads)):
        group = _HEADS // kv_heads
        queries = q[row, -window:, head * group : (head + 1) * group].astype(np.float64)
        logits = np.einsum("wgh,sh->gws", queries, k[row, :, head].astype(np.float64))
        seen = np.arange(20)[None] <= np.arange(20 - window, 20)[:, None]
        weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
        votes = (weights / weights.sum(-1, keepdims=True)).sum(1).mean(0)[: 20 - window]
        near = np.pad(votes, 1, constant_values=-np.inf if pooling == "max" else 0.0)
        around = np.stack([near[:-2], near[1:-1], near[2:]])
        pooled = around.max(0) if pooling == "max" else around.mean(0)
        best = set(np.argsort(-pooled, kind="stable")[: capacity - window].tolist())
        want = best | set(range(20 - window, 20))
        if held[row][head] != want:
            raise Silent(f"row {row}, head {head} holds {held[row][head]} in place of {want}")


def _policy() -> Any:
    from espalier.model.kv_cache.policies import policy_named

    return policy_named("snapkv", capacity=8, window=3, kernel=3)


def _chunks(seed: int, chunks: int, bench: Bench) -> None:
    del bench
    policy, arrays, at = _policy(), _draw(seed, 2), _positions(20)
    once = _held(policy, _compressed(policy, *arrays, at), 2)
    if _held(policy, _compressed(policy, *arrays, at, chunks), 2) != once:
        raise Silent("other tokens are held than of a prompt that is read at once")


def _padded(seed: int, length: int, bench: Bench) -> None:
    """Compares a prompt with padding after it and the prompt alone."""
    del bench
    policy, arrays = _policy(), _draw(seed, 2)
    padded = _held(policy, _compressed(policy, *arrays, _positions(length)), 2)
    short = [x[:, :length] for x in arrays]
    alone = _held(policy, _compressed(policy, *short, _positions(length, length)), 2)
    if padded != alone:
        raise Silent(f"{padded} in place of {alone}")
    if length <= 8 and any(head != set(range(length)) for row in alone for head in row):
        raise Silent("a prompt that fits is not held whole")


def _fits(seed: int, capacity: int, bench: Bench) -> None:
    from espalier.model.kv_cache.policies import policy_named

    del bench
    policy = policy_named("snapkv", capacity=capacity, window=3)
    held = _held(policy, _compressed(policy, *_draw(seed, 2), _positions(20)), 2)
    if any(head != set(range(20)) for row in held for head in row):
        raise Silent("a prompt that fits is not held whole")


def _forms(seed: int) -> Iterator[Case]:
    for count in (2, 4, 8):
        yield Case(f"{count} microbatches", functools.partial(_accumulated, seed, count))
    for name, (changes, jit) in {
        "remat full": ({"remat": "full"}, True),
        "remat dots": ({"remat": "dots"}, True),
        "layers unrolled": ({"scan_layers": False}, True),
        "unrolled and remat full": ({"scan_layers": False, "remat": "full"}, True),
        "without compilation": ({}, False),
        "without compilation, unrolled": ({"scan_layers": False}, False),
    }.items():
        for number in range(3 if jit else 1):
            act = functools.partial(_form, seed + number, changes, jit)
            yield Case(f"{name}, parameters {number}", act)
    for number in range(4):
        yield Case(
            f"documents packed in a row, {number}", functools.partial(_packed, seed + number)
        )


@functools.cache
def _model(**changes: Any) -> Any:
    from espalier.model.config import TransformerConfig
    from espalier.model.transformer import Transformer

    sizes: dict[str, Any] = {"vocab_size": 61, "num_layers": 2, "embed_dim": 16, "mlp_dim": 24}
    return Transformer(config=TransformerConfig(**sizes, num_heads=4, num_kv_heads=2, **changes))


@functools.cache
def _params(seed: int) -> Any:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    model = _model()
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))
    return nn.meta.unbox(init(jax.random.key(seed)))["params"]


def _tokens(seed: int, rows: int = 8) -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(seed)
    ids = random_.integers(1, 61, (rows, 11)).astype(np.int32)
    shape = (rows, 10)
    return {
        "decoder_input_tokens": ids[:, :-1],
        "decoder_target_tokens": ids[:, 1:],
        "decoder_loss_weights": random_.integers(0, 2, shape).astype(np.float32),
        "decoder_segment_ids": np.ones(shape, np.int32),
        "decoder_positions": np.arange(10, dtype=np.int32)[None].repeat(rows, 0),
    }


def _gradient(model: Any, params: Any, batch: Any, *, jit: bool = True) -> Any:
    """Returns the loss per token and its gradient."""
    import jax

    from espalier.trainers.objectives import lm

    objective = lm.language_modelling(model=model)

    def loss(p: Any) -> Any:
        out = objective(p, batch, None)
        return out.sum / out.weight

    function = jax.value_and_grad(loss)
    with jax.default_matmul_precision("highest"):
        return (jax.jit(function) if jit else function)(params)


def _close(one: Any, other: Any, limit: float = 1e-6) -> None:
    """Checks that trees agree to `limit`, see `_distance`."""
    if not (difference := _distance(one, other)) <= limit:
        raise Silent(f"differs by {difference:.1e}, more than {limit}")


def _distance(exact: Any, other: Any) -> float:
    """Returns the largest difference of two trees, relative to the largest value of each array of `exact`."""
    import jax

    leaves = map(jax.tree.leaves, (exact, other))
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(*leaves, strict=True)]
    distances = [np.abs(a - b).max() / max(np.abs(a).max(), 1e-3) for a, b in pairs]
    return float(np.max(distances))  # NaN if one is


@functools.cache
def _exact(seed: int) -> Any:
    """Returns loss and gradient of the plain step in float64, also where the model computes in float32 always."""
    import jax
    import jax.numpy as jnp

    def wide(x: Any) -> np.ndarray:
        return np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)

    params, batch = jax.tree.map(wide, (_params(seed), _tokens(seed)))
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        return jax.tree.map(np.asarray, _gradient(_model(dtype="float64"), params, batch))


def _form(seed: int, changes: dict[str, Any], jit: bool, bench: Bench) -> None:
    """Compares the plain step and another form of it with the step in float64: both only round differently."""
    from espalier.model.transforms import layer_stack

    del bench
    params, batch = _params(seed), _tokens(seed)
    exact, plain = _exact(seed), _gradient(_model(), params, batch)
    near = _distance(exact, plain)
    model, mine = _model(**changes), params
    if not model.config.scan_layers:
        mine = layer_stack.unroll(params, _model().config)
        exact = exact[0], layer_stack.unroll(exact[1], _model().config)
    _check_as_near(near, _distance(exact, _gradient(model, mine, batch, jit=jit)))


def _check_as_near(plain: float, other: float) -> None:
    """Checks the distances of the plain step and of another form from float64."""
    if not plain <= _PLAIN:
        raise Silent(f"the plain step is {plain:.1e} from float64, more than {_PLAIN:.1e}")
    if not other <= _AS_NEAR * plain:
        raise Silent(f"is {other:.1e} from float64, and the plain step {plain:.1e}")


def _accumulated(seed: int, count: int, bench: Bench) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from espalier.trainers.objectives import lm
    from espalier.trainers.step import make_train_step
    from espalier.trainers.train_state import TrainState

    del bench
    # Its state is the gradient; a difference of parameters would have their rounding.
    optimizer, params = optax.trace(decay=0.0), _params(seed)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=None,
        variables={},
    )
    objective = lm.language_modelling(model=_model())
    gradients = []
    with jax.default_matmul_precision("highest"):
        for parts in (1, count):
            step = make_train_step(loss_fn=objective, optimizer=optimizer, microbatches=parts)
            gradients.append(jax.jit(step)(state, _tokens(seed))[0].opt_state)
    _close(*gradients)


def _packed(seed: int, bench: Bench) -> None:
    """Compares the loss of two documents in a row with that of each in a row of its own."""
    del bench
    batch = _tokens(seed, rows=1)
    cut = 3 + seed % 5
    batch["decoder_loss_weights"][:] = 1.0
    batch["decoder_segment_ids"][:, cut:] = 2
    batch["decoder_positions"][:, cut:] -= cut
    total, _ = _gradient(_model(), _params(seed), batch)
    losses = [
        _gradient(_model(), _params(seed), {k: v[:, part] for k, v in batch.items()})[0] * size
        for part, size in ((slice(None, cut), cut), (slice(cut, None), 10 - cut))
    ]
    _close(total, sum(losses) / 10)


ROWS = (
    Row(
        22,
        "SnapKV: short prompts, grouped heads, padding, chunks, room for all or none",
        "holds what its definition says; impossible settings are refused",
        _snapkv,
        sample=6,
    ),
    Row(
        24,
        "accumulation, packing, remat, unrolled layers, no compilation",
        "loss and gradient agree to 1e-6; forms of a step are as near to float64 as the plain one",
        _forms,
        sample=3,
    ),
)
