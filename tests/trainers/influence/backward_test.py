"""What the backward pass gives at every site, against autodiff and sums by hand in float64."""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import conjugate, documents, kronecker, queries, sites
from espalier.trainers.influence.backward import backward
from espalier.trainers.influence.consumers import Covariances, Gradients, Rows, Scores, Squares
from espalier.trainers.influence.documents import Reader
from espalier.trainers.influence.scores import output_token_scores
from espalier.trainers.scoring.scoring import Row

V, T = 13, 8
F64 = "float64"


pytestmark = pytest.mark.usefixtures("float64")


BIASED = functools.partial(GatedMlp, use_bias=True)


def made(*, mlp=BIASED, tied=True, **settings):
    """A model without rotation, whose angles are float32, and parameters of some size."""
    config = TransformerConfig(
        **{
            **dict(vocab_size=V, num_layers=2, embed_dim=6, num_heads=1, mlp_dim=5),
            **dict(dtype=F64, param_dtype=F64, layer_pattern=("full_nope",)),
            **settings,
        }
    )
    block = functools.partial(Block, mlp=mlp)
    model = Transformer(config=config, block=block, tie_embeddings=tied)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    r = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(r.normal(size=x.shape) * 0.5), nn.meta.unbox(shapes)["params"]
    )
    return model, params


ROWS = [
    Row(context=[0], targets=[3, 4, 5, 1, 2, 9]),
    Row(context=[0, 7, 7], targets=[8, 1]),
    Row(context=[0], targets=[11]),
]


def batch_of(rows=ROWS, size=3, length=T):
    arrays = documents.columns(rows, range(len(rows)), size, length)
    return {name: jnp.asarray(x) for name, x in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Spy:
    """Returns inputs and gradients themselves."""

    squares: ClassVar[bool] = False
    dtype: str = F64

    def zeros(self, site, batch, length):
        shape = (*site.scan, batch, length)
        return {"a": jnp.zeros((*shape, site.inputs)), "g": jnp.zeros((*shape, site.outputs))}

    def dense(self, a_BTX, g_BTY, mask_BT, inputs):
        return {"a": a_BTX, "g": g_BTY}


class Case:
    """A model with its sites and compiled passes over batches of three rows."""

    def __init__(self, model, params, modules):
        self.model, self.params = model, params
        self.sites = sites.select(model, params, modules)
        self._passes = {}

    def __call__(self, consumer, inputs=None, batch=None, key=None):
        if consumer not in self._passes:

            def run(params, inputs, batch, key):
                return backward(self.model, self.sites, consumer, params, inputs, batch, key=key)

            self._passes[consumer] = jax.jit(run)
        batch = batch_of() if batch is None else batch
        return self._passes[consumer](self.params, inputs or {}, batch, key)[0]

    @functools.cached_property
    def autodiff(self):
        """Gradients of each row by site, from plain autodiff."""

        def loss(params, batch):
            logits = conjugate.logits_of(self.model, params, batch)
            picked = jnp.take_along_axis(
                jax.nn.log_softmax(logits), batch["decoder_target_tokens"][..., None], axis=-1
            )
            return -(picked[..., 0] * batch["decoder_loss_weights"]).sum()

        grad = jax.jit(jax.grad(loss))
        rows = []
        for row in ROWS:
            flat = state_tree.flatten(grad(self.params, batch_of([row], size=1)))
            rows.append({path: site.matrix(flat) for path, site in self.sites.items()})
        return {
            path: np.stack([row[path] for row in rows], axis=len(site.scan))
            for path, site in self.sites.items()
        }


@pytest.fixture(scope="module")
def case():
    return Case(*made(), ("mlp", "attention", "head"))


@pytest.fixture(scope="module")
def spied(case):
    return jax.device_get(case(Spy()))


def test_gradients_are_those_of_autodiff_with_the_bias_in_the_last_row(case, spied):
    """The tied table is used twice: by the head and by the lookup."""
    got = case(Gradients(F64))
    assert set(got) == set(case.sites) and case.sites[sites.HEAD].tied
    for path, site in case.sites.items():
        np.testing.assert_allclose(got[path], case.autodiff[path], atol=1e-10, err_msg=path)
        if not site.tied:  # sums over tokens of the outer products
            outer = np.einsum("...btx,...bty->...bxy", spied[path]["a"], spied[path]["g"])
            np.testing.assert_allclose(outer, case.autodiff[path], atol=1e-10)
    assert case.sites["layers/block_0/mlp/down/kernel"].bias


def test_layers_that_are_not_scanned_have_the_same_gradients(case):
    model, _ = made(scan_layers=False)
    params = {**case.params, "layers": {}}
    for layer in range(2):
        own = jax.tree.map(lambda x, layer=layer: x[layer], case.params["layers"]["block_0"])
        params["layers"][f"block_{layer}"] = own
    unrolled = Case(model, params, ("mlp",))
    got = unrolled(Gradients(F64))
    for path, value in got.items():
        layer, rest = int(path[len("layers/block_")]), path.partition("mlp")[2]
        want = case.autodiff[f"layers/block_0/mlp{rest}"][layer]
        np.testing.assert_allclose(value, want, atol=1e-10)


def test_covariances_are_per_token_without_padding(case, spied):
    """The bias column counts tokens; positions without a loss count in A."""
    got = case(Covariances(1, F64))
    real = np.asarray(batch_of()["decoder_segment_ids"]) != 0
    for path, site in case.sites.items():
        if site.tied:
            continue
        a, g = spied[path]["a"], spied[path]["g"]
        assert not np.abs(a[..., ~real, :]).max() and not np.abs(g[..., ~real, :]).max()
        np.testing.assert_allclose(
            got[path]["a"][..., 0, :, :], np.einsum("...btx,...bty->...xy", a, a), atol=1e-10
        )
        np.testing.assert_allclose(
            got[path]["s"][..., 0, :, :], np.einsum("...btx,...bty->...xy", g, g), atol=1e-10
        )
        np.testing.assert_array_equal(got[path]["count"], np.full(site.scan, real.sum()))
    bias = got["layers/block_0/mlp/down/kernel"]["a"][..., 0, -1, -1]
    np.testing.assert_array_equal(bias, real.sum())


@pytest.fixture(scope="module")
def eigen(case):
    return {
        path: kronecker.eigendecomposition(jax.device_get(sums), name=path, dtype=np.float64)
        for path, sums in case(Covariances(1, F64)).items()
    }


def rotation(eigen):
    return {path: {name: own[name] for name in ("qa", "qs")} for path, own in eigen.items()}


def test_corrected_eigenvalues_square_after_the_sum_over_tokens(case, eigen):
    got = case(Squares(1, F64), rotation(eigen))
    for path, site in case.sites.items():
        qa, qs = eigen[path]["qa"][..., 0, :, :], eigen[path]["qs"][..., 0, :, :]
        d = np.moveaxis(case.autodiff[path], len(site.scan), 0)
        want = np.square(np.swapaxes(qa, -1, -2) @ d @ qs).sum(0)
        np.testing.assert_allclose(got[path], want, atol=1e-10, err_msg=path)
        np.testing.assert_allclose(got[path].sum(), np.square(d).sum(), rtol=1e-10)


@pytest.fixture(scope="module")
def curvature(case, eigen):
    squares = {p: np.asarray(x) / 3 for p, x in case(Squares(1, F64), rotation(eigen)).items()}
    damping = kronecker.Damping(0.1)
    return kronecker.Curvature.of(case.sites, eigen, squares, damping, dtype=np.float64)


@pytest.fixture(scope="module")
def preconditioned(case, curvature):
    """Of all rows as queries."""
    return curvature({p: jnp.asarray(x) for p, x in case.autodiff.items()})


def exact_scores(case, preconditioned):
    """[documents, queries], from whole matrices."""
    total = 0.0
    for path, site in case.sites.items():
        p, d = (
            np.moveaxis(x, len(site.scan), 0) for x in (preconditioned[path], case.autodiff[path])
        )
        total = total + np.asarray(d).reshape(3, -1) @ np.asarray(p).reshape(3, -1).T
    return total


def test_scores_and_norms_of_documents_whole_and_of_low_rank(case, preconditioned):
    want = exact_scores(case, preconditioned)
    norms = sum(
        np.square(np.moveaxis(d, len(case.sites[p].scan), 0)).reshape(3, -1).sum(-1)
        for p, d in case.autodiff.items()
    )
    for rank in (None, 2, 30):
        compress = queries.Compression(rank, F64)
        inputs = {path: compress(x) for path, x in preconditioned.items()}
        whole = {p: np.asarray(queries.whole(own, F64)) for p, own in inputs.items()}
        want_own = exact_scores(case, whole)
        scores, squares = queries.total_scores(case.sites, case(Scores(3, dtype=F64), inputs))
        np.testing.assert_allclose(scores, want_own, atol=1e-10)
        np.testing.assert_allclose(squares, norms, rtol=1e-10)
        if rank != 2:
            np.testing.assert_allclose(scores, want, atol=1e-8)
    np.testing.assert_allclose(want, want.T, rtol=1e-8)  # the same loss on both sides
    assert (np.diagonal(want) >= 0).all()


def test_scores_are_linear_in_queries_and_sums_over_tokens(case, preconditioned, spied):
    """Of a third query that combines the first two."""

    def combined(x, axis):
        first, second, _ = jnp.split(x, 3, axis)
        return jnp.concatenate([first, second, 2 * first - 3 * second], axis)

    inputs = {p: {"p": combined(x, len(case.sites[p].scan))} for p, x in preconditioned.items()}
    results = case(Scores(3, dtype=F64), inputs)
    total, _ = queries.total_scores(case.sites, results)
    want = 2 * total[:, 0] - 3 * total[:, 1]
    np.testing.assert_allclose(total[:, 2], want, atol=1e-10 * np.abs(total).max())
    for path, site in case.sites.items():
        if not site.tied:
            a, p, g = spied[path]["a"], inputs[path]["p"], spied[path]["g"]
            each = np.einsum("...btx,...qxy,...bty->...btq", a, p, g)
            np.testing.assert_allclose(each.sum(-2), results[path]["scores"], atol=1e-10)


def test_padding_batches_and_order_change_nothing(case):
    whole = case(Gradients(F64))
    longer, sums = passes_of(case, batch_of(size=5, length=T + 3))
    turned = case(Gradients(F64), batch=batch_of(ROWS[::-1]))
    for path, site in case.sites.items():
        axis = len(site.scan)
        np.testing.assert_allclose(np.take(longer[path], range(3), axis), whole[path], atol=1e-10)
        assert not np.take(longer[path], [3, 4], axis).any()  # rows that are padding
        np.testing.assert_allclose(np.flip(turned[path], axis), whole[path], atol=1e-12)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), sums, case(Covariances(1, F64))
    )


def passes_of(case, batch):
    @jax.jit
    def run(params, batch):
        return [
            backward(case.model, case.sites, consumer, params, {}, batch)[0]
            for consumer in (Gradients(F64), Covariances(1, F64))
        ]

    return run(case.params, batch)


def test_drawn_labels_depend_on_the_document_not_on_its_batch(case, eigen):
    key = jax.random.key(3)
    consumer = Squares(1, F64)
    whole = case(consumer, rotation(eigen), key=key)
    parts = []
    for i, row in enumerate(ROWS):
        arrays = documents.columns([row], [i], 3, T)
        parts.append(
            case(consumer, rotation(eigen), {n: jnp.asarray(x) for n, x in arrays.items()}, key)
        )
    again = case(consumer, rotation(eigen), key=key)
    other = case(consumer, rotation(eigen), key=jax.random.key(4))
    for path in case.sites:
        total = sum(np.asarray(part[path]) for part in parts)
        np.testing.assert_allclose(whole[path], total, atol=1e-10)
        np.testing.assert_array_equal(whole[path], again[path])
        assert not np.allclose(whole[path], other[path])


def test_labels_of_the_prompt_change_no_query(case):
    batch = batch_of()
    changed = jnp.where(batch["decoder_loss_weights"] > 0, batch["decoder_target_tokens"], 4)
    # The targets change alone; the prompt is still read.
    before, after = (
        case(Gradients(F64), batch=batch),
        case(Gradients(F64), batch={**batch, "decoder_target_tokens": changed}),
    )
    assert (changed != batch["decoder_target_tokens"]).any()
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_small_step_along_the_inverse_product_changes_the_loss_by_the_score(case, curvature):
    """f(theta - delta (G + lambda)^-1 grad L) - f(theta) = -delta s."""
    document = {
        p: jnp.take(jnp.asarray(x), 0, len(case.sites[p].scan)) for p, x in case.autodiff.items()
    }
    step = curvature(document, batched=False)
    change = conjugate.tangents(case.sites, step, case.params)
    flat = state_tree.flatten(case.params)

    @jax.jit
    def loss(delta):
        params = conjugate.with_changed(
            case.params, {p: flat[p] - delta * c for p, c in change.items()}
        )
        batch = batch_of([ROWS[1]], size=1)
        log_probs = jax.nn.log_softmax(conjugate.logits_of(case.model, params, batch))
        picked = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)[
            ..., 0
        ]
        return -(picked * batch["decoder_loss_weights"]).sum()

    score = sum(
        float((np.take(case.autodiff[p], 1, len(s.scan)) * np.asarray(step[p])).sum())
        for p, s in case.sites.items()
    )
    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, -score, rtol=1e-4)


def test_influence_of_predicted_tokens_adds_up_to_the_score(case, preconditioned):
    influence = output_token_scores(case.model, case.sites)
    want = exact_scores(case, preconditioned)
    query = {p: jnp.take(x, 1, len(case.sites[p].scan)) for p, x in preconditioned.items()}
    scores_BT = influence(case.params, batch_of(), query)
    np.testing.assert_allclose(scores_BT.sum(-1), want[:, 1], atol=1e-10)
    # A difference quotient along the same direction.
    alpha, flat = 1e-7, state_tree.flatten(case.params)
    change = conjugate.tangents(case.sites, query, case.params)

    @jax.jit
    def log_probs(size):
        params = conjugate.with_changed(
            case.params, {p: flat[p] - size * c for p, c in change.items()}
        )
        table = jax.nn.log_softmax(conjugate.logits_of(case.model, params, batch_of()))
        picked = jnp.take_along_axis(table, batch_of()["decoder_target_tokens"][..., None], -1)
        return picked[..., 0] * batch_of()["decoder_loss_weights"]

    quotient = (log_probs(alpha) - log_probs(-alpha)) / (2 * alpha)
    np.testing.assert_allclose(scores_BT, quotient, rtol=1e-4, atol=1e-6)


# ---- Gauss-Newton products and conjugate gradients, over one matrix.


@pytest.fixture(scope="module")
def gauss_newton():
    """(case of one matrix, product, dense G_B from Jacobians)."""
    model, params = made(num_layers=1)
    case = Case(model, params, (r"layers/block_0/mlp/down",))
    (path,) = case.sites
    batch = batch_of()
    product = conjugate.gauss_newton(model, case.sites)
    flat = state_tree.flatten(params)

    @jax.jit
    def jacobian():
        zero = {path: jnp.zeros((1, 6, 6))}

        def logits(change):
            own = conjugate.tangents(case.sites, change, params)
            changed = {p: flat[p] + c for p, c in own.items()}
            return conjugate.logits_of(model, conjugate.with_changed(params, changed), batch)

        return jax.jacrev(logits)(zero)[path], logits(zero)

    j, logits = jacobian()
    j, p = np.asarray(j).reshape(3 * T, V, 36), np.asarray(jax.nn.softmax(logits)).reshape(3 * T, V)
    weights = np.asarray(batch["decoder_loss_weights"]).reshape(-1)
    curved = np.einsum("tv,vw->tvw", p, np.eye(V)) - np.einsum("tv,tw->tvw", p, p)
    dense = np.einsum("t,tvi,tvw,twj->ij", weights, j, curved, j) / 3
    return case, path, lambda v: product(params, batch, v), dense


def test_gauss_newton_products_equal_the_dense_matrix(gauss_newton):
    _, path, product, dense = gauss_newton
    x, y = np.random.default_rng(0).normal(size=(2, 1, 6, 6))
    gx, gy, both = (np.asarray(product({path: jnp.asarray(v)})[path]) for v in (x, y, 2 * x - y))
    np.testing.assert_allclose(gx.reshape(-1), dense @ x.reshape(-1), atol=1e-10)
    np.testing.assert_allclose(both, 2 * gx - gy, atol=1e-10)
    np.testing.assert_allclose((gx * y).sum(), (x * gy).sum(), rtol=1e-10)
    assert (gx * x).sum() >= 0


def test_products_over_several_batches_are_the_mean_over_all_documents(gauss_newton):
    case, path, _, dense = gauss_newton
    batches = [(2, batch_of(ROWS[:2])), (1, batch_of(ROWS[2:]))]  # both with absent rows
    product = conjugate.over(conjugate.gauss_newton(case.model, case.sites), case.params, batches)
    x = np.random.default_rng(0).normal(size=(1, 6, 6))
    got = np.asarray(product({path: jnp.asarray(x)})[path]).reshape(-1)
    np.testing.assert_allclose(got, dense @ x.reshape(-1), atol=1e-10)


def test_conjugate_gradients_start_at_ekfac_descend_and_converge(gauss_newton):
    case, path, product, dense = gauss_newton
    site = case.sites[path]
    r = np.random.default_rng(1)
    q = {path: jnp.asarray(r.normal(size=(1, 6, 6)))}
    # A poor preconditioner, and the damping of both.
    a = np.linalg.qr(r.normal(size=(6, 6)))[0][None, None]
    eigen = {"qa": a, "qs": a, "la": np.ones((1, 1, 6)), "ls": np.ones((1, 1, 6))}
    values = np.abs(r.normal(size=(1, 6, 6))) + 0.1
    damping = kronecker.Damping(0.05, "absolute")
    curvature = kronecker.Curvature.of(
        {path: site}, {path: eigen}, {path: values}, damping, dtype=np.float64
    )
    start = conjugate.solve(product, curvature, q, steps=0).x[path]
    np.testing.assert_array_equal(start, curvature(q, batched=False)[path])
    solution = conjugate.solve(product, curvature, q, steps=200)
    want = np.linalg.solve(dense + 0.05 * np.eye(36), np.asarray(q[path]).reshape(-1))
    np.testing.assert_allclose(np.asarray(solution.x[path]).reshape(-1), want, rtol=1e-8, atol=1e-8)
    assert solution.stopped == "converged"
    falls = np.diff(solution.objectives)
    assert (falls <= 1e-12 * np.abs(solution.objectives[-1])).all()

    # A relative damping is that of EK-FAC, by the mean of its eigenvalues.
    relative = kronecker.Curvature.of(
        {path: site}, {path: eigen}, {path: values}, kronecker.Damping(0.3), dtype=np.float64
    )
    solution = conjugate.solve(product, relative, q, steps=200)
    damped = dense + 0.3 * values.mean() * np.eye(36)
    want = np.linalg.solve(damped, np.asarray(q[path]).reshape(-1))
    np.testing.assert_allclose(np.asarray(solution.x[path]).reshape(-1), want, rtol=1e-8, atol=1e-8)

    def exact(v):  # a curvature that the preconditioner knows
        return {path: kronecker.apply_eigen(site, eigen, values, v[path], batched=False)}

    assert conjugate.solve(exact, curvature, q, steps=3).residuals[0] < 1e-10
    negative = conjugate.solve(lambda v: {path: -v[path]}, curvature, q, steps=3)
    assert negative.stopped == "curvature" and np.isfinite(negative.x[path]).all()


# ---- Large heads.


@pytest.mark.parametrize("tied", [False, True])
def test_the_covariance_of_a_large_head_is_its_diagonal_blocks(tied, monkeypatch):
    """With 13 tokens in blocks of 5, 5 and 3: beside numpy's blocks, and a dense inverse of the curvature in their eigenvectors."""
    monkeypatch.setattr(sites, "HEAD_BLOCK", 5)
    head = Case(*made(num_layers=1, tied=tied), ("head",))
    site, spied = head.sites[sites.HEAD], jax.device_get(head(Spy()))[sites.HEAD]
    a, g = (spied[name].reshape(-1, spied[name].shape[-1]) for name in "ag")
    sums = jax.device_get(head(Covariances(1, F64)))[sites.HEAD]
    assert sums["a"].shape == (1, 6, 6) and sums["s"].shape == (3, 5, 5)
    np.testing.assert_allclose(sums["a"][0], a.T @ a, atol=1e-10)
    bases = []
    for n, part in enumerate((slice(0, 5), slice(5, 10), slice(10, 13))):
        own = (g.T @ g)[part, part]
        np.testing.assert_allclose(sums["s"][n, : len(own), : len(own)], own, atol=1e-10)
        assert not sums["s"][n, len(own) :].any()
        bases.append(np.linalg.eigh(own)[1])
    blocks = {sites.HEAD: kronecker.eigendecomposition(sums, name="", dtype=np.float64)}
    squares = {p: np.asarray(x) / 3 for p, x in head(Squares(1, F64), rotation(blocks)).items()}
    curvature = kronecker.Curvature.of(
        head.sites, blocks, squares, kronecker.Damping(0.1), dtype=np.float64
    )
    d_BXY = head.autodiff[sites.HEAD]
    qs = linalg.block_diag(*bases)
    q = np.kron(np.linalg.eigh(a.T @ a)[1], qs)
    values = np.square(d_BXY.reshape(3, -1) @ q).mean(0)
    dense = q @ np.diag(values) @ q.T + 0.1 * values.mean() * np.eye(len(values))
    want = np.linalg.solve(dense, d_BXY.reshape(3, -1).T).T.reshape(d_BXY.shape)
    got = curvature({sites.HEAD: jnp.asarray(d_BXY)})[sites.HEAD]
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())
    assert (site.blocks(1), site.blocks(4)) == ((1, 3), (4, 4))
    assert sites.blocked_head(head.sites, 4) is None
    said = sites.blocked_head(head.sites, 1)
    assert "13 tokens is approximated by 3 diagonal blocks of at most 5 tokens; 65.1 %" in said
    monkeypatch.setattr(sites, "HEAD_BLOCK", 13)
    assert sites.blocked_head(head.sites, 1) is None


# ---- Mixtures of experts.


@pytest.fixture(scope="module")
def mixture():
    mlp = functools.partial(MoeMlp, num_experts=3, top_k=2)
    return Case(*made(mlp=mlp, num_layers=1), ("mlp",))


def test_experts_equal_autodiff_and_a_loop_over_experts(mixture):
    """Every expert matrix is its own block; documents without a token for it count as zero."""
    grads = mixture(Gradients(F64))
    covariances = mixture(Covariances(2, F64))
    eigen = {
        p: kronecker.eigendecomposition(jax.device_get(x), name=p, dtype=np.float64)
        for p, x in covariances.items()
    }
    squares = mixture(Squares(2, F64), rotation(eigen))
    inputs = {p: {"p": jnp.asarray(x)} for p, x in mixture.autodiff.items()}
    low = {p: queries.Compression(2, F64)(own["p"]) for p, own in inputs.items()}
    scores, low_scores = (mixture(Scores(3, dtype=F64), own) for own in (inputs, low))
    # The router computes in float32.
    for path in mixture.sites:
        d = mixture.autodiff[path][0]  # [B, E, X, Y]
        assert d.shape[:2] == (3, 3)
        np.testing.assert_allclose(grads[path][0], d, atol=2e-6)
        for e in range(3):
            qa, qs = (jnp.asarray(eigen[path][n][0, e]) for n in ("qa", "qs"))
            rotate = kronecker.rotate_matrix
            want = sum(
                np.square(rotate(jnp.asarray(grads[path][0, b, e]), qa, qs)) for b in range(3)
            )
            np.testing.assert_allclose(squares[path][0, e], want, atol=1e-10)
        flat = np.asarray(grads[path][0]).reshape(3, -1)
        np.testing.assert_allclose(scores[path]["scores"][0], flat @ d.reshape(3, -1).T, atol=1e-10)
        whole = np.asarray(queries.whole(low[path], F64))[0].reshape(3, -1)
        np.testing.assert_allclose(low_scores[path]["scores"][0], flat @ whole.T, atol=1e-10)
        np.testing.assert_allclose(scores[path]["squares"][0], np.square(flat).sum(-1), rtol=1e-10)
        count = np.asarray(covariances[path]["count"][0])
        assert count.sum() == 2 * 11  # two experts for each token that is read
        curvature = kronecker.Curvature.of(
            {path: mixture.sites[path]},
            {path: eigen[path]},
            {path: squares[path]},
            kronecker.Damping(0.1),
        )
        assert np.isfinite(curvature({path: grads[path]})[path]).all()


class Experts:
    """Tokens of three documents at four experts, of which the last has none; a token is at several, or at none."""

    X, Y = 5, 4

    def __init__(self):
        r = np.random.default_rng(5)
        self.used_EM = r.random((4, 3 * T)) < 0.4
        self.used_EM[3] = False
        self.a_EMX, self.g_EMY = (r.normal(size=(4, 3 * T, d)) for d in (self.X, self.Y))
        self.qa, self.qs = (r.normal(size=(4, 2, d, d)) for d in (3, 2))  # two blocks
        self.p = r.normal(size=(2, 4, self.X, self.Y))
        self.u, self.v = (r.normal(size=(2, 4, d, 2)) for d in (self.X, self.Y))
        # Arrays, and their dimensions of experts.
        rotation = {"qa": (self.qa, 0), "qs": (self.qs, 0)}
        self.consumers = [
            (Covariances(2, F64), {}),
            (Gradients(F64), {}),
            (Squares(2, F64), rotation),
            (Scores(2, dtype=F64), {"p": (self.p, 1)}),
            (Scores(2, dtype=F64), {"u": (self.u, 1), "v": (self.v, 1)}),
        ]

    def together(self, order=range(4)):
        """The results of each consumer for rows that are sorted by expert, with the experts in an order."""
        order = np.asarray(order)
        experts, tokens = np.nonzero(self.used_EM[order])
        spare = 4  # rows without an expert
        a_RX, g_RY = (
            jnp.asarray(np.pad(x[order][experts, tokens], ((0, spare), (0, 0))))
            for x in (self.a_EMX, self.g_EMY)
        )
        sizes_E = jnp.asarray(self.used_EM[order].sum(1))
        tokens_R = jnp.asarray(np.pad(tokens, (0, spare)))
        results = []
        for consumer, inputs in self.consumers:

            def run(a_RX, g_RY, sizes_E, tokens_R, inputs, consumer=consumer):
                rows = Rows(sizes_E, tokens_R, 3, T)
                return consumer.experts(a_RX, g_RY, rows, inputs)

            own = {name: jnp.asarray(np.take(x, order, axis)) for name, (x, axis) in inputs.items()}
            results.append(jax.device_get(jax.jit(run)(a_RX, g_RY, sizes_E, tokens_R, own)))
        return results

    def one_by_one(self):
        """The results of each consumer for every expert's tokens, by the dense form: the others are padding."""
        results = []
        for consumer, inputs in self.consumers:
            run, each = jax.jit(consumer.dense), []
            for e, used_M in enumerate(self.used_EM):
                a_BTX, g_BTY = (
                    jnp.asarray((x[e] * used_M[:, None]).reshape(3, T, -1))
                    for x in (self.a_EMX, self.g_EMY)
                )
                own = {n: jnp.asarray(np.take(x, e, axis)) for n, (x, axis) in inputs.items()}
                mask_BT = jnp.asarray(used_M.reshape(3, T), F64)
                each.append(jax.device_get(run(a_BTX, g_BTY, mask_BT, own)))
            results.append(each)
        return results


@pytest.fixture(scope="module")
def experts():
    made = Experts()
    return made, made.together()


def test_results_of_experts_are_those_of_one_expert_after_the_other(experts):
    made, (covariances, gradients, squares, *scores) = experts
    one_by_one = made.one_by_one()
    for e in range(4):
        for got, (want,) in (
            (jax.tree.map(lambda x, e=e: x[e], covariances), one_by_one[0][e : e + 1]),
            (gradients[:, e], one_by_one[1][e : e + 1]),
            (squares[e], one_by_one[2][e : e + 1]),
        ):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), got, want)
    for got, each in zip(scores, one_by_one[3:], strict=True):
        for name in ("scores", "squares"):
            want = sum(one[name] for one in each)
            np.testing.assert_allclose(got[name], want, atol=1e-10, err_msg=name)
    assert not squares[3].any() and covariances["count"].tolist() == made.used_EM.sum(1).tolist()


def test_experts_in_another_order_have_the_same_blocks_bit_for_bit(experts):
    made, (covariances, gradients, squares, *scores) = experts
    order = np.array([2, 0, 3, 1])
    turned = made.together(order)
    for got, want in (
        (turned[0], jax.tree.map(lambda x: x[order], covariances)),
        (turned[1], gradients[:, order]),
        (turned[2], squares[order]),
    ):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    for got, want in zip(turned[3:], scores, strict=True):  # sums over experts
        np.testing.assert_allclose(got["scores"], want["scores"], atol=1e-10)


def test_the_inverse_product_of_experts_is_that_of_each_matrix(experts):
    """It is finite, and zero for the expert without a token."""
    made, (covariances, gradients, *_) = experts
    eigen = kronecker.eigendecomposition(covariances, name="", dtype=np.float64)
    squares = jax.jit(Squares(2, F64).dense)
    site = sites.Site(path="m/kernel", inputs=made.X, outputs=made.Y, experts=4)
    values = []
    for e, used_M in enumerate(made.used_EM):
        a_BTX, g_BTY = (
            jnp.asarray((x[e] * used_M[:, None]).reshape(3, T, -1))
            for x in (made.a_EMX, made.g_EMY)
        )
        own = {name: jnp.asarray(eigen[name][e]) for name in ("qa", "qs")}
        values.append(squares(a_BTX, g_BTY, None, own) / 3)
    values = np.stack(values)
    curvature = kronecker.Curvature.of(
        {"m": site}, {"m": eigen}, {"m": values}, kronecker.Damping(0.1), dtype=np.float64
    )
    got = np.asarray(curvature({"m": jnp.asarray(gradients)})["m"])
    assert np.isfinite(got).all() and not got[:, 3].any() and got[:, :3].any((2, 3)).all()
    single = sites.Site(path="m/kernel", inputs=made.X, outputs=made.Y)
    for e in range(4):
        damping = kronecker.Damping(float(curvature.damping["m"][e].squeeze()), "absolute")
        alone = kronecker.Curvature.of(
            *({"m": single}, {"m": {name: x[e] for name, x in eigen.items()}}, {"m": values[e]}),
            damping,
            dtype=np.float64,
        )
        want = alone({"m": jnp.asarray(gradients[:, e])})["m"]
        np.testing.assert_allclose(got[:, e], want, atol=1e-10)


def test_permuted_experts_permute_blocks(mixture):
    order = np.array([2, 0, 1])
    block = mixture.params["layers"]["block_0"]
    mlp = {
        name: {"kernel": block["mlp"][name]["kernel"][:, order]} for name in ("gate", "up", "down")
    }
    mlp["router"] = {"kernel": block["mlp"]["router"]["kernel"][..., order]}
    params = {**mixture.params, "layers": {"block_0": {**block, "mlp": mlp}}}
    before = mixture(Covariances(1, F64))
    run = jax.jit(
        lambda p: backward(mixture.model, mixture.sites, Covariances(1, F64), p, {}, batch_of())[0]
    )
    after = run(params)
    for path in mixture.sites:
        for name in ("a", "s", "count"):
            np.testing.assert_allclose(after[path][name], before[path][name][:, order], atol=2e-6)


def test_one_expert_with_gate_one_is_the_dense_layer():
    dense = Case(*made(mlp=GatedMlp, num_layers=1), ("mlp",))
    model, _ = made(mlp=functools.partial(MoeMlp, num_experts=1, top_k=1), num_layers=1)
    block = dense.params["layers"]["block_0"]
    mlp = {name: {"kernel": own["kernel"][:, None]} for name, own in block["mlp"].items()}
    mlp["router"] = {"kernel": jnp.zeros((1, 6, 1))}
    single = Case(model, {**dense.params, "layers": {"block_0": {**block, "mlp": mlp}}}, ("mlp",))
    for consumer, axis in ((Gradients(F64), 2), (Covariances(1, F64), 1)):
        want, got = dense(consumer), single(consumer)
        own = jax.tree.map(lambda x, axis=axis: np.squeeze(x, axis), got)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), own, want)


# ---- Which modules have taps.


def test_modules_are_chosen_by_name_or_pattern_and_what_has_no_tap_is_named(case):
    assert set(sites.select(case.model, case.params, ("mlp",))) == {
        f"layers/block_0/mlp/{name}/kernel" for name in ("gate", "up", "down")
    }
    assert sites.select(case.model, case.params, (r".*/query",))
    with pytest.raises(sites.SiteError, match="without a tap .*final_norm/scale"):
        sites.select(case.model, case.params, (r"final_norm.*",))
    with pytest.raises(sites.SiteError, match="matches no layer. Layers with a tap: layers"):
        sites.select(case.model, case.params, ("mpl",))
    with pytest.raises(sites.SiteError, match="not a regular expression"):
        sites.select(case.model, case.params, ("(",))


def test_a_model_without_taps_is_an_error_that_names_its_layers():
    class Plain(nn.Module):
        config: object
        kind: object = None
        settings = None

        @nn.compact
        def __call__(self, x_BTD, *, segments_BT=None):
            return x_BTD * self.param("scale", nn.initializers.ones, (1, 1, 6))

    class PlainAttention(Plain):
        @nn.compact
        def __call__(self, x_BTD, *, positions_BT, segments_BT, cache=None, policy=None):
            return x_BTD * self.param("scale", nn.initializers.ones, (1, 1, 6)), None

    config = TransformerConfig(
        **dict(vocab_size=V, num_layers=1, embed_dim=6, num_heads=1, mlp_dim=5),
        **dict(dtype=F64, param_dtype=F64),
    )
    model = Transformer(
        config=config, block=functools.partial(Block, mlp=Plain, attention=PlainAttention)
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    with pytest.raises(
        sites.SiteError, match="No layer of this Transformer has a tap: .*block_0/mlp/scale"
    ):
        sites.select(model, nn.meta.unbox(params), ("mlp",))


def test_queries_of_a_batch_that_is_not_full_are_prepared_in_order(case):
    case = Case(case.model, case.params, ("mlp",))
    reader = Reader(model=case.model, params=case.params, batch_size=2)
    prepared = queries.prepare(
        reader, case.sites, ROWS, None, rank=2, store_dtype="float32", dtype=F64, sample=ROWS
    )
    assert prepared.size == 3 and (prepared.kept > 0).all() and (prepared.kept <= 1).all()
    whole = queries.prepare(reader, case.sites, ROWS, None, rank=None, dtype=F64)
    for path, site in case.sites.items():
        np.testing.assert_allclose(whole.inputs[path]["p"], case.autodiff[path], atol=1e-10)
        assert prepared.inputs[path]["u"].shape == (2, 3, site.inputs, 2)
    norms = sum(
        np.square(np.moveaxis(d, 1, 0)).reshape(3, -1).sum(-1)
        for p, d in case.autodiff.items()
        if p in case.sites
    )
    np.testing.assert_allclose(whole.norms, np.sqrt(norms), rtol=1e-10)
    np.testing.assert_allclose(whole.kept, 1)
    assert np.isfinite(prepared.pearson).all() and np.isnan(whole.pearson).all()
