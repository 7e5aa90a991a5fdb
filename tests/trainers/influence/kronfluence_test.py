"""Every entry of factors and scores of a tiny transformer is kronfluence's, in float64 with the data's own labels."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers.influence import kronecker, queries, sites
from espalier.trainers.influence.backward import backward
from espalier.trainers.influence.consumers import Covariances, Gradients, Scores, Squares

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "kronfluence.npz"
F64 = "float64"


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def ours(golden):
    """The model with the golden's parameters, its sites, and a compiled backward pass."""
    config = TransformerConfig(
        **dict(vocab_size=13, num_layers=2, embed_dim=6, num_heads=1, mlp_dim=5),
        **dict(dtype=F64, param_dtype=F64, layer_pattern=("full_nope",)),
    )
    block = functools.partial(Block, mlp=functools.partial(GatedMlp, use_bias=True))
    model = Transformer(config=config, block=block)

    def stacked(name):
        return jnp.asarray(np.stack([golden[f"params/layers.{i}.{name}"] for i in range(2)]))

    def dense(name, bias):
        own = {"kernel": stacked(f"{name}.weight")}
        return own | ({"bias": stacked(f"{name}.bias")} if bias else {})

    layer = {name: {"scale": stacked(f"{name}.scale")} for name in ("norm", "mlp_norm")}
    attention = ("query", "key", "value", "out")
    layer["attention"] = {name: dense(f"attention.{name}", False) for name in attention}
    layer["mlp"] = {name: dense(f"mlp.{name}", True) for name in ("gate", "up", "down")}
    params = {
        "token_embed": {"embedding": jnp.asarray(golden["params/embedding"])},
        "final_norm": {"scale": jnp.asarray(golden["params/final_norm.scale"])},
        "layers": {"block_0": layer},
    }
    chosen = sites.select(model, params, ("mlp", "attention"))

    @functools.partial(jax.jit, static_argnums=0)
    def run(consumer, inputs, batch):
        return backward(model, chosen, consumer, params, inputs, batch)[0]

    return chosen, run


def batch_of(golden, split):
    """Every position is read; the last one of a row predicts nothing."""
    ids, mask, weights = (golden[f"{split}/{name}"] for name in ("ids", "mask", "weights"))

    def shifted(x):
        return np.pad(x[:, 1:], ((0, 0), (0, 1)))

    arrays = {
        "decoder_input_tokens": ids.astype(np.int32),
        "decoder_target_tokens": shifted(ids).astype(np.int32),
        "decoder_loss_weights": shifted(weights),
        "decoder_segment_ids": mask.astype(np.int32),
    }
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def module_of(path, layer):
    _, _, rest = path.split("/", 2)
    return f"layers.{layer}.{rest.removesuffix('/kernel').replace('/', '.')}"


@pytest.fixture(scope="module")
def factors(ours, golden):
    chosen, run = ours
    batch = batch_of(golden, "train")
    sums = jax.device_get(run(Covariances(1, F64), {}, batch))
    eigen = {
        path: kronecker.eigendecomposition(own, name=path, dtype=np.float64)
        for path, own in sums.items()
    }
    rotation = {path: {name: own[name] for name in ("qa", "qs")} for path, own in eigen.items()}
    squares = {p: np.asarray(x) / 7 for p, x in run(Squares(1, F64), rotation, batch).items()}
    return sums, eigen, squares


def test_factors_are_kronfluences(factors, ours, golden):
    """An eigenvector's sign is free. All eigenvalues differ, so their order is not."""
    sums, eigen, squares = factors
    for path in ours[0]:
        for layer in range(2):
            module = module_of(path, layer)
            ours_ = {"lambda": squares[path][layer].T}
            for side in "as":
                ours_[side] = sums[path][side][layer, 0] / sums[path]["count"][layer]
                ours_[f"l{side}"] = eigen[path][f"l{side}"][layer, 0]
                vectors, want = eigen[path][f"q{side}"][layer, 0], golden[f"{module}/q{side}"]
                np.testing.assert_allclose(
                    vectors * np.sign((vectors * want).sum(0)), want, atol=1e-9
                )
            for name, got in ours_.items():
                want = golden[f"{module}/{name}"]
                bounds = {"rtol": 1e-9, "atol": 1e-11 * np.abs(want).max()}
                np.testing.assert_allclose(got, want, **bounds, err_msg=f"{module}/{name}")


@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "identity"])
@pytest.mark.parametrize("label", ["heuristic", "absolute"])
def test_scores_are_kronfluences(strategy, label, factors, ours, golden):
    chosen, run = ours
    _, eigen, squares = factors
    grads = run(Gradients(F64), {}, batch_of(golden, "query"))
    if strategy != "identity":
        damping = kronecker.Damping(
            *((0.1, "relative") if label == "heuristic" else (1e-2, "absolute"))
        )
        values = squares if strategy == "ekfac" else None
        curvature = kronecker.Curvature.of(chosen, eigen, values, damping, dtype=np.float64)
        grads = curvature(grads)
    inputs = {path: {"p": x} for path, x in grads.items()}
    results = run(Scores(3, dtype=F64), inputs, batch_of(golden, "train"))
    scores, _ = queries.total_scores(chosen, results)
    name = f"scores/{strategy}_{label}"
    for path in chosen:
        for layer in range(2):
            want = golden[f"{module_of(path, layer)}/{name}"]
            got = results[path]["scores"][layer]
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10 * np.abs(want).max())
    want = golden[name]
    np.testing.assert_allclose(scores, want, rtol=1e-9, atol=1e-10 * np.abs(want).max())
