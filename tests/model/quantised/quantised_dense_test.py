"""Training with 8-bit products: values against float64, what the gin file changes, and what is without qwix."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.model.kernels import int8
from espalier.model.kernels.platform import use_reference_forms
from espalier.model.linear import Dense
from espalier.model.quantised.quantised_dense import MissingQwixError, QuantisedDense
from espalier.trainers import partitioning
from espalier.trainers.optim import schedules

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="qwix is not installed (the extra `quantised`)"
)
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, 3, 16)), RNG.normal(size=(16, 8))
SIZES = {"features": 8, "axes": ("embed", "mlp")}


def params():
    return {"params": {"kernel": jnp.asarray(W, jnp.float32)}}


@needs_qwix
def test_int8_products_are_within_half_a_step_of_each_factor():
    y = QuantisedDense(**SIZES).apply(params(), jnp.asarray(X, jnp.float32))
    # Half a step of each factor: a step is the largest of a row, or of an output channel, by 127.5.
    x_half = abs(X).max(-1, keepdims=True) / 255
    w_half = abs(W).max(0) / 255
    bound = abs(X).sum(-1, keepdims=True) * w_half + x_half * (abs(W).sum(0) + 16 * w_half)
    error = abs(np.asarray(y, np.float64) - X @ W)
    assert (error <= bound + 1e-5).all() and error.max() > 1e-3


@needs_qwix
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("numbers", ["int8", "float8"])
def test_gradients_are_near_those_of_the_plain_product(numbers, backward):
    dense = QuantisedDense(**SIZES, numbers=numbers, backward=backward)
    weights = jnp.asarray(RNG.normal(size=(2, 3, 8)), jnp.float32)
    x = jnp.asarray(X, jnp.float32)

    def of(module):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(module.apply(p, x) ** 2 * weights), (0, 1)))

    text = of(dense).lower(params(), x).as_text()
    assert ("xi8>" in text, "xf8E4M3FN>" in text) == (numbers == "int8", numbers == "float8")
    assert ("xf8E5M2>" in text) == (backward and numbers == "float8")
    found, wanted = of(dense)(params(), x), of(Dense(**SIZES))(params(), x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        # Roundings of one number are at most 1/2 of 1/127 of the largest, 2**-4 of itself (e4m3) and 2**-3 (e5m2).
        assert 0 < error < (0.03 if numbers == "int8" else 2**-3)


@needs_qwix
def test_a_run_trains_with_it():
    names = ("models/tiny", "data/bytes", "runs/pretrain", "methods/quantised/quantised_training")
    bindings = (
        *("MODEL_DIR='x'", "MIXTURE_OR_TASK_NAME='python'", "TASK_FEATURE_LENGTHS={'targets': 8}"),
        *(
            "BATCH_SIZE=2",
            "WARMUP_STEPS=0",
            "MESH={'data': 1}",
            "LEARNING_RATE=1e-2",
            "QUANTISED_BACKWARD=True",
        ),
    )
    config = gin_config.load(
        [f"t5x_configs/{name}.gin" for name in names], bindings, entry="espalier.launch.train:train"
    )
    program = (
        config.arguments()["recipe"]
        .with_span(schedules.Span(10))
        .program(devices=jax.devices()[:1])
    )
    with partitioning.use_mesh(program.mesh, program.rules):
        state, train = program.init(), program.steps(1).train
        arrays = program.recipe.abstract_batch(None)
        batch = {n: np.ones(x.shape, x.dtype) for n, x in arrays.items()}
        assert train.lower(state, batch).as_text().count("xi8>") > 10
        losses = []
        for _ in range(5):
            state, metrics = train(state, batch)
            total, weight = metrics["loss"]
            losses.append(float(total / weight))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_without_qwix_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    x = jnp.asarray(X, jnp.float32)
    with pytest.raises(MissingQwixError, match=r"pip install -e .\[quantised\]"):
        QuantisedDense(**SIZES).apply(params(), x)
    plain = Dense(**SIZES).apply(params(), x)
    with use_reference_forms():
        np.testing.assert_allclose(QuantisedDense(**SIZES).apply(params(), x), plain, atol=1e-6)
    q, scale = int8.quantise(W.astype(np.float32))
    whole = {"params": {"kernel": q, int8.SCALE: scale}}
    np.testing.assert_array_equal(
        QuantisedDense(**SIZES).apply(whole, x), Dense(**SIZES).apply(whole, x)
    )
