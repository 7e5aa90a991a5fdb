"""One update of every optimiser against its formula in numpy, the decay mask, and clipping."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers import initialise, trainable
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.optim.gradient_terms import ParamAxes

pytestmark = pytest.mark.smoke

LR, DECAY = 0.1, 0.5


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "mlp": {"kernel": rng.normal(size=(2, 6, 4)).astype(np.float32)},
        "norm": {"scale": rng.normal(size=4).astype(np.float32)},
        "token_embed": {"embedding": rng.normal(size=(5, 4)).astype(np.float32)},
    }


def plain_axes(params):
    """Axes of parameters none of which is stacked."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return ParamAxes({trainable.path_name(path): ("x",) * leaf.ndim for path, leaf in leaves})


PLAIN = plain_axes({**tree(0), "query": {"bias": np.ones(4)}})


def update(optimizer, params, grads):
    @jax.jit
    def run(params, grads):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return updates

    return jax.device_get(run(params, grads))


OPTIONS = {"learning_rate": LR, "param_axes": PLAIN, "weight_decay": DECAY, "max_grad_norm": None}


def test_adamw_first_step_is_the_sign_and_decays_matrices_only():
    params, grads = tree(0), tree(1)
    got = update(optimizers.adamw(**OPTIONS, eps=0.0), params, grads)
    for path in (("mlp", "kernel"), ("token_embed", "embedding")):
        p, g = params[path[0]][path[1]], grads[path[0]][path[1]]
        np.testing.assert_allclose(got[path[0]][path[1]], -LR * (np.sign(g) + DECAY * p), rtol=1e-4)
    np.testing.assert_allclose(
        got["norm"]["scale"], -LR * np.sign(grads["norm"]["scale"]), rtol=1e-4
    )


def test_adamw_second_step_has_bias_corrected_moments():
    b1, b2, eps = 0.9, 0.95, 1e-8
    optimizer = optimizers.adamw(**{**OPTIONS, "weight_decay": 0.0})
    params, first, second = tree(0), tree(1), tree(2)
    state = optimizer.init(params)
    _, state = optimizer.update(first, state, params)
    got, _ = optimizer.update(second, state, params)
    g1, g2 = (np.asarray(g["mlp"]["kernel"], np.float64) for g in (first, second))
    mean = (1 - b1) * (b1 * g1 + g2) / (1 - b1**2)
    square = (1 - b2) * (b2 * g1**2 + g2**2) / (1 - b2**2)
    np.testing.assert_allclose(
        got["mlp"]["kernel"], -LR * mean / (np.sqrt(square) + eps), rtol=1e-4
    )


def test_lion_is_a_sign():
    params, grads = tree(0), tree(1)
    got = update(optimizers.lion(**OPTIONS), params, grads)["mlp"]["kernel"]
    want = -LR * (np.sign(grads["mlp"]["kernel"]) + DECAY * params["mlp"]["kernel"])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sgd_with_momentum():
    optimizer = optimizers.sgd(**OPTIONS, momentum=0.5)
    params, first, second = tree(0), tree(1), tree(2)
    state = optimizer.init(params)
    _, state = optimizer.update(first, state, params)
    got, _ = optimizer.update(second, state, params)
    heavy = 0.5 * first["mlp"]["kernel"] + second["mlp"]["kernel"]
    want = -LR * (heavy + DECAY * params["mlp"]["kernel"])
    np.testing.assert_allclose(got["mlp"]["kernel"], want, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_coupled_decay_is_averaged_by_the_momentum(nesterov):
    optimizer = optimizers.sgd(**OPTIONS, momentum=0.5, nesterov=nesterov, coupled=True)
    params, first, second = tree(0), tree(1), tree(2)
    state = optimizer.init(params)
    _, state = optimizer.update(first, state, params)
    got, _ = optimizer.update(second, state, params)
    p, g1, g2 = (np.asarray(t["mlp"]["kernel"], np.float64) for t in (params, first, second))
    now = g2 + DECAY * p
    average = 0.5 * (g1 + DECAY * p) + now
    want = -LR * (0.5 * average + now if nesterov else average)
    np.testing.assert_allclose(got["mlp"]["kernel"], want, rtol=1e-5)
    gain = 0.5 * first["norm"]["scale"] + second["norm"]["scale"]
    want = -LR * (0.5 * gain + second["norm"]["scale"] if nesterov else gain)
    np.testing.assert_allclose(got["norm"]["scale"], want, rtol=1e-5)


def test_adafactor_unfactored_first_step():
    # Below 128 rows the second moment is whole; its first decay is zero, so the update is a sign,
    # scaled by the parameter's own root mean square.
    params, grads = tree(0), tree(1)
    optimizer = optimizers.adafactor(**OPTIONS)
    got = update(optimizer, params, grads)["mlp"]["kernel"]
    p, g = params["mlp"]["kernel"], grads["mlp"]["kernel"]
    want = -LR * (np.sign(g) * np.sqrt((p**2).mean()) + DECAY * p)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_muon_orthogonalises_each_layer_and_leaves_tables_to_adamw():
    params, grads = tree(0), tree(1)
    options = {**OPTIONS, "weight_decay": 0.0}
    got = update(optimizers.muon(**options), params, grads)
    for layer in got["mlp"]["kernel"]:
        singular = np.linalg.svd(layer, compute_uv=False)
        # Newton-Schulz brings singular values near one another (0.7 to 1.2), not exactly to one.
        assert singular.max() / singular.min() < 2.0
        rms = np.sqrt((layer**2).mean())
        assert rms == pytest.approx(0.2 * LR, rel=0.35)
    # Nesterov's momentum looks one step ahead: b1 m1 / (1 - b1^2) + g, where m1 = (1 - b1) g.
    ahead = 1 + 0.9 * 0.1 / (1 - 0.9**2)
    want = -LR * ahead * np.sign(grads["token_embed"]["embedding"])
    np.testing.assert_allclose(got["token_embed"]["embedding"], want, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_schedule_clipping_and_mask(name):
    make = getattr(optimizers, name)
    rate = schedules.linear(peak=1.0, total_steps=4)
    params, grads = tree(0), tree(1)
    # A gradient of norm 1e-6 is not clipped, and one of norm 1e6 is: sgd shows the size.
    optimizer = make(learning_rate=rate, param_axes=PLAIN, weight_decay=0.0, max_grad_norm=0.5)
    state = optimizer.init(params)
    norms = []
    for _ in range(5):
        updates, state = optimizer.update(grads, state, params)
        norms.append(
            float(np.sqrt(sum((np.asarray(u) ** 2).sum() for u in jax.tree.leaves(updates))))
        )
    assert norms[4] == pytest.approx(0.0, abs=1e-7)  # the schedule has reached zero
    assert norms[0] > norms[2] > norms[4]
    if name == "sgd":
        assert norms[0] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_gains_and_biases_are_not_decayed(name):
    params = {**tree(0), "query": {"bias": np.ones(4, np.float32)}}
    optimizer = getattr(optimizers, name)(**OPTIONS)
    got = update(optimizer, params, jax.tree.map(np.zeros_like, params))
    for module, leaf in (("norm", "scale"), ("query", "bias")):
        np.testing.assert_array_equal(got[module][leaf], 0)
    for module, leaf in (("mlp", "kernel"), ("token_embed", "embedding")):
        np.testing.assert_allclose(got[module][leaf], -LR * DECAY * params[module][leaf], rtol=1e-5)


def test_patterns_add_to_the_parameters_that_are_not_decayed():
    params = tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    got = update(optimizers.adamw(**OPTIONS, no_decay=[".*/embedding"]), params, zeros)
    assert not got["token_embed"]["embedding"].any() and not got["norm"]["scale"].any()
    assert got["mlp"]["kernel"].any()
    with pytest.raises(ValueError, match="no_decay pattern 'embeding' matches none"):
        update(optimizers.adamw(**OPTIONS, no_decay=["embeding"]), params, zeros)


# ---- Stacks of layers and experts.

SCANNED = TransformerConfig(
    vocab_size=8,
    num_layers=4,
    embed_dim=128,
    num_heads=2,
    mlp_dim=128,
    layer_pattern=("full", "full_nope"),
)


def stack_of(seed, scales):
    """Parameters of scanned layers of very different sizes."""
    rng = np.random.default_rng(seed)
    boxed = initialise.abstract_variables(Transformer(config=SCANNED))["params"]

    def values(path, leaf):
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if trainable.path_name(path).startswith("layers/"):
            value *= np.reshape(scales, (-1,) + (1,) * (leaf.ndim - 1)).astype(np.float32)
        return value

    return jax.tree_util.tree_map_with_path(values, nn.meta.unbox(boxed))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_layers_under_a_scan_are_updated_as_those_without(name):
    def updates(unroll):
        config = dataclasses.replace(SCANNED, scan_layers=unroll is not unrolled)
        boxed = initialise.abstract_variables(Transformer(config=config))["params"]
        optimizer = getattr(optimizers, name)(learning_rate=LR, param_axes=ParamAxes.of(boxed))
        params = unroll(stack_of(0, (1.0, 0.01)))
        state, run = optimizer.init(params), jax.jit(optimizer.update)
        for seed in (1, 2):
            new, state = run(unroll(stack_of(seed, (1.0, 30.0))), state, params)
        return new

    def unrolled(tree):
        return layer_stack.unroll(tree, SCANNED)

    found = unrolled(updates(lambda tree: tree))
    want = updates(unrolled)

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

    jax.tree.map(same, found, want)


def test_adafactor_never_factors_a_stack():
    like = jax.ShapeDtypeStruct((3, 200, 160, 128), jnp.float32)  # layers, experts, in, out
    tree = {"layers": {"experts": {"kernel": like}}, "head": {"kernel": like}}
    names = {
        "layers/experts/kernel": ("layers", "expert", "embed", "mlp"),
        "head/kernel": ("x",) * 4,
    }
    adafactor = optimizers.adafactor(learning_rate=LR, param_axes=ParamAxes(names))
    state = jax.eval_shape(adafactor.init, tree)[0]
    assert state.v_row["layers"]["experts"]["kernel"].shape == (3, 200, 128)
    assert state.v_col["layers"]["experts"]["kernel"].shape == (3, 200, 160)
    assert state.v_row["head"]["kernel"].shape == (3, 160, 128)


@pytest.mark.parametrize("options", [{}, {"clipping_threshold": None}, {"weight_decay": DECAY}])
def test_adafactor_of_unstacked_parameters_is_that_of_optax(options):
    params, grads = tree(0), tree(1)
    given = {"multiply_by_parameter_scale": False, **options}
    decay = given.pop("weight_decay", 0.0)
    adafactor = optimizers.adafactor(
        learning_rate=LR, param_axes=PLAIN, weight_decay=decay, **given
    )
    got = update(adafactor, params, grads)
    want = update(optax.adafactor(learning_rate=LR, **given), params, grads)
    decayed = jax.tree.map(lambda x: x.ndim > 1, params)
    for a, b, p, d in zip(*map(jax.tree.leaves, (got, want, params, decayed)), strict=True):
        np.testing.assert_allclose(a, b - LR * decay * d * p, rtol=1e-5, atol=1e-7)


def test_moments_can_be_stored_in_bfloat16():
    optimizer = optimizers.adamw(learning_rate=LR, param_axes=PLAIN, moment_dtype="bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(optimizer.init(tree(0)))}
    assert jnp.dtype(jnp.bfloat16) in dtypes
