"""Fits on a mesh, labels of two seeds over thousands of documents, and drawn labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import TransformerConfig
from model.kernels.vocab_logits import LogitForm
from model.transformer import Transformer
from trainers import partitioning
from trainers.influence import files, fit, kronecker, queries, scores, sites, spread
from trainers.influence.backward import sampled_labels
from trainers.influence.fit import FitSettings, Reader
from trainers.scoring.scoring import Row

V = 11


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(vocab_size=V, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8)
    return Transformer(config=config)


@pytest.fixture(scope="module")
def params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    r = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(r.normal(size=x.shape) * 0.5, jnp.float32),
        nn.meta.unbox(shapes)["params"],
    )


def texts(count, seed):
    r = np.random.default_rng(seed)
    return [
        Row(context=[0], targets=r.integers(1, V, r.integers(2, 12)).tolist()) for _ in range(count)
    ]


def scored(reader, folder, settings, documents, asked, rank=None):
    fit.fit(reader, folder, lambda: documents, settings, total=len(documents))
    chosen = sites.select(reader.model, reader.params)
    curvature = fit.read_curvature(folder, chosen, "ekfac", kronecker.Damping(), reader=reader)
    ready = queries.prepare(
        reader, chosen, asked, curvature, rank=rank, store_dtype="float32", sample=documents[:8]
    )
    rows = scores.score(reader, chosen, ready, documents[:64])
    return np.array([one.scores for one in rows])


def test_labels_of_two_seeds_give_alike_scores(model, params, tmp_path):
    """Over 2,000 documents, at Pearson 0.95 or more."""
    reader = Reader(model=model, params=params, batch_size=64)
    documents, asked = texts(2000, 1), texts(4, 2)
    first, second = (
        scored(reader, tmp_path / str(seed), FitSettings(seed=seed), documents, asked)
        for seed in (0, 1)
    )
    for a, b in zip(first.T, second.T, strict=True):
        assert np.corrcoef(a, b)[0, 1] >= 0.95
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("shape", "rules", "rank"),
    [({"data": 8}, "dp", None), ({"fsdp": 4, "tensor": 2}, "fsdp_tp", 3)],
)
def test_a_mesh_and_other_batches_change_nothing(model, params, tmp_path, shape, rules, rank):
    """Sums are split over the mesh, and its devices decompose the covariances."""
    documents, asked = texts(40, 3), texts(3, 4)
    settings = FitSettings(blocks=2)
    one = Reader(model=model, params=params, batch_size=16)
    want = scored(one, tmp_path / "one", settings, documents, asked, rank)
    mesh = partitioning.make_mesh(shape=shape)
    with partitioning.use_mesh(mesh, partitioning.rules_named(rules)):
        sharding = partitioning.batch_sharding(mesh, partitioning.rules_named(rules))
        many = Reader(model=model, params=params, batch_size=8, sharding=sharding)
        got = scored(many, tmp_path / "many", settings, documents, asked, rank)
    own, other = (files.read(tmp_path / name / "covariances")[0] for name in ("one", "many"))
    for name, array in own.items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=2e-6 * np.abs(array).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_each_device_has_a_part_of_every_sum_and_decomposes_some_matrices():
    """Rows are split over as many devices as divide them; stacks are decomposed as on one device."""
    mesh = partitioning.make_mesh(shape={"fsdp": 4, "tensor": 2})
    for shape, parts in (
        ((2, 1, 16, 16), 8),
        ((2, 6, 8), 8),
        ((2, 4, 3), 4),
        ((5, 7), 1),
        ((8,), 1),
    ):
        array = jax.device_put(jnp.zeros(shape), spread.sharding(mesh, shape))
        assert {x.data.size for x in array.addressable_shards} == {array.size // parts}
    r = np.random.default_rng(0)
    x = r.normal(size=(3, 2, 6, 20))
    stack = x @ np.swapaxes(x, -1, -2)
    devices = jax.devices()[:4]
    eigh, used = spread.Eigh(devices), []
    begin = spread._begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "_begin", lambda m, device: used.append(device) or begin(m, device))
        values, vectors = eigh(stack)
        eigh(stack[0, 0])
    assert used == [devices[i % 4] for i in range(7)]
    assert values.dtype == vectors.dtype == np.float64
    np.testing.assert_allclose(values, np.linalg.eigvalsh(stack), rtol=1e-10)
    rebuilt = (vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    np.testing.assert_allclose(rebuilt, stack, atol=1e-10)


def test_drawn_labels_have_the_probabilities_of_the_model():
    r = np.random.default_rng(0)
    hidden = jnp.asarray(np.tile(r.normal(size=(1, 1, 4)), (1000, 16, 1)), jnp.float32)
    head = jnp.asarray(r.normal(size=(V, 4)), jnp.float32)
    labels = jax.jit(lambda ids: sampled_labels(LogitForm(), hidden, head, ids, jax.random.key(0)))
    drawn = np.asarray(labels(jnp.arange(1000)))
    share = np.bincount(drawn.reshape(-1), minlength=V) / drawn.size
    want = np.asarray(jax.nn.softmax(hidden[0, 0] @ head.T))
    # Four standard errors of 16,000 draws.
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / drawn.size))
    turned = np.asarray(labels(jnp.arange(1000)[::-1]))
    np.testing.assert_array_equal(turned[::-1], drawn)
    assert drawn.min() >= 0 and drawn.max() < V
