"""How well approximations of influence predict retraining where every optimum can be found: a tiny language model in float64.

Only the MLPs of the model are trained, to convergence, on texts of a random table of successors. Its scores by the exact
Hessian, the dense Gauss-Newton matrix, EK-FAC with and without conjugate gradients, K-FAC and the dot product are compared
with three kinds of retraining from its optimum: the proximal Bregman response to each document, training without
each document, and training on random halves.

Shapes: N documents, Q queries, S halves.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

DOCUMENTS, QUERIES, HALVES = 96, 12, 48
LENGTH, SYMBOLS = 10, 12
DAMPING = 0.2  # 2e-2 for each of the tokens whose losses a document sums
EPSILON = 1.0 / DOCUMENTS  # of the Bregman response: one copy more
LABELS = 20  # draws of the labels of each document, for the factors
CG_STEPS = 400
METHODS = ("hessian", "gauss_newton", "ekfac_cg", "ekfac", "kfac", "identity")
_WIDTH, _HIDDEN = 6, 6
_VANISHED = 1e-6  # largest weight


def run(seed: int) -> dict[str, Any]:
    """Returns {"pbrf", "loo", "lds": by method, the mean over queries; "with_gauss_newton": correlations of scores}."""
    import jax

    with jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
        return _run(seed, Path(folder))


def _run(seed: int, folder: Path) -> dict[str, Any]:
    from trainers.influence import measures

    rng = np.random.default_rng((seed, 3))
    problem, rows, asked, theta_P = optimum(rng)
    curvature_PP, hessian_PP = problem.gauss_newton(theta_P), problem.hessian(theta_P)
    scores = all_scores(problem, theta_P, curvature_PP, hessian_PP, rows, asked, folder)
    before_Q = np.asarray(problem.query_losses(theta_P))

    def change(after_P: np.ndarray) -> np.ndarray:
        return np.asarray(problem.query_losses(after_P)) - before_Q

    pbrf_NQ, loo_NQ = np.zeros((2, DOCUMENTS, QUERIES))
    for n in tqdm(range(DOCUMENTS), desc="without one", unit="document", disable=None):
        after = problem.bregman_response(theta_P, n, EPSILON, curvature_PP)
        pbrf_NQ[n] = -change(after)
        weights = np.ones(DOCUMENTS)
        weights[n] = 0
        loo_NQ[n] = change(problem.trained(theta_P, weights, hessian_PP))
    halves_SN = np.stack([rng.permutation(DOCUMENTS) < DOCUMENTS // 2 for _ in range(HALVES)])
    losses_SQ = np.stack(
        [
            np.asarray(problem.query_losses(problem.trained(theta_P, 2.0 * half, hessian_PP)))
            for half in tqdm(halves_SN, desc="halves", unit="half", disable=None)
        ]
    )
    return {
        "pbrf": {name: correlation(x, pbrf_NQ) for name, x in scores.items()},
        "loo": {name: correlation(x, loo_NQ) for name, x in scores.items()},
        "lds": {
            name: float(measures.linear_datamodeling_score(x, halves_SN, losses_SQ).mean())
            for name, x in scores.items()
        },
        "with_gauss_newton": {
            name: correlation(x, scores["gauss_newton"]) for name, x in scores.items()
        },
        "loss": float(np.asarray(problem.document_losses(theta_P)).mean()),
    }


def correlation(scores_NQ: np.ndarray, responses_NQ: np.ndarray) -> float:
    """Returns the mean over queries of Pearson's correlation over documents."""
    pairs = zip(scores_NQ.T, responses_NQ.T, strict=True)
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs]))


def optimum(rng: np.random.Generator) -> tuple[Any, list[Any], list[Any], np.ndarray]:
    """Returns a problem with its rows, and the weights that are optimal.

    A start whose weights the regularisation drives to zero is drawn again: no document has an influence there.
    """
    while True:
        problem, rows, asked = make_problem(rng)
        theta_P = problem.trained(problem.start_P)
        if np.abs(theta_P).max() > _VANISHED:
            return problem, rows, asked, theta_P


def make_problem(rng: np.random.Generator) -> tuple[Any, list[Any], list[Any]]:
    """Returns the problem, and the rows of its documents and queries."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from model.config import TransformerConfig
    from model.transformer import Transformer
    from trainers.influence import documents, responses
    from trainers.influence import sites as site_list
    from trainers.scoring.scoring import Row

    # Without rotation, whose angles are float32.
    config = TransformerConfig(
        vocab_size=SYMBOLS,
        num_layers=2,
        embed_dim=_WIDTH,
        num_heads=1,
        mlp_dim=_HIDDEN,
        dtype="float64",
        param_dtype="float64",
        layer_pattern=("full_nope",),
    )
    model = Transformer(config=config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.6), nn.meta.unbox(shapes)["params"]
    )
    table_VV = rng.dirichlet(np.full(SYMBOLS, 0.3), SYMBOLS)

    def text() -> list[int]:
        out = [int(rng.integers(SYMBOLS))]
        while len(out) < LENGTH:
            out.append(int(rng.choice(SYMBOLS, p=table_VV[out[-1]])))
        return out

    rows = [Row(context=[0], targets=text()) for _ in range(DOCUMENTS)]
    asked = [
        Row(context=[0, *one[:4]], targets=one[4:]) for one in (text() for _ in range(QUERIES))
    ]
    batches: list[Any] = [documents.columns(x, range(len(x)), len(x), 16) for x in (rows, asked)]
    problem = responses.Problem(
        model=model,
        params=params,
        sites=site_list.select(model, params),
        documents=batches[0],
        queries=batches[1],
        damping=DAMPING,
    )
    return problem, rows, asked


def all_scores(
    problem: Any,
    theta_P: Any,
    curvature_PP: np.ndarray,
    hessian_PP: np.ndarray,
    rows: Any,
    asked: Any,
    folder: Path,
) -> Mapping[str, np.ndarray]:
    """Returns method -> scores [N, Q] at the optimum, by the dense matrices and by the factors that are fitted in `folder`."""
    from trainers.influence import conjugate, kronecker, queries, scores
    from trainers.influence import fit as stages

    params = problem.with_weights(theta_P)
    reader = stages.Reader(model=problem.model, params=params, batch_size=32)
    settings = stages.FitSettings(factor_dtype="float64")
    stages.fit(reader, folder, lambda: list(rows) * LABELS, settings)
    damping = kronecker.Damping(problem.damping, "absolute")
    product = conjugate.gauss_newton(problem.model, problem.sites)
    ekfac = stages.read_curvature(folder, problem.sites, "ekfac", damping)

    def refine(q: Any) -> tuple[Any, Any]:
        solution = conjugate.solve(
            lambda v: product(params, problem.documents, v), ekfac, q, steps=CG_STEPS
        )
        return solution.x, solution.note

    kfac = stages.read_curvature(folder, problem.sites, "kfac", damping)
    ways = {"ekfac_cg": (None, refine), "ekfac": (ekfac, None), "kfac": (kfac, None)}
    ways["identity"] = (None, None)
    out = {
        "hessian": problem.exact_scores(hessian_PP, theta_P),
        "gauss_newton": problem.exact_scores(curvature_PP, theta_P),
    }
    for name, (precondition, refined) in ways.items():
        prepared = queries.prepare(
            *(reader, problem.sites, asked, precondition),
            rank=None,
            dtype="float64",
            refine=refined,
        )
        scored = scores.score(reader, problem.sites, prepared, rows, dtype="float64")
        out[name] = np.array([one.scores for one in scored])
    return out
