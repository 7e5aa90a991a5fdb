"""The decoder as a whole: causality, isolation, layouts, caches, and one table of numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import mlp, norm
from espalier.model.attention import Attention
from espalier.model.bam.moa import MixtureOfAttention
from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.kv_cache.full import FullCache
from espalier.model.moe.moe import MoeMlp
from espalier.model.protocol import AttentionSettings, MlpSettings
from espalier.model.rope import Rope
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import layer_stack
from tests.drawn import drawn


def make(**changes):
    sizes = {
        "vocab_size": 61,
        "num_layers": 2,
        "embed_dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_dim": 24,
    }
    module = {k: changes.pop(k) for k in list(changes) if k in Transformer.__dataclass_fields__}
    return Transformer(config=TransformerConfig(**{**sizes, **changes}), **module)


@functools.cache
def init(model):
    return nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))


def apply(model, params, ids, **kwargs):
    return _apply(model, params, ids, kwargs)


@functools.partial(jax.jit, static_argnums=0)  # traced once for equal models
def _apply(model, params, ids, kwargs):
    return model.apply({"params": params}, ids, **kwargs)


def tokens(shape=(2, 10), seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, 61)


PARALLEL = functools.partial(Block, layout="parallel", norm=norm.LayerNorm)
VARIANTS = {
    "llama": {},
    "cohere": {"block": PARALLEL, "norm": norm.LayerNorm, "logit_scale": 0.25},
    "cohere2": {
        "block": PARALLEL,
        "norm": norm.LayerNorm,
        "layer_pattern": ("sliding", "full_nope"),
        "sliding_window": 3,
    },
    "gpt2": {
        "block": functools.partial(
            Block,
            norm=functools.partial(norm.LayerNorm, use_bias=True),
            attention=functools.partial(Attention, rope=None, qkv_bias=True, out_bias=True),
            mlp=functools.partial(mlp.Mlp, use_bias=True),
        ),
        "position_embed": functools.partial(Positions, num_positions=16),
        "num_kv_heads": None,
    },
    "qk_norm_softcap_free_head": {
        "block": functools.partial(
            Block,
            attention=functools.partial(
                Attention,
                qk_norm=functools.partial(norm.RMSNorm, scale_dims=2),
                softcap=5.0,
                rope=Rope(layout="interleaved"),
            ),
        ),
        "tie_embeddings": False,
        "logit_softcap": 10.0,
        "num_kv_heads": 1,
    },
}


@pytest.fixture(params=VARIANTS)
def model(request):
    return make(**VARIANTS[request.param])


@pytest.mark.smoke
def test_causality_by_gradients(model):
    params, ids = init(model), tokens((1, 8))

    def logit_at(noise_BTD, t):
        # The embedding's output is perturbed, which is where a token's influence begins.
        def add(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            here = (context.module.name, context.method_name) == ("token_embed", "__call__")
            return out + noise_BTD if here else out

        with nn.intercept_methods(add):
            return model.apply({"params": params}, ids)[0, t].sum()

    gradient = jax.jit(jax.grad(logit_at))
    for t in (0, 3, 7):
        grad_TD = gradient(jnp.zeros((1, 8, 16)), t)[0]
        influence_T = np.abs(grad_TD).max(-1)
        assert np.all(influence_T[t + 1 :] == 0)
        # The last layer of every variant sees at least the token itself and its predecessor.
        assert np.all(influence_T[max(0, t - 1) : t + 1] > 0)


def test_packed_documents_do_not_see_each_other(model):
    params = init(model)
    ids = tokens((1, 10))
    segments = jnp.array([[1] * 4 + [2] * 6])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = apply(model, params, ids, positions_BT=positions, segments_BT=segments)
    first = apply(model, params, ids[:, :4])
    second = apply(model, params, ids[:, 4:])
    np.testing.assert_allclose(packed[:, :4], first, atol=2e-6)
    np.testing.assert_allclose(packed[:, 4:], second, atol=2e-6)


def test_without_segments_documents_do_see_each_other():
    model = make()
    params, ids = init(model), tokens((1, 10))
    changed = ids.at[0, 0].add(1)
    a, b = (apply(model, params, x) for x in (ids, changed))
    assert np.abs(a - b)[0, -1].max() > 1e-4


@functools.partial(jax.jit, static_argnums=0)
def read_into(model, weights, ids, positions_BT, caches):
    """Logits and full caches after more tokens."""
    out = model.apply(
        weights, ids, positions_BT=positions_BT, caches=caches, policy=FullCache(), method="hidden"
    )
    return model.apply(weights, out.hidden_BTD, method="logits"), out.caches


@pytest.mark.parametrize("unequal", [False, True])
def test_decoding_with_a_cache_equals_one_pass(model, unequal):
    params, ids = init(model), tokens((2, 9))
    want = apply(model, params, ids)
    plain = layer_stack.unrolled(model)
    weights = {"params": layer_stack.unroll(params, model.config)}
    policy = FullCache()
    config = model.config
    caches = [
        policy.init(
            batch=2,
            length=5,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.per_head_dim,
            dtype="float32",
            layer=layer,
            num_layers=config.num_layers,
            kind=config.layer_kind(layer),
        )
        for layer in range(config.num_layers)
    ]
    # The second prompt is shorter when unequal: its padding has position -1 and is never seen.
    lengths = np.array([5, 3 if unequal else 5])
    at = np.arange(5)[None]
    positions = jnp.asarray(np.where(at < lengths[:, None], at, -1), jnp.int32)

    run = functools.partial(read_into, plain, weights)
    _, caches = run(ids[:, :5], positions, caches)
    caches = [policy.compress(cache, length=4) for cache in caches]
    for step in range(4):
        at = jnp.asarray(lengths + step, jnp.int32)[:, None]
        token = jnp.take_along_axis(ids, at, axis=1)
        got, caches = run(token, at, caches)
        np.testing.assert_allclose(
            got[:, 0], jnp.take_along_axis(want, at[..., None], 1)[:, 0], atol=3e-6
        )


@pytest.mark.parametrize("implementation", ["blocked", "splash", "cudnn"])
def test_attention_over_a_cache_ignores_the_form_of_training(implementation):
    bound = functools.partial(Attention, implementation=implementation)
    plain, other = (
        make(scan_layers=False, num_layers=1, **more)
        for more in ({}, {"block": functools.partial(Block, attention=bound)})
    )
    params, ids, policy = init(plain), tokens((2, 5)), FullCache()
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "dtype": "float32"}
    first = {"layer": 0, "num_layers": 1, "kind": plain.config.layer_kind(0)}

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, **context):
        return model.apply(
            {"params": params},
            ids,
            **context,
            caches=[policy.init(batch=2, length=5, **sizes, **first)],
            policy=policy,
            positions_BT=jnp.broadcast_to(jnp.arange(5), (2, 5)),
            method="hidden",
        ).hidden_BTD

    np.testing.assert_array_equal(run(other), run(plain))
    # Nor does a prompt need it, whose five tokens 'splash' would refuse.
    prompt = {"segments_BT": jnp.ones((2, 5), jnp.int32)}
    np.testing.assert_array_equal(run(other, **prompt), run(plain, **prompt))


def test_scanned_and_unrolled_layers_agree(model):
    params, ids = init(model), tokens()
    unrolled = layer_stack.unroll(params, model.config)
    got = apply(layer_stack.unrolled(model), unrolled, ids)
    np.testing.assert_allclose(got, apply(model, params, ids), atol=1e-6)
    back = layer_stack.stack(unrolled, model.config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("silent", ["attention", "mlp"])
def test_parallel_block_is_the_sum_of_its_branches(silent):
    config = make().config
    block = PARALLEL(config=config)
    x = jax.random.normal(jax.random.key(3), (2, 6, 16))
    positions = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
    params = jax.jit(lambda key: block.init(key, x, positions_BT=positions))(jax.random.key(0))
    params = nn.meta.unbox(params)["params"]
    last = {"attention": "out", "mlp": "down"}[silent]
    params[silent][last]["kernel"] = jnp.zeros_like(params[silent][last]["kernel"])

    @jax.jit
    def whole_and_branch(params):
        whole, _ = block.apply({"params": params}, x, positions_BT=positions)
        normed = norm.LayerNorm().apply({"params": params["norm"]}, x)
        if silent == "mlp":
            branch, _ = Attention(config=config).apply(
                {"params": params["attention"]}, normed, positions_BT=positions
            )
        else:
            branch = mlp.GatedMlp(config=config).apply({"params": params["mlp"]}, normed)
        return whole, x + branch

    np.testing.assert_allclose(*whole_and_branch(params), atol=1e-6)


def test_gated_mlp_closed_form():
    config = make().config
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    params = nn.meta.unbox(mlp.GatedMlp(config=config).init(jax.random.key(1), x))["params"]
    gate, up, down = (np.asarray(params[k]["kernel"], np.float64) for k in ("gate", "up", "down"))
    z = np.asarray(x, np.float64) @ gate
    want = (z / (1 + np.exp(-z)) * (np.asarray(x, np.float64) @ up)) @ down
    got = mlp.GatedMlp(config=config).apply({"params": params}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qk_norm_softcap_free_head"])
def test_untrained_loss_is_the_log_of_the_vocabulary(name):
    model, ids = make(**VARIANTS[name]), tokens((4, 10))
    logits = jax.jit(lambda key: model.init_with_output(key, ids)[0])(jax.random.key(0))
    nll = -jax.nn.log_softmax(logits)[..., 0].mean()
    assert float(nll) == pytest.approx(np.log(61), abs=0.1)


def test_sliding_layers_see_their_window_only():
    model = make(num_layers=1, layer_pattern=("sliding",), sliding_window=3)
    params, ids = init(model), tokens((1, 10))
    changed = ids.at[0, 4].add(1)
    a, b = (apply(model, params, x)[0] for x in (ids, changed))
    differs = np.abs(np.asarray(a - b)).max(-1) > 1e-6
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_rows_longer_than_learned_positions_are_refused():
    model = make(**VARIANTS["gpt2"])
    with pytest.raises(ValueError, match="num_positions"):
        model.apply({"params": init(model)}, tokens((1, 17)))


def test_caches_need_unrolled_layers():
    with pytest.raises(ValueError, match=r"layer_stack\.unroll\(params"):
        make().apply({"params": init(make())}, tokens(), caches=[], policy=FullCache())


class _Watched(Block):
    """A block that sows, perturbs and drops."""

    @nn.compact
    def __call__(self, x_BTD, **context):
        y_BTD, cache = super().__call__(x_BTD, **context)
        y_BTD = self.perturb("tap", y_BTD)
        self.sow("losses", "size", (y_BTD**2).mean())
        random = self.has_rng("dropout")
        return nn.Dropout(0.5, deterministic=not random)(y_BTD), cache


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_blocks_keep_every_collection(remat):
    model = make(block=_Watched, remat=remat)
    params, ids = init(model), tokens()
    plain = layer_stack.unrolled(model)
    unrolled = layer_stack.unroll(params, model.config)

    def taps(model):
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), ids))
        found = nn.meta.unbox(variables)["perturbations"]
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

    def run(model, params, taps):
        variables = {"params": params, "perturbations": taps}
        logits, sown = model.apply(variables, ids, mutable=["losses"])
        return (logits**2).sum(), sown

    run = jax.jit(jax.grad(run, argnums=2, has_aux=True), static_argnums=0)
    grads, sown = run(model, params, taps(model))
    want_grads, want_sown = run(plain, unrolled, taps(plain))
    got = layer_stack.unroll(grads, model.config)
    assert np.abs(got["layers"]["block_1"]["tap"]).max() > 0
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, got, want_grads)
    jax.tree.map(close, layer_stack.unroll(sown["losses"], model.config), want_sown["losses"])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_drop_different_units(remat):
    model = make(block=_Watched, remat=remat)
    variables, ids = {"params": init(model)}, tokens()

    @jax.jit
    def hidden(seed):
        rngs = {"dropout": jax.random.key(seed)}
        _, kept = model.apply(variables, ids, rngs=rngs, capture_intermediates=_is_dropout)
        (out_LBTD,) = jax.tree.leaves(kept["intermediates"])
        return out_LBTD == 0

    dropped = np.asarray(hidden(0))
    assert dropped.shape[0] == 2 and 0.4 < dropped.mean() < 0.6
    assert np.any(dropped[0] != dropped[1])
    np.testing.assert_array_equal(dropped, hidden(0))
    assert np.any(dropped != hidden(1))


def _is_dropout(module, method):
    return isinstance(module, nn.Dropout)


def test_a_model_with_learned_positions_reads_no_longer_rows():
    learned = make(position_embed=functools.partial(Positions, num_positions=20))
    assert init(learned)["positions"]["embedding"].shape[0] == learned.max_length == 20
    assert make().max_length is None


def test_layers_declare_their_settings():
    """In the order of depth, also where one traced layer stands for several."""
    mixture = functools.partial(MoeMlp, num_experts=5, top_k=2, shared=mlp.GatedMlp)
    attentions = functools.partial(MixtureOfAttention, num_experts=3, shared_kv=True)
    pattern = {"layer_pattern": ("sliding", "full"), "sliding_window": 3, "num_layers": 4}
    for scan in (True, False):
        block = functools.partial(Block, attention=attentions, mlp=mixture)
        model = make(block=block, scan_layers=scan, **pattern)
        layers = model.layer_settings()
        assert [layer.kind.depth for layer in layers] == [0, 1, 2, 3]
        assert [layer.kind.window for layer in layers] == [3, None, 3, None]
        assert {layer.attention for layer in layers} == {
            AttentionSettings(
                query_heads=12, cache_heads=2, head_dim=4, experts=3, top_k=None, shared_kv=True
            )
        }
        assert {layer.mlp for layer in layers} == {
            MlpSettings(kind="MoeMlp", gated=True, experts=5, top_k=2)
        }
        assert model.cache_sizes(3)["num_kv_heads"] == 2 and model.cache_sizes(3)["layer"] == 3
    plain = make(block=functools.partial(Block, mlp=mlp.Mlp)).layer_settings()[1]
    assert plain.mlp == MlpSettings(kind="Mlp", gated=False) and plain.attention.experts == 0
