"""Factors, damping and inverse products against dense matrices in float64; lexical scores, and measures. No model runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from espalier.trainers.influence import kronecker, lexical, measures, queries, scores
from espalier.trainers.influence.kronecker import Curvature, Damping, FactorError
from espalier.trainers.influence.sites import Site

X, Y = 5, 4


pytestmark = pytest.mark.usefixtures("float64")


def eigen_of(a_TX, g_TY, count=None):
    sums = {"a": (a_TX.T @ a_TX)[None], "s": (g_TY.T @ g_TY)[None]}
    sums["count"] = np.asarray(len(a_TX) if count is None else count)
    return kronecker.eigendecomposition(sums, name="site", dtype=np.float64)


def corrected(d_NXY, eigen):
    rotated = [
        np.asarray(kronecker.rotate_matrix(d, *map(jnp.asarray, (eigen["qa"], eigen["qs"]))))
        for d in map(jnp.asarray, d_NXY)
    ]
    return np.square(rotated).mean(0)


def dense(eigen, values):
    """Q diag(values) Q^T, of matrices flattened by rows."""
    q = np.kron(eigen["qa"][0], eigen["qs"][0])
    return q @ np.diag(values.reshape(-1)) @ q.T


def fisher(d_NXY):
    flat = d_NXY.reshape(len(d_NXY), -1)
    return flat.T @ flat / len(flat)


@pytest.fixture(scope="module")
def samples():
    """Inputs and gradients of single tokens that depend on each other."""
    r = np.random.default_rng(0)
    a = r.normal(size=(40, X))
    g = r.normal(size=(40, Y)) * (1 + a[:, :1] ** 2)
    return a, g, np.einsum("nx,ny->nxy", a, g)


def test_one_sample_with_all_its_labels_is_the_exact_fisher():
    r = np.random.default_rng(1)
    a, p = r.normal(size=(1, X)), r.dirichlet(np.ones(Y))
    g = (np.eye(Y) - p) * np.sqrt(p)[:, None]  # of every label, weighted by its probability
    rows = np.repeat(a, Y, 0)
    eigen = kronecker.eigendecomposition(
        {"a": (a.T @ a)[None], "s": (g.T @ g)[None], "count": np.asarray(1)}, name="", dtype=float
    )
    d = np.einsum("nx,ny->nxy", rows, g)
    values = corrected(d, eigen) * Y
    np.testing.assert_allclose(dense(eigen, values), fisher(d) * Y, atol=1e-10)


def test_linear_least_squares_is_the_exact_hessian_and_scores_have_their_closed_form():
    r = np.random.default_rng(2)
    a = np.repeat(r.normal(size=(30, X)), Y, 0)
    g = np.tile(np.sqrt(Y) * np.eye(Y), (30, 1))  # unit noise: every direction with every input
    eigen = eigen_of(a, g)
    values = corrected(np.einsum("nx,ny->nxy", a, g), eigen)
    hessian = np.kron(a.T @ a / len(a), np.eye(Y))
    np.testing.assert_allclose(dense(eigen, values), hessian, atol=1e-8)
    site = Site(path="m/kernel", inputs=X, outputs=Y)
    damping = Damping(0.3, "absolute")
    curvature = Curvature.of({"m": site}, {"m": eigen}, {"m": values}, damping, dtype=np.float64)
    q, d = r.normal(size=(2, X, Y))
    got = (np.asarray(curvature({"m": jnp.asarray(q)}, batched=False)["m"]) * d).sum()
    want = q.reshape(-1) @ np.linalg.solve(hessian + 0.3 * np.eye(X * Y), d.reshape(-1))
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_eigenvectors_are_orthonormal_and_rebuild_the_covariances(samples, dtype):
    a, g, _ = samples
    sums = {"a": (a.T @ a)[None], "s": (g.T @ g)[None], "count": np.asarray(len(a))}
    eigen = kronecker.eigendecomposition(sums, name="site", dtype=dtype)
    tolerance = 1e-10 if dtype == np.float64 else 1e-5
    for side, x in (("a", a), ("s", g)):
        q, values = eigen[f"q{side}"][0], eigen[f"l{side}"][0]
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=tolerance)
        np.testing.assert_allclose(
            (q * values) @ q.T / values.max(), x.T @ x / len(x) / values.max(), atol=tolerance
        )


def test_corrected_eigenvalues_add_up_to_the_squared_norm_and_fit_the_fisher_better(samples):
    a, g, d = samples
    eigen = eigen_of(a, g)
    values, exact = corrected(d, eigen), fisher(d)
    np.testing.assert_allclose(values.sum(), np.square(d).sum((1, 2)).mean(), rtol=1e-10)
    errors = [
        np.linalg.norm(exact - dense(eigen, v)) for v in (values, kronecker.kfac_eigenvalues(eigen))
    ]
    assert errors[0] <= errors[1] + 1e-12
    assert errors[0] < 0.95 * errors[1]  # here the gradients depend on the inputs


@pytest.fixture(scope="module")
def curved(samples):
    """(site, eigen, corrected eigenvalues, function from a damping to the curvature)."""
    a, g, d = samples
    eigen = eigen_of(a, g)
    site, values = Site(path="m/kernel", inputs=X, outputs=Y), corrected(d, eigen)

    def curvature(damping):
        return Curvature.of({"m": site}, {"m": eigen}, {"m": values}, damping, dtype=np.float64)

    return site, eigen, values, curvature


def test_the_damped_curvature_of_the_inverse_product_is_the_vector(curved):
    site, eigen, values, curvature = curved
    v = np.random.default_rng(3).normal(size=(3, X, Y))
    for damping in (Damping(0.1), Damping(1e-6, "absolute")):
        solved = curvature(damping)({"m": jnp.asarray(v)})["m"]
        back = kronecker.apply_eigen(site, eigen, values + damping.of(site, values), solved)
        np.testing.assert_allclose(back, v, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(Damping(0.1).of(site, values), 0.1 * values.mean())


def test_a_larger_damping_follows_from_a_smaller_one(curved):
    _, _, _, curvature = curved
    small, large = curvature(Damping(1e-4)), curvature(Damping(0.1))
    times = small.times(1000)
    np.testing.assert_allclose(times.inverse["m"], large.inverse["m"], rtol=1e-12)
    np.testing.assert_allclose(times.damping["m"], large.damping["m"], rtol=1e-12)
    empty = dataclasses.replace(small, inverse={"m": np.zeros((X, Y))})
    np.testing.assert_array_equal(empty.times(10).inverse["m"], 0)  # no gradient, no inverse


def test_scores_are_linear_symmetric_and_fall_with_damping(curved):
    *_, curvature = curved
    r = np.random.default_rng(4)
    x, y = r.normal(size=(2, X, Y))

    def score(q, d, damping=None):
        solved = curvature(damping or Damping(0.1))({"m": jnp.asarray(q)}, batched=False)["m"]
        return float((np.asarray(solved) * d).sum())

    np.testing.assert_allclose(
        score(2 * x - 3 * y, x), 2 * score(x, x) - 3 * score(y, x), rtol=1e-10
    )
    np.testing.assert_allclose(score(x, y), score(y, x), rtol=1e-10)
    own = [score(x, x, Damping(value, "absolute")) for value in (0.1, 1.0, 10.0)]
    assert own[0] > own[1] > own[2] > 0


def test_large_damping_gives_the_dot_product_of_gradients(curved):
    _, _, values, curvature = curved
    q, d = np.random.default_rng(5).normal(size=(2, X, Y))
    for damping in (1e3, 1e6):
        solved = curvature(Damping(damping, "absolute"))({"m": jnp.asarray(q)}, batched=False)["m"]
        error = abs(damping * float((np.asarray(solved) * d).sum()) - (q * d).sum())
        assert error <= values.max() / damping * np.linalg.norm(q) * np.linalg.norm(d)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_are_those_of_the_diagonal(samples, count):
    """Of 5 inputs in 2 blocks, the second is padded."""
    a, g, d = samples
    padded = [np.asarray(kronecker.split(jnp.asarray(x), count)) for x in (a, g)]
    sums = {side: np.einsum("tns,tnr->nsr", x, x) for side, x in zip("as", padded, strict=True)}
    eigen = kronecker.eigendecomposition(
        {**sums, "count": np.asarray(len(a))}, name="", dtype=float
    )
    site = Site(path="m/kernel", inputs=X, outputs=Y)
    curvature = Curvature.of(
        {"m": site}, {"m": eigen}, {"m": corrected(d, eigen)}, Damping(0.1), dtype=np.float64
    )
    size = kronecker.block_size(X, count)
    covariance = a.T @ a / len(a)
    for n in range(count):
        own = covariance[n * size : (n + 1) * size, n * size : (n + 1) * size]
        np.testing.assert_allclose(np.linalg.eigvalsh(own), eigen["la"][n][-len(own) :], atol=1e-10)
    v = jnp.asarray(d[0])
    rotated = kronecker.rotate_matrix(v, *map(jnp.asarray, (eigen["qa"], eigen["qs"])))
    back = kronecker.rotate_matrix_back(
        rotated, *map(jnp.asarray, (eigen["qa"], eigen["qs"])), (X, Y)
    )
    np.testing.assert_allclose(back, v, atol=1e-12)
    assert np.isfinite(curvature({"m": v}, batched=False)["m"]).all()
    # Padding does not change the mean eigenvalue.
    np.testing.assert_allclose(
        curvature.damping["m"], 0.1 * np.square(d).sum((1, 2)).mean() / (X * Y), rtol=1e-10
    )


def test_an_expert_without_tokens_has_the_damping_of_its_layer():
    site = Site(path="m/kernel", inputs=2, outputs=2, experts=3)
    values = np.stack([np.full((2, 2), v) for v in (0.0, 1.0, 5.0)])
    np.testing.assert_allclose(Damping(0.1).of(site, values).reshape(-1), [0.2, 0.2, 0.5])
    assert np.isfinite(kronecker.reciprocals(site, values, Damping(0.1))).all()
    np.testing.assert_array_equal(kronecker.reciprocals(site, 0 * values, Damping(0.1)), 0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damping_that_is_not_positive_is_an_error(value):
    with pytest.raises(FactorError, match=r"--damping=.* must be a positive number"):
        Damping(value)


def test_a_covariance_that_is_not_finite_names_its_site():
    sums = {"a": np.full((1, 2, 2), np.nan), "s": np.eye(2)[None], "count": np.asarray(3)}
    with pytest.raises(FactorError, match="covariance 'a' of layers/mlp is not finite"):
        kronecker.eigendecomposition(sums, name="layers/mlp")


def test_full_rank_is_exact_and_the_error_falls_with_rank(monkeypatch):
    v = jnp.asarray(np.random.default_rng(6).normal(size=(3, 9, 7)))
    errors = []
    for rank in range(1, 8):
        u, w = queries.low_rank(v, rank)
        assert u.shape == (3, 9, rank) and w.shape == (3, 7, rank)
        errors.append(float(jnp.linalg.norm(v - u @ jnp.swapaxes(w, -1, -2))))
    assert errors[-1] < 1e-8 and all(a >= b for a, b in zip(errors, errors[1:], strict=False))
    # Of a matrix whose spectrum ends, a random range of it is enough.
    jax.clear_caches()
    monkeypatch.setattr(queries, "_EXACT_SVD", 0)
    tall = jnp.asarray(np.random.default_rng(7).normal(size=(30, 3)))
    product = tall @ jnp.asarray(np.random.default_rng(8).normal(size=(3, 40)))
    u, w = queries.low_rank(product, 3)
    np.testing.assert_allclose(u @ w.T, product, atol=1e-8)
    assert list(queries.Compression(7, "float64")(v)) == ["p"]  # not smaller than the matrix


def test_one_token_with_all_influence_is_spurious_and_equal_ones_are_not():
    assert scores.concentration([0, -3.0, 0]) == 1
    for count in (4, 9, 16):
        assert scores.concentration([-2.0] * count) == 1 / np.sqrt(count)
    assert scores.is_spurious([5.0, 0.1]) and not scores.is_spurious([1.0, -1.0, 1.0])
    assert scores.concentration([]) == scores.concentration([0.0]) == 0


def test_lexical_scores_equal_an_example_by_hand():
    documents = [[1, 2, 2, 3], [2, 4], [5, 6, 7], []]
    got = lexical.tfidf([[2, 5, 2], [9]], documents)
    idf = {2: np.log(4 / 2), 5: np.log(4 / 1)}
    np.testing.assert_allclose(got, [[idf[2], 0], [idf[2], 0], [idf[5], 0], [0, 0]], atol=1e-12)
    pytest.importorskip("bm25s")
    mean = 9 / 4

    def bm25(count, length, holding):
        idf = np.log(1 + (4 - holding + 0.5) / (holding + 0.5))
        return idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * length / mean))

    want = [[2 * bm25(2, 4, 2)], [2 * bm25(1, 2, 2)], [bm25(1, 3, 1)], [0]]
    np.testing.assert_allclose(lexical.bm25([[2, 5, 2]], documents), want, rtol=1e-6, atol=1e-7)
    assert lexical.bm25([[9], [2]], [[], []]).tolist() == [[0, 0], [0, 0]]


def test_the_datamodeling_score_of_true_effects_is_one_and_of_noise_within_its_interval_of_zero():
    r = np.random.default_rng(9)
    effects, subsets = r.normal(size=(60, 8)), r.random((200, 60)) < 0.5
    losses = 3 - subsets @ effects
    np.testing.assert_allclose(
        measures.linear_datamodeling_score(effects, subsets, losses), 1, rtol=1e-12
    )
    # Of random scores, 95 % intervals of the mean over 8 queries have 0 in them about as often.
    effects = r.normal(size=(60, 400))
    noise = measures.linear_datamodeling_score(
        r.normal(size=effects.shape), subsets, 3 - subsets @ effects
    ).reshape(50, 8)
    half = stats.t.ppf(0.975, 7) * noise.std(1, ddof=1) / np.sqrt(8)
    assert (np.abs(noise.mean(1)) <= half).sum() >= 43
    assert abs(noise.mean()) < 0.03
    assert measures.spearman(np.array([1, 2, 2, 9]), np.array([0, 5, 5, 6])) == pytest.approx(1)
