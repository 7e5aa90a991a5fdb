"""Every form of attention against a loop over queries in float64, and against each other.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.kernels import attention_blocked, attention_fused, attention_ops
from espalier.model.kernels.attention_ops import dot_product_attention
from espalier.model.kernels.platform import use_platform, use_reference_forms
from espalier.trainers import partitioning


def by_hand(q, k, v, visible, *, scale=None, softcap=None, bias=None):
    """One query, head and row at a time; visible(b, i, j) says whether query i sees key j."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out = np.zeros_like(q)
    for b in range(B):
        for i in range(T):
            keys = [j for j in range(S) if visible(b, i, j)]
            for n in range(N if keys else 0):
                kv = n // (N // K)
                logits = (H**-0.5 if scale is None else scale) * k[b, keys, kv] @ q[b, i, n]
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + np.asarray(bias, np.float64)[b, n, i, keys]
                weights = np.exp(logits - logits.max())
                out[b, i, n] = weights / weights.sum() @ v[b, keys, kv]
    return out


def arrays(B=2, T=13, S=None, N=4, K=2, H=8, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S or T, K, H), (B, S or T, K, H), (B, T, N, H))
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes]


# Two documents and padding in the first row, one document in the second.
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])

CASES = {
    "causal": {},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.9},
    "packed": {"segments": SEGMENTS},
    "everything": {"window": 3, "softcap": 2.0, "scale": 0.3, "segments": SEGMENTS},
}


def run(case, implementation, q, k, v, **options):
    case = dict(case)
    segments = case.pop("segments", None)
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    return dot_product_attention(
        q, k, v, q_segments_BT=segments, implementation=implementation, **case, **options
    )


def small_blocks(monkeypatch):
    """Blocks of four rows, so that tiny arrays have several, the last one short."""
    monkeypatch.setattr(attention_blocked, "BLOCK", 4)
    monkeypatch.setattr(attention_blocked, "HEADS_AT_ONCE", 2)


def value_and_gradients(attend, q, k, v, dout):
    """(out, dq, dk, dv), compiled as one program."""

    @jax.jit
    def program(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return program(q, k, v, dout)


@pytest.mark.parametrize("name", CASES)
def test_forms_against_float64_and_each_other(monkeypatch, name):
    small_blocks(monkeypatch)
    case = CASES[name]
    kv_heads = {"causal": 4, "window": 1}.get(name, 2)
    q, k, v, dout = arrays(K=kv_heads)

    def visible(b, i, j):
        segments = case.get("segments")
        same = segments is None or segments[b, i] == segments[b, j]
        return j <= i and j > i - case.get("window", 99) and same

    want = by_hand(q, k, v, visible, scale=case.get("scale"), softcap=case.get("softcap"))
    found = {
        implementation: value_and_gradients(
            functools.partial(run, case, implementation), q, k, v, dout
        )
        for implementation in ("reference", "xla", "blocked")
    }
    for out, *grads in found.values():
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
        for got, expected in zip(grads, found["reference"][1:], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=3e-5)


def test_gradients_of_the_reference_against_differences():
    q, k, v, dout = arrays(T=7)
    case = {"window": 4, "softcap": 2.0}
    directions = arrays(T=7, seed=1)[:3]

    def loss(*qkv):
        visible = lambda b, i, j: i - 4 < j <= i  # noqa: E731
        return np.vdot(by_hand(*qkv, visible, softcap=2.0), np.asarray(dout, np.float64))

    def shifted(step):
        return [
            np.asarray(x, np.float64) + step * np.asarray(d)
            for x, d in zip((q, k, v), directions, strict=True)
        ]

    grads = jax.grad(lambda *x: jnp.vdot(run(case, "reference", *x), dout), (0, 1, 2))(q, k, v)
    got = sum(jnp.vdot(g, d) for g, d in zip(grads, directions, strict=True))
    want = (loss(*shifted(1e-5)) - loss(*shifted(-1e-5))) / 2e-5
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 128, 300])
def test_blocked_at_its_real_block_size(length):
    q, k, v, dout = arrays(B=1, T=length, N=2, K=1)
    found, wanted = (
        value_and_gradients(functools.partial(run, {"window": 150}, name), q, k, v, dout)
        for name in ("blocked", "reference")
    )
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-5)


def test_long_rows_take_taller_blocks():
    form = attention_blocked.Form(window=None, scale=1.0, softcap=None, causal=True)
    blocks = attention_blocked._blocks(form, 20_000, 20_000)
    assert len(blocks) <= attention_blocked.MAX_BLOCKS
    assert [rows.start for rows, _ in blocks[1:]] == [rows.stop for rows, _ in blocks[:-1]]
    assert blocks[-1][0].stop == 20_000


@pytest.mark.parametrize("implementation", ["reference", "xla", "blocked"])
def test_rows_that_see_nothing_give_zeros(monkeypatch, implementation):
    small_blocks(monkeypatch)
    q, k, v, dout = arrays()
    q_segments = jnp.asarray(SEGMENTS)
    kv_segments = jnp.where(q_segments == 0, -1, q_segments)  # padding keys match no query

    def attend(q, k, v):
        return dot_product_attention(
            q,
            k,
            v,
            q_segments_BT=q_segments,
            kv_segments_BS=kv_segments,
            implementation=implementation,
        )

    out, dq, dk, dv = value_and_gradients(attend, q, k, v, dout)
    for x in (out, dq, dk, dv):
        np.testing.assert_array_equal(x[0, 11:], 0)
        assert np.isfinite(x).all()
    want = by_hand(
        q, k, v, lambda b, i, j: j <= i and SEGMENTS[b, i] == SEGMENTS[b, j] and SEGMENTS[b, i] > 0
    )
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "blocked"])
def test_half_precision_has_a_float32_softmax(implementation, dtype):
    """Logits of a few hundred, where a bfloat16 softmax would be wrong by tens of percent."""
    q, k, v, dout = (x.astype(dtype) for x in arrays(B=1, T=33, N=2, K=2, H=16))
    attend = functools.partial(run, {"scale": 8.0}, implementation)
    out, *grads = value_and_gradients(attend, q, k, v, dout)
    assert out.dtype == dtype
    assert all(g.dtype == dtype and np.isfinite(g.astype(jnp.float32)).all() for g in grads)
    want = by_hand(q, k, v, lambda b, i, j: j <= i, scale=8.0)
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0.02, atol=0.02)


# Cross-attention: the queries' documents, and the keys' with padding; the last query sees no key.
Q_SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 3]])
KV_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, -1, -1], [1] * 7 + [-1] * 2])


@pytest.mark.parametrize(
    ("implementation", "kv_heads", "at_once"),
    [
        ("reference", 2, 2),
        ("xla", 2, 2),
        ("blocked", 2, 2),  # an iteration has one key/value head
        ("blocked", 4, 2),  # half of a row's heads
        ("blocked", 2, 8),  # whole rows
    ],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_bias_and_keys_of_another_length(
    implementation, kv_heads, at_once, causal, packed, monkeypatch
):
    small_blocks(monkeypatch)
    monkeypatch.setattr(attention_blocked, "HEADS_AT_ONCE", at_once)
    q, k, v, dout = arrays(T=5, S=9, K=kv_heads)
    bias = jnp.asarray(np.random.default_rng(3).normal(size=(1, 4, 5, 9)), jnp.float32)
    segments = {"q_segments_BT": Q_SEGMENTS, "kv_segments_BS": KV_SEGMENTS} if packed else {}

    def attend(q, k, v, bias, implementation=implementation, **more):
        options = {"bias": bias, "causal": causal, "scale": 1.0, **segments, **more}
        return dot_product_attention(q, k, v, implementation=implementation, **options)

    def visible(b, i, j):
        same = not packed or Q_SEGMENTS[b, i] == KV_SEGMENTS[b, j]
        return same and (j <= i or not causal)

    whole = np.broadcast_to(np.asarray(bias, np.float64), (2, 4, 5, 9))
    want = by_hand(q, k, v, visible, scale=1.0, bias=whole)
    np.testing.assert_allclose(attend(q, k, v, bias), want, rtol=2e-5, atol=2e-5)
    direction = jnp.asarray(np.random.default_rng(4).normal(size=bias.shape), jnp.float32)
    slope = jax.grad(lambda bias: jnp.vdot(attend(q, k, v, bias), dout))(bias)
    by_hand_ = functools.partial(by_hand, q, k, v, visible, scale=1.0)
    far = np.asarray(direction, np.float64)
    sides = [by_hand_(bias=whole + step * far) for step in (1e-5, -1e-5)]
    want = np.vdot(sides[0] - sides[1], dout) / 2e-5
    np.testing.assert_allclose(jnp.vdot(slope, direction), want, rtol=1e-3, atol=1e-4)

    def loss(name, *operands):
        return jnp.vdot(attend(*operands, implementation=name, softcap=2.0), dout)

    found, wanted = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3)))(q, k, v, bias)
        for name in (implementation, "reference")
    )
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-5)


def test_decoding_by_position_with_empty_slots():
    """Slots in any order, some empty; a padded query (position -1) sees nothing."""
    q, k, v, _ = arrays(T=3, S=6)
    q_positions = jnp.array([[3, 4, 5], [-1, 0, 1]])
    kv_positions = jnp.array([[5, 0, -1, 3, 4, 1], [1, -1, 0, -1, -1, -1]])
    got = dot_product_attention(
        q, k, v, q_positions_BT=q_positions, kv_positions_BS=kv_positions, window=3
    )

    def visible(b, i, j):
        at_q, at_k = int(q_positions[b, i]), int(kv_positions[b, j])
        return 0 <= at_k <= at_q and at_k > at_q - 3

    np.testing.assert_allclose(got, by_hand(q, k, v, visible), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(got[1, 0], 0)


def test_key_value_heads_with_slots_of_their_own():
    q, k, v, _ = arrays(T=2, S=4)
    q_positions = jnp.array([[4, 5], [2, 3]])
    kv_positions = jnp.array([[[0, 1, 2, 4], [-1, 3, 5, 4]], [[2, 0, -1, -1], [3, 2, 1, 0]]])
    got = dot_product_attention(
        q, k, v, q_positions_BT=q_positions, kv_positions_BS=kv_positions, window=4
    )
    for head in range(2):  # of keys, each with its two query heads alone
        two, one = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        want = dot_product_attention(
            q[:, :, two],
            k[:, :, one],
            v[:, :, one],
            q_positions_BT=q_positions,
            kv_positions_BS=kv_positions[:, head],
            window=4,
        )
        np.testing.assert_allclose(got[:, :, two], want, rtol=2e-5, atol=2e-5)


def test_one_query_against_a_cache_equals_the_last_row_of_training():
    q, k, v, _ = arrays()
    whole = dot_product_attention(q, k, v, window=5)
    at = jnp.broadcast_to(jnp.arange(13)[None], (2, 13))
    last = dot_product_attention(
        q[:, -1:], k, v, q_positions_BT=at[:, -1:], kv_positions_BS=at, window=5
    )
    np.testing.assert_allclose(last, whole[:, -1:], rtol=2e-5, atol=2e-5)


def test_forward_mode_and_second_derivatives_in_the_reference_form():
    q, k, v, dout = arrays(B=1, T=3, N=2, K=1, H=2)

    def f(q):
        # 'blocked' has no forward mode: the switch has to override the argument too.
        return jnp.vdot(dot_product_attention(q, k, v, implementation="blocked"), dout)

    with use_reference_forms():
        tangent = jax.jit(lambda q: jax.jvp(f, (q,), (dout,))[1])(q)
        np.testing.assert_allclose(tangent, jnp.vdot(jax.jit(jax.grad(f))(q), dout), rtol=1e-4)
        hessian = jax.jit(jax.hessian(f))(q).reshape(q.size, q.size)
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-4)
    with pytest.raises(TypeError):
        jax.jvp(f, (q,), (dout,))


def chosen(platform, q, k, **options):
    """The form that 'auto' takes, read off the traced program."""
    library = []

    def record(query, *_, implementation, **__):
        library.append(implementation)
        return query

    with use_platform(platform), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", record)
        text = str(jax.make_jaxpr(lambda q, k: dot_product_attention(q, k, k, **options))(q, k))
    if library:
        return library[0]
    for mark, name in (("splash", "splash"), ("custom_vjp", "blocked")):
        if mark in text:
            return name
    return "plain"


def test_choice_by_platform():
    q, k = jnp.zeros((2, 128, 4, 64)), jnp.zeros((2, 128, 2, 64))
    half_q, half_k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    at = jnp.zeros((2, 128), jnp.int32)
    bias = jnp.zeros((1, 4, 128, 128))
    for platform in ("gpu", "tpu"):  # no kernel has a bias
        assert chosen(platform, half_q, half_k, bias=bias) == "xla"
    assert chosen("cpu", q, k, bias=bias) == chosen("cpu", q, k, causal=False) == "blocked"
    assert chosen("cpu", q, k, bias=jnp.zeros((2, 4, 128, 128))) == "xla"  # of each row
    assert chosen("tpu", q, k, causal=False) == "xla"
    assert chosen("gpu", half_q, half_k, causal=False) == "cudnn"
    assert chosen("cpu", q, k) == "blocked"
    assert chosen("tpu", q, k) == "splash"
    assert chosen("tpu", q, k, softcap=5.0, window=7, q_segments_BT=at) == "splash"
    assert chosen("tpu", q[:, :100], k[:, :100]) == "xla"
    assert chosen("gpu", q, k) == "xla"
    assert chosen("gpu", half_q, half_k) == "cudnn"
    assert chosen("gpu", half_q, half_k, softcap=5.0) == "plain"
    for platform in ("cpu", "gpu", "tpu"):
        by_position = {"q_positions_BT": at, "kv_positions_BS": at}
        assert chosen(platform, half_q, half_k, **by_position) == "plain"
        # One token that reads an encoder's keys.
        assert chosen(platform, half_q[:, :1], half_k, causal=False) == "xla"


def test_cudnn_is_not_chosen_for_what_it_refuses(monkeypatch):
    def form(length, **options):
        q = jnp.zeros((2, length, 4, 64), jnp.bfloat16)
        return chosen("gpu", q, q[:, :, :2], **options)

    at = jnp.zeros((2, 129), jnp.int32)
    assert form(128, q_segments_BT=at[:, :128]) == form(129) == "cudnn"
    # Segments become a bias, and the backward pass with a bias needs even lengths.
    assert form(129, q_segments_BT=at) == "xla"
    for version, want in (("cuda 12090", "cudnn"), ("rocm 60300", "xla")):
        here = types.SimpleNamespace(platform_version=f"PJRT C API\n{version}")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(attention_ops.backend, "get_backend", lambda here=here: here)
        assert form(128) == want


@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 2.0, "segments": True}])
def test_splash_in_the_interpreter(options):
    q, k, v, dout = arrays(B=1, T=256, N=2, K=1, H=128)
    options = dict(options)
    segments = None
    if options.pop("segments", False):
        segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), jnp.array([90, 166]), axis=1)

    def splash(q, k, v):
        return attention_fused.splash_attention(
            q, k, v, segments, segments, scale=0.1, interpret=True, **options
        )

    def plain(q, k, v):
        return dot_product_attention(
            q, k, v, q_segments_BT=segments, scale=0.1, implementation="reference", **options
        )

    found, wanted = (value_and_gradients(f, q, k, v, dout) for f in (splash, plain))
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rules", ["dp", "fsdp_tp"])
def test_blocked_on_a_mesh_gathers_nothing(monkeypatch, rules):
    small_blocks(monkeypatch)
    monkeypatch.setattr(attention_blocked, "HEADS_AT_ONCE", 1)
    q, k, v, dout = arrays(B=4, T=9, N=8, K=4)
    segments = jnp.sort(jnp.asarray(np.random.default_rng(0).integers(1, 4, (4, 9))), axis=1)

    def loss(implementation, *qkv):
        out = dot_product_attention(*qkv, q_segments_BT=segments, implementation=implementation)
        return (out * dout).sum()

    want = jax.jit(jax.value_and_grad(functools.partial(loss, "reference"), (0, 1, 2)))(q, k, v)
    tensor = 1 if rules == "dp" else 2
    mesh = partitioning.make_mesh(
        shape={"data": 2, "fsdp": 2, "tensor": tensor}, devices=jax.devices()[: 4 * tensor]
    )
    rule_set = partitioning.rules_named(rules)
    with partitioning.use_mesh(mesh, rule_set):
        names = ("act_batch", None, "act_heads", None)
        sharding = jax.sharding.NamedSharding(mesh, partitioning.mesh_spec(names, rule_set))
        placed = jax.device_put((q, k, v), sharding)
        step = jax.jit(
            jax.value_and_grad(functools.partial(loss, "auto"), (0, 1, 2)),
            out_shardings=(None, (sharding,) * 3),
        )
        compiled = step.lower(*placed).compile()
        got = compiled(*placed)
        text = compiled.as_text()
    for g, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, expected, rtol=1e-4, atol=3e-5)
    assert "while" in text  # the blocked form
    assert "all-gather" not in text and "all-to-all" not in text


def test_a_mesh_that_does_not_fit_falls_back_or_says_so():
    q, k, v, _ = arrays(B=3, T=8)
    want = dot_product_attention(q, k, v, implementation="reference")
    mesh = partitioning.make_mesh(shape={"data": 8})
    with partitioning.use_mesh(mesh, partitioning.rules_named("dp")):
        np.testing.assert_allclose(
            jax.jit(dot_product_attention)(q, k, v), want, rtol=2e-5, atol=2e-5
        )
        with pytest.raises(ValueError, match="mesh"):
            dot_product_attention(q, k, v, implementation="blocked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "flash"}, "Unknown attention implementation"),
        ({"window": 0}, "window"),
        ({"window": 3, "causal": False}, "causal"),
        ({"implementation": "blocked", "bias": np.zeros((2, 4, 13, 13))}, "a bias for each row"),
        ({"implementation": "splash", "bias": np.zeros((1, 4, 13, 13))}, "a bias"),
        ({"implementation": "splash", "causal": False}, "causal=False"),
        ({"implementation": "cudnn", "bias": np.zeros((1, 4, 13, 13))}, "a bias"),
        ({"q_positions_BT": np.zeros((2, 13), int)}, "together"),
        ({"implementation": "splash"}, "multiples of 128"),
        ({"implementation": "cudnn", "softcap": 2.0}, "soft cap"),
        ({"implementation": "cudnn", "q_segments_BT": np.ones((2, 13), int)}, "odd lengths"),
    ],
)
def test_contradictions_are_errors(options, message):
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match=message):
        dot_product_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="do not divide"):
        dot_product_attention(q[:, :, :3], k, v)


@pytest.mark.parametrize("implementation", ["auto", "reference", "xla", "blocked"])
def test_a_bias_of_too_few_heads_is_refused(implementation):
    q, k, v, _ = arrays(N=8, K=4)
    with pytest.raises(ValueError, match="A bias of 4 heads does not fit 8 query heads"):
        dot_product_attention(
            q, k, v, bias=jnp.zeros((1, 4, 13, 13)), implementation=implementation
        )
