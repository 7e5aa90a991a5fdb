"""How well approximations of influence predict retraining where every optimum can be found: a tiny language model in float64.

Only the MLPs of the model are trained, to convergence, on texts of a random table of successors. Its scores by the exact
Hessian, the dense Gauss-Newton matrix, EK-FAC with and without conjugate gradients, K-FAC and the dot product are compared
with three kinds of retraining from its optimum: the proximal Bregman response to each document, training without
each document, and training on random halves.

Curvature is dense here, so that approximations can be told apart (Grosse et al., arXiv 2308.03296): the proximal Bregman response
(PBRF) is what Gauss-Newton influence estimates, leave-one-out retraining what the Hessian's does, and both differ from EK-FAC by its
blocks.

Shapes: P tapped weights, N documents, Q queries, S subsets, T tokens, V vocabulary; G the Gauss-Newton matrix [P, P].
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tqdm.auto import tqdm

from espalier.model.kernels.platform import use_reference_forms
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence.conjugate import logits_of, with_changed
from espalier.trainers.influence.sites import Site
from espalier.trainers.objectives.base import Batch

# Of the gradient, in the coordinates in which the curvature is the identity.
TOLERANCE = 1e-6
_POLISHED = 1e-11
_SMALLER = 0.9  # share of the gradient that a step may leave
_MAX_STEPS, _MAX_POLISHING = 5000, 500


class NoOptimumError(ValueError):
    """An optimisation that did not converge: its result would not be a response."""


class _Objective(NamedTuple):
    """Compiled functions of (theta [P], further arguments).

    Attributes:
      value_and_grad: returns the objective and its gradient [P].
      hessian: returns its Hessian [P, P].
    """

    value_and_grad: Callable[..., Any]
    hessian: Callable[..., jax.Array]

    @classmethod
    def of(cls, function: Callable[..., jax.Array]) -> "_Objective":
        return cls(jax.jit(jax.value_and_grad(function)), jax.jit(jax.hessian(function)))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model whose tapped weights are trained, on documents and queries of one batch each; all else is fixed.

    Attributes:
      model, params: a language model, and its parameters in float64.
      sites: the tapped sites by path.
      documents, queries: batches, one text in each row.
      damping: lambda, the weight of |theta|^2 / 2 in the objective, and what is added to every curvature.
    """

    model: Any
    params: Any
    sites: Mapping[str, Site]
    documents: Batch
    queries: Batch
    damping: float

    @functools.cached_property
    def _ravelled(self) -> tuple[jax.Array, Callable[[jax.Array], dict[str, jax.Array]]]:
        flat = state_tree.flatten(self.params)
        zeros = {path: jnp.zeros((*s.lead, s.inputs, s.outputs)) for path, s in self.sites.items()}
        names = {name for p, site in self.sites.items() for name in site.tangents(zeros[p])}
        return ravel_pytree({name: flat[name] for name in sorted(names)})

    @property
    def start_P(self) -> jax.Array:
        """The tapped weights of `params`."""
        return self._ravelled[0]

    def with_weights(self, theta_P: jax.Array) -> Any:
        """Returns all parameters with other tapped weights."""
        return with_changed(self.params, self._ravelled[1](theta_P))

    def _logits(self, theta_P: jax.Array, batch: Batch) -> jax.Array:
        with use_reference_forms():  # which have forward derivatives
            return logits_of(self.model, self.with_weights(theta_P), batch)

    def _losses(self, theta_P: jax.Array, batch: Batch) -> jax.Array:
        """Returns summed losses by row."""
        log_probs_BTV = jax.nn.log_softmax(self._logits(theta_P, batch))
        picked = jnp.take_along_axis(
            log_probs_BTV, batch["decoder_target_tokens"][..., None], axis=-1
        )
        return -(picked[..., 0] * batch["decoder_loss_weights"]).sum(-1)

    @functools.cached_property
    def document_losses(self) -> Callable[[jax.Array], jax.Array]:
        """The compiled function theta [P] -> losses [N] of the documents."""
        return jax.jit(lambda theta_P: self._losses(theta_P, self.documents))

    @functools.cached_property
    def query_losses(self) -> Callable[[jax.Array], jax.Array]:
        """The compiled function theta [P] -> losses [Q] of the queries."""
        return jax.jit(lambda theta_P: self._losses(theta_P, self.queries))

    def gradients(self, theta_P: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Returns the gradients of the queries [Q, P] and of the documents [N, P]."""
        both = (jax.jacrev(self.query_losses)(theta_P), jax.jacrev(self.document_losses)(theta_P))
        return np.asarray(both[0], np.float64), np.asarray(both[1], np.float64)

    def gauss_newton(self, theta_P: jax.Array) -> np.ndarray:
        """Returns G [P, P]: the mean over documents of J^T (diag(p) - p p^T) J, summed over tokens with a loss weight."""
        weights_NT1 = self.documents["decoder_loss_weights"][..., None].astype(theta_P.dtype)

        def logits(theta_P: jax.Array) -> jax.Array:
            return self._logits(theta_P, self.documents)

        p_NTV = jax.nn.softmax(logits(theta_P))
        j_NTVP = jax.jit(jax.jacfwd(logits))(theta_P)
        centred = j_NTVP - jnp.einsum("ntv,ntvp->ntp", p_NTV, j_NTVP)[:, :, None]
        scaled = jnp.sqrt(p_NTV * weights_NT1)[..., None] * centred
        flat = scaled.reshape(-1, scaled.shape[-1])
        return np.asarray(flat.T @ flat / len(p_NTV), np.float64)

    def hessian(self, theta_P: jax.Array) -> np.ndarray:
        """Returns the Hessian [P, P] of the mean loss of the documents."""
        mean = jax.jit(jax.hessian(lambda theta: self._losses(theta, self.documents).mean()))
        return np.asarray(mean(theta_P), np.float64)

    def exact_scores(self, curvature_PP: np.ndarray, theta_P: jax.Array) -> np.ndarray:
        """Returns scores [N, Q]: gradients of documents times (curvature + lambda)^-1 times gradients of queries."""
        queries_QP, documents_NP = self.gradients(theta_P)
        damped = curvature_PP + self.damping * np.eye(len(curvature_PP))
        return documents_NP @ np.linalg.solve(damped, queries_QP.T)

    def trained(
        self,
        start_P: jax.Array,
        weights_N: np.ndarray | None = None,
        curvature_PP: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns the weights [P] that minimise the weighted mean loss of the documents + lambda |theta|^2 / 2, from a start.

        Args:
          start_P: where the optimisation starts.
          weights_N: weight of each document; 1 by default. The sum is divided by N.
          curvature_PP: G or the Hessian near the optimum, which scales the steps; by default, G where a first optimisation ends.

        Raises:
          NoOptimumError: the gradient did not vanish.
        """
        weights = jnp.ones(self._count) if weights_N is None else jnp.asarray(weights_N)
        if curvature_PP is None:
            flat = np.zeros((len(start_P),) * 2)
            near_P, _ = self._search(self._objective, start_P, (weights,), flat)
            start_P = jnp.asarray(near_P)
            curvature_PP = self.gauss_newton(start_P)
        return self._minimum(self._objective, start_P, (weights,), curvature_PP)

    @functools.cached_property
    def _objective(self) -> _Objective:
        def objective(theta_P: jax.Array, weights_N: jax.Array) -> jax.Array:
            loss = (weights_N * self._losses(theta_P, self.documents)).sum() / self._count
            return loss + self.damping * jnp.square(theta_P).sum() / 2

        return _Objective.of(objective)

    @property
    def _count(self) -> int:
        return len(self.documents["decoder_target_tokens"])

    def bregman_response(
        self, theta_P: jax.Array, document: int, epsilon: float, curvature_PP: np.ndarray
    ) -> np.ndarray:
        """Returns the weights [P] of the proximal Bregman response to one document (Grosse et al., equation 10).

        They minimise the mean over documents of KL(p at theta || p), summed over tokens, + epsilon times the document's
        loss + lambda |change|^2 / 2.

        Raises:
          NoOptimumError: the gradient did not vanish.
        """
        chosen = np.zeros(self._count)
        chosen[document] = epsilon
        arguments = (jnp.asarray(chosen), jnp.asarray(theta_P))
        return self._minimum(self._bregman, theta_P, arguments, curvature_PP)

    @functools.cached_property
    def _bregman(self) -> _Objective:
        weights_NT = self.documents["decoder_loss_weights"]

        def objective(theta_P: jax.Array, weights_N: jax.Array, before_P: jax.Array) -> jax.Array:
            before, after = (
                jax.nn.log_softmax(self._logits(theta, self.documents))
                for theta in (before_P, theta_P)
            )
            kl_NT = (jnp.exp(before) * (before - after)).sum(-1)
            near = self.damping * jnp.square(theta_P - before_P).sum() / 2
            own = (weights_N * self._losses(theta_P, self.documents)).sum()
            return (kl_NT * weights_NT).sum() / self._count + own + near

        return _Objective.of(objective)

    def _minimum(
        self,
        objective: _Objective,
        start_P: Any,
        arguments: tuple[Any, ...],
        curvature_PP: np.ndarray,
    ) -> np.ndarray:
        theta_P, left = self._search(objective, start_P, arguments, curvature_PP)
        if left > TOLERANCE:
            raise NoOptimumError(
                f"The gradient is still {left:.1e} at the end of the optimisation: use a larger damping, or fewer weights."
            )
        return theta_P

    def _search(
        self,
        objective: _Objective,
        start_P: Any,
        arguments: tuple[Any, ...],
        curvature_PP: np.ndarray,
    ) -> tuple[np.ndarray, float]:
        """Returns where L-BFGS and then steps by a curvature end, and the gradient's largest entry there.

        L-BFGS takes coordinates in which curvature + lambda is the identity, in which the gradient is returned too. Near the
        optimum the loss is too coarse for its line searches: steps by the inverse of curvature + lambda go on while the
        gradient gets smaller, and where it does not, by that of the objective's own Hessian, which takes some 400 gradients' time.
        """
        from scipy import linalg, optimize

        start_P = np.asarray(start_P, np.float64)
        root_PP = np.linalg.cholesky(curvature_PP + self.damping * np.eye(len(start_P)))

        def moved(z_P: np.ndarray) -> np.ndarray:
            return start_P + linalg.solve_triangular(root_PP, z_P, lower=True, trans=1)

        def scaled(grad_P: Any) -> np.ndarray:
            return linalg.solve_triangular(root_PP, np.asarray(grad_P, np.float64), lower=True)

        def value(z_P: np.ndarray) -> tuple[float, np.ndarray]:
            loss, grad_P = objective.value_and_grad(moved(z_P), *arguments)
            return float(loss), scaled(grad_P)

        options = {"maxiter": _MAX_STEPS, "maxfun": 2 * _MAX_STEPS, "ftol": 0, "gtol": TOLERANCE}
        result = optimize.minimize(
            value, np.zeros_like(start_P), jac=True, method="L-BFGS-B", options=options
        )
        theta_P = moved(result.x)
        grad_P = np.asarray(objective.value_and_grad(theta_P, *arguments)[1], np.float64)
        steps_PP, own = root_PP @ root_PP.T, False
        for _ in range(_MAX_POLISHING):
            if np.abs(scaled(grad_P)).max() < _POLISHED:
                break
            next_P = theta_P - np.linalg.solve(steps_PP, grad_P)
            next_grad_P = np.asarray(objective.value_and_grad(next_P, *arguments)[1], np.float64)
            if np.linalg.norm(scaled(next_grad_P)) < _SMALLER * np.linalg.norm(scaled(grad_P)):
                theta_P, grad_P, own = next_P, next_grad_P, False
            elif own:
                break
            else:
                steps_PP, own = np.asarray(objective.hessian(theta_P, *arguments)), True
        return theta_P, float(np.abs(scaled(grad_P)).max())


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
    with jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
        return _run(seed, Path(folder))


def _run(seed: int, folder: Path) -> dict[str, Any]:
    from espalier.trainers.influence import measures

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

    from espalier.model.config import TransformerConfig
    from espalier.model.transformer import Transformer
    from espalier.trainers.influence import documents
    from espalier.trainers.influence import sites as site_list
    from espalier.trainers.scoring.scoring import Row

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
    problem = Problem(
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
    from espalier.trainers.influence import conjugate, kronecker, queries, scores
    from espalier.trainers.influence import fit as stages

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
