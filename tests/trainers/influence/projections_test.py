"""TRAK-style projections against numpy in float64, and quantised query gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers.influence import projections, queries, scores, sites
from espalier.trainers.influence.consumers import Scores, whole
from espalier.trainers.influence.documents import Reader
from espalier.trainers.influence.kronecker import Damping, FactorError
from espalier.trainers.scoring.scoring import Row

F64 = "float64"
K = 3
ROWS = [
    Row(context=[0], targets=[3, 4, 5, 1, 2, 9]),
    Row(context=[0, 7, 7], targets=[8, 1]),
    Row(context=[0], targets=[11]),
    Row(context=[0], targets=[]),
]


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("width", "side"), [(4, 4), (3, 5)])
def test_a_square_projection_keeps_dot_products_exactly(width, side):
    r = np.random.default_rng(0)
    a, s = projections.projection(r, width, side), projections.projection(r, side, side)
    x, y = r.normal(size=(2, width, side))
    np.testing.assert_allclose(np.sum((a.T @ x @ s) * (a.T @ y @ s)), np.sum(x * y), rtol=1e-12)


def test_projections_keep_dot_products_in_expectation():
    """The features are sums over two matrices: products of different matrices are 0 in the mean."""
    r = np.random.default_rng(1)
    pairs = [r.normal(size=(2, 7, 5)), r.normal(size=(2, 4, 2))]
    want = sum(np.sum(x * y) for x, y in pairs)
    products = []
    for _ in range(4000):
        phi = np.zeros((2, K, K))
        for pair in pairs:
            a = projections.projection(r, pair.shape[1], K)
            s = projections.projection(r, pair.shape[2], K)
            phi += a.T @ pair @ s
        products.append(np.sum(phi[0] * phi[1]))
    error = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - want) < 4 * error
    # The error is small beside what a projection of another scale would give.
    assert 4 * error < 0.5 * abs(want)


def made(mlp, modules, **settings):
    """A reader of a tiny model, its sites, and the gradients of ROWS but the last, which has none, by site."""
    config = TransformerConfig(
        **dict(vocab_size=13, embed_dim=6, num_heads=1, mlp_dim=5, layer_pattern=("full_nope",)),
        **dict(dtype=F64, param_dtype=F64),
        **settings,
    )
    model = Transformer(config=config, block=functools.partial(Block, mlp=mlp))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    r = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: jnp.asarray(r.normal(size=x.shape) * 0.5), nn.meta.unbox(shapes)["params"]
    )
    reader = Reader(model=model, params=params, batch_size=3)
    chosen = sites.select(model, params, modules)
    ((grads, _),) = queries.gradients(reader, chosen, ROWS[:3], dtype=F64)
    return reader, chosen, jax.device_get(grads)


@pytest.fixture(scope="module")
def dense():
    """Scanned layers, and a head that is also the table of inputs."""
    mlp = functools.partial(GatedMlp, use_bias=True)
    return made(mlp, ("mlp", "head"), num_layers=2)


@pytest.fixture(scope="module")
def mixture():
    return made(functools.partial(MoeMlp, num_experts=3, top_k=2), ("mlp",), num_layers=1)


def flat(site, x):
    """[L, Q, E, X, Y] -> [L and E, Q, X, Y]."""
    x = np.asarray(x)
    x = x if site.scan else x[None]
    x = np.moveaxis(x, 2, 1) if site.stack else x[:, None]
    return x.reshape(-1, *x.shape[2:])


def features(sites, own, grads):
    total = 0.0
    for path, site in sites.items():
        a, s = (own[path][n].reshape(-1, *own[path][n].shape[-2:]) for n in ("a", "s"))
        total = total + np.einsum("nqxy,nxk,nym->qkm", flat(site, grads[path]), a, s)
    return total.reshape(3, -1)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_scores_are_products_of_features_with_the_inverse_second_moment(kind, request):
    reader, chosen, grads = request.getfixturevalue(kind)
    own = projections.projections(chosen, K, seed=3, dtype=np.float64)
    phi = features(chosen, own, grads)
    moment = projections.second_moment(reader, chosen, own, ROWS, dtype=F64)
    np.testing.assert_allclose(moment, phi.T @ phi / 3, atol=1e-10)
    curvature = projections.ProjectedCurvature.of(chosen, own, moment, Damping(0.5, "relative"))
    damped = moment + 0.5 * np.trace(moment) / K**2 * np.eye(K**2)
    want = phi @ np.linalg.solve(damped, phi.T)
    # The directions have rank K: factors of that rank are exact.
    prepared = queries.prepare(
        *(reader, chosen, ROWS[:3], curvature), rank=K, store_dtype=F64, dtype=F64
    )
    np.testing.assert_allclose(prepared.kept, 1, atol=1e-12)
    got = [one.scores for one in scores.score(reader, chosen, prepared, ROWS, dtype=F64)]
    np.testing.assert_allclose(got, [*want, [0, 0, 0]], atol=1e-8)


def test_documents_without_tokens_or_gradients_are_errors(dense):
    reader, chosen, _ = dense
    own = projections.projections(chosen, K, dtype=np.float64)
    with pytest.raises(FactorError, match="have no token to predict"):
        projections.second_moment(reader, chosen, own, ROWS[3:], dtype=F64)
    with pytest.raises(FactorError, match="gradients of all documents are zero"):
        projections.ProjectedCurvature.of(chosen, own, np.zeros((9, 9)), Damping(0.1))


def test_projections_depend_on_the_seed_alone(dense):
    _, chosen, _ = dense
    once, again, other = (projections.projections(chosen, K, seed=s) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert all(np.abs(once[p]["a"] - other[p]["a"]).max() > 0.1 for p in chosen)


def test_quantised_factors_are_within_half_a_step_and_score_as_their_matrices(mixture):
    reader, chosen, grads = mixture
    for rank in (2, 30):
        inputs = {
            path: queries.Compression(rank, "int8")(jnp.asarray(g)) for path, g in grads.items()
        }
        for path, own in inputs.items():
            kinds = {"u", "v"} if rank == 2 else {"p"}
            assert {n for n, x in own.items() if x.dtype == jnp.int8} == kinds
            if rank == 30:
                step = np.abs(grads[path]).max(-2, keepdims=True) / 127
                assert (np.abs(np.asarray(whole(own, F64)) - grads[path]) <= 0.501 * step).all()
        run = reader.compiled(chosen, Scores(3, dtype=F64))
        ((_, arrays),) = reader.batches(ROWS[:3], 0)
        order = np.argsort(arrays["document_ids"][:3])
        got, _ = queries.total_scores(chosen, run(reader.params, inputs, arrays, None)[0])
        want = sum(
            np.einsum("nqxy,ndxy->dq", flat(s, whole(inputs[p], F64)), flat(s, grads[p]))
            for p, s in chosen.items()
        )
        np.testing.assert_allclose(np.asarray(got)[order], want, atol=1e-8)
    zero = queries.Compression(30, "int8")(jnp.zeros((2, 3, 4)))
    assert not np.asarray(whole(zero, F64)).any()
