"""What every policy keeps of a prompt, against NumPy in float64 and by its invariants.

Numbers in docstrings are those of the invariants of SnapKV that the project holds itself to, and of the
pitfalls of its first implementations.

Shapes: B batch, T prompt length, S slots, C capacity, N query heads, K key/value heads, G = N / K, H head
dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention_ops import dot_product_attention
from model.config import LayerKind
from model.kv_cache.base import AttentionForm
from model.kv_cache.policies import policy_named
from model.kv_cache.pyramidkv import layer_budget
from model.rope import Rope

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
    half, out = kernel // 2, np.zeros_like(votes)
    for j in range(prefix):
        near = votes[:, max(0, j - half) : j + half + 1]
        out[:, j] = near.max(1) if pooling == "max" else near.sum(1) / kernel
    return out


@pytest.mark.parametrize("group_vote", ["mean", "max"])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("window", [None, 11])
def test_snapkv_keeps_what_its_definition_says(pooling, group_vote, window):
    """3, 4 and pitfall 2: each row's own last tokens, and each head's best before them."""
    form = AttentionForm(scale=1.0, rope=ROPE, window=window)
    policy = policy_named("snapkv", **SNAP, pooling=pooling, group_vote=group_vote)
    state = read(policy, form)
    small = compress(policy, state, 2)
    assert small.length == 8 + 2
    for b, row in enumerate(kept(policy, small)):
        scores = snap_scores(b, 3, 3, pooling, group_vote, form)
        last = set(range(LENGTHS[b] - 3, LENGTHS[b]))
        for head, found in enumerate(row):
            assert len(found) == len(set(found)) == 8
            assert set(found) == top(scores[head], 5) | last
    # What is kept is bitwise what was there.
    for b in range(B):
        for head in range(K):
            for s, position in enumerate(small.positions_BXS[b, head][:8]):
                for held, whole in (
                    (small.k_BKSH, state.slots.k_BKSH),
                    (small.v_BKSH, state.slots.v_BKSH),
                ):
                    np.testing.assert_array_equal(held[b, head, s], whole[b, head, position])


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        ("snapkv", {"window": 3}, 0),
        ("h2o", {}, 0),
        ("tova", {}, 0),
        ("random", {"window": 3}, 0),
        ("adakv", {"window": 3}, 0),
        ("streaming_llm", {}, 0),
        *(("pyramidkv", {"window": 3, "beta": 5}, layer) for layer in range(3)),
    ],
)
@pytest.mark.parametrize("capacity", [8, 14])
def test_a_padded_batch_equals_its_rows_alone(name, settings, layer, capacity):
    """11 and pitfall 2: same indices, and the same outputs after them; a row that fits is whole."""
    policy = policy_named(name, **settings, capacity=capacity)
    depth = {"layer": layer, "num_layers": 3}
    together = compress(policy, read(policy, **depth), 1)
    outputs, _ = step(policy, together, LENGTHS)
    for b in range(B):
        at = positions(LENGTHS[b : b + 1], LENGTHS[b])
        alone = compress(policy, read(policy, at=at, row=b, **depth), 1)
        assert kept(policy, alone)[0] == kept(policy, together)[b]
        output, _ = step(policy, alone, LENGTHS[b : b + 1], rows=[b])
        np.testing.assert_allclose(output[0], outputs[b], atol=1e-5)
    if capacity >= LENGTHS[1]:
        assert kept(policy, together)[1] == [list(range(LENGTHS[1]))] * K


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "adakv", "oracle"])
def test_chunks_are_compressed_together(name):
    """Pitfall 5: what is kept of a prompt that is read in chunks is what is kept of it at once."""
    settings = {"future": 4} if name == "oracle" else {}
    policy = policy_named(
        name, capacity=8, **settings, **({"window": 5} if name in ("snapkv", "adakv") else {})
    )
    at_once = kept(policy, compress(policy, read(policy), 1))
    assert kept(policy, compress(policy, read(policy, chunks=7), 1)) == at_once


def test_cache_length_grows_by_what_is_generated_and_positions_are_the_true_ones():
    """4: C + m after m steps. 10: what a head sees is as if the full cache were masked to it."""
    policy = policy_named("snapkv", **SNAP)
    state = compress(policy, read(policy), 3)
    for m in range(3):
        got, state = step(policy, state, LENGTHS + m)
        held = kept(policy, state)
        assert {len(found) for row in held for found in row} == {8 + m + 1}
        for head in range(K):
            only = [set(row[head]) for row in held]
            want = reference_step(LENGTHS + m, FORM, only)
            mine = slice(head * (N // K), (head + 1) * (N // K))
            np.testing.assert_allclose(got[:, :, mine], want[:, :, mine], atol=1e-5)


def test_a_short_row_keeps_everything():
    """What is left of its slots is empty; another row may be compressed beside it."""
    policy = policy_named("snapkv", capacity=15, window=3)
    rows = kept(policy, compress(policy, read(policy), 1))
    assert rows[1] == [list(range(13))] * K
    assert {len(found) for found in rows[0]} == {15}


def test_windows_as_long_as_the_prompt_but_one_still_leave_a_vote():
    """Pitfall 6: a tiny prefix, and a window that is nearly all there is."""
    policy = policy_named("snapkv", capacity=13, window=12)
    rows = kept(policy, compress(policy, read(policy), 1))
    for head, found in enumerate(rows[0]):
        (voted,) = set(found) - set(range(8, 20))
        assert voted == snap_scores(0, 12, 7, "max", "mean")[head].argmax()


def test_layers_with_a_short_window_keep_a_ring_of_it():
    """Pitfall 10: nothing is selected where a window hides the rest; a long window hides less."""
    short, long = (AttentionForm(scale=1.0, rope=ROPE, window=w) for w in (6, 11))
    for name in ("snapkv", "h2o", "tova", "streaming_llm", "adakv", "random", "full"):
        window = {"window": 3} if name in ("snapkv", "adakv", "random") else {}
        policy = policy_named(name, **window, **({} if name == "full" else {"capacity": 8}))
        state = compress(policy, read(policy, short), 3)
        assert state.length == 6 and state.ring == 0
        for m in range(3):
            got, state = step(policy, state, LENGTHS + m, short)
            want = reference_step(LENGTHS + m, short)
            np.testing.assert_allclose(got, want, atol=1e-5)
    snap = policy_named("snapkv", **SNAP)
    assert compress(snap, read(snap, long), 3).length == 8 + 3


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


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("renumber", [True, False])
def test_streaming_llm_keeps_sinks_and_a_ring(renumber, dtype):
    """Renumbered, the sinks stand right before the recent tokens; otherwise where they were."""
    policy = policy_named("streaming_llm", capacity=8, sinks=2, renumber=renumber)
    state = compress(policy, read(policy), 9, dtype)
    for m in range(9):
        position = LENGTHS + m
        got, state = step(policy, state, position)
        only = [{0, 1, *range(p - 5, p + 1)} for p in position]
        moved = [{0: p - 7, 1: p - 6} if renumber else {} for p in position]
        want = reference_step(position, FORM, only, moved)
        np.testing.assert_allclose(got, want, atol=0.1 if dtype else 1e-5)
        assert policy.view(state).k_BSKH.shape[1] == 8
    other = reference_step(position, FORM, only, [{} if renumber else moved[0]] * B)
    assert not renumber or np.abs(other - want).max() > 0.01


def test_sinks_that_a_short_prompt_lacks_leave_no_gap():
    """Of 3 tokens with 5 sinks, the ring of 2 drops the first of the generated ones."""
    policy = policy_named("streaming_llm", capacity=7, sinks=5)
    lengths = np.array([20, 3])
    state = compress(policy, read(policy, at=positions(lengths)), 4)
    for m in range(4):
        position = lengths + m
        got, state = step(policy, state, position)
        p, q = position
        only = [{*range(5), p - 1, p}, {0, 1, 2, *range(max(3, q - 1), q + 1)}]
        moved = [{j: p - 6 + j for j in range(5)}, {j: max(q - 4, 0) + j for j in range(3)}]
        np.testing.assert_allclose(got, reference_step(position, FORM, only, moved), atol=1e-5)


def test_sliding_keeps_the_last_tokens():
    policy = policy_named("sliding", window=5)
    state = compress(policy, read(policy), 7)
    for m in range(7):
        got, state = step(policy, state, LENGTHS + m)
        only = [set(range(p - 4, p + 1)) for p in LENGTHS + m]
        np.testing.assert_allclose(got, reference_step(LENGTHS + m, FORM, only), atol=1e-5)


def test_h2o_sums_the_attention_of_all_queries():
    policy = policy_named("h2o", capacity=8, window=3)
    for b, row in enumerate(kept(policy, compress(policy, read(policy), 1))):
        received = weights(b).sum(1).reshape(K, N // K, -1).mean(1)
        for head, found in enumerate(row):
            last = set(range(LENGTHS[b] - 3, LENGTHS[b]))
            assert set(found) == top(received[head, :-3], 5) | last


def test_tova_asks_the_last_query_alone_for_all_heads():
    policy = policy_named("tova", capacity=8)
    state = compress(policy, read(policy), 1)
    assert state.positions_BXS.shape == (B, 1, 9)
    for b, row in enumerate(kept(policy, state)):
        scores = weights(b)[:, -1].mean(0)
        assert set(row[0]) == top(scores[:-1], 7) | {LENGTHS[b] - 1}


def test_oracle_keeps_what_the_continuation_attends_to():
    policy = policy_named("oracle", capacity=8, future=4)
    state = compress(policy, read(policy), 1)
    for b, row in enumerate(kept(policy, state)):
        prompt = LENGTHS[b] - 4
        votes = weights(b)[:, -4:, :prompt].sum(1).reshape(K, N // K, prompt).mean(1)
        for head, found in enumerate(row):
            assert set(found) == top(votes[head], 8)


def test_random_draws_depend_on_seed_layer_and_head():
    found = {
        (seed, layer): kept(policy, compress(policy, read(policy, layer=layer), 1))
        for seed in (0, 1)
        for layer in (0, 1)
        for policy in [policy_named("random", capacity=8, window=3, seed=seed)]
    }
    assert len({str(rows) for rows in found.values()}) == 4
    assert found[0, 0][0][0] != found[0, 0][0][1]
    for row in found[0, 0]:
        assert {len(head) for head in row} == {8}
    assert all(set(head) >= {17, 18, 19} for head in found[0, 0][0])


def test_adakv_shares_a_budget_among_heads():
    """K * C slots hold the layer's best votes; every head has at least its guaranteed part."""
    policy = policy_named("adakv", capacity=8, window=3, kernel=1, safeguard=0.2)
    state = compress(policy, read(policy), 4)
    assert state.slots.k_BKSH.shape == (B, 1, K * 8 + K * 4, H)
    for b, row in enumerate(kept(policy, state)):
        scores = snap_scores(b, 3, 1, "max", "mean")
        scores[np.arange(K), scores.argmax(1)] = np.inf  # int(0.2 * 5) = 1 is guaranteed
        last = {(h, j) for h in range(K) for j in range(LENGTHS[b] - 3, LENGTHS[b])}
        best = {divmod(i, scores.shape[1]) for i in top(scores.reshape(-1), K * 5)}
        assert {(h, j) for h in range(K) for j in row[h]} == best | last
    for m in range(4):
        only = kept(policy, state)
        got, state = step(policy, state, LENGTHS + m)
        for head in range(K):  # each head against a reference of its own tokens
            sets = [{*only[b][head], LENGTHS[b] + m} for b in range(B)]
            want = reference_step(LENGTHS + m, FORM, sets)
            mine = slice(head * (N // K), (head + 1) * (N // K))
            np.testing.assert_allclose(got[:, :, mine], want[:, :, mine], atol=1e-5)


def test_adakv_with_everything_guaranteed_is_snapkv():
    ada = policy_named("adakv", **SNAP, safeguard=1.0)
    snap = policy_named("snapkv", **SNAP)
    assert kept(ada, compress(ada, read(ada), 1)) == kept(snap, compress(snap, read(snap), 1))


@pytest.mark.parametrize("layers", [1, 2, 5, 32])
@pytest.mark.parametrize(("average", "first"), [(100, 195), (100, 131), (7, 14), (50, 50)])
def test_pyramid_budgets_average_to_the_target(layers, average, first):
    """13: exactly, and each is within one token of a straight line."""
    found = [
        layer_budget(first, average=average, layer=layer, num_layers=layers)
        for layer in range(layers)
    ]
    assert sum(found) == average * layers
    line = np.linspace(first, 2 * average - first, layers) if layers > 1 else [average]
    np.testing.assert_allclose(found, line, atol=1)
    assert min(found) >= 0


def test_pyramidkv_compresses_each_layer_by_its_budget():
    """Of 20 tokens, 9, 5 and 1 before the window; of 13, as of 20; the deepest could keep 8."""
    policy = policy_named("pyramidkv", capacity=8, window=3, kernel=3, beta=5)
    for layer, (slots, before) in enumerate([(3 + 9, 9), (8, 5), (8, 1)]):
        state = compress(policy, read(policy, layer=layer, num_layers=3), 0)
        assert state.length == slots
        for b, row in enumerate(kept(policy, state)):
            scores = snap_scores(b, 3, 3, "max", "mean")
            last = set(range(LENGTHS[b] - 3, LENGTHS[b]))
            for head, found in enumerate(row):
                assert set(found) == top(scores[head], before) | last


def test_pyramidkv_is_flatter_for_a_short_row():
    """Of 13 tokens the first layer keeps all; what it cannot keep, the last keeps more."""
    policy = policy_named("pyramidkv", capacity=10, window=3, kernel=3, beta=5)
    sizes = [
        [len(row[0]) for row in kept(policy, compress(policy, state, 0))]
        for state in (read(policy, layer=layer, num_layers=3) for layer in range(3))
    ]
    assert sizes == [[3 + 13, 3 + 10], [3 + 7, 3 + 7], [3 + 1, 3 + 4]]
