"""EK-FAC + CG: conjugate gradients on Gauss-Newton products, preconditioned by EK-FAC, and started from its solution.

Solves (G_B + D) x = q for the gradient q of one query. G_B is the Gauss-Newton matrix of a fixed set of documents, a mean over
documents of token-summed curvature, and D the damping of each matrix, the same numbers as EK-FAC's. Neither G_B nor any factor
is formed beyond EK-FAC's. Other documents have no curvature in G_B: a query that one of them decides is nearer to the solution
by all documents in EK-FAC's own scores than in those of a small set.

Shapes: B documents, T length, V vocabulary; matrices [L, E, X, Y] by site.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.kernels.platform import use_reference_forms
from espalier.model.kernels.vocab_logits import LogitForm
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import spread
from espalier.trainers.influence.kronecker import Curvature, Precision
from espalier.trainers.influence.sites import Site
from espalier.trainers.objectives.base import Batch
from espalier.trainers.objectives.forward import decoder_arguments

Matrices = Mapping[str, jax.Array]


def with_changed(params: Any, changed: Mapping[str, jax.Array]) -> Any:
    """Returns the parameters with other values at some paths."""
    return state_tree.nest({**state_tree.flatten(params), **changed})


def tangents(sites: Mapping[str, Site], matrices: Matrices, params: Any) -> dict[str, jax.Array]:
    """Returns changes of matrices as changes of parameters by path, in the parameters' dtypes."""
    flat = state_tree.flatten(params)
    own: dict[str, jax.Array] = {}
    for path, site in sites.items():
        own |= site.tangents(matrices[path])
    return {path: change.astype(flat[path].dtype) for path, change in own.items()}


def logits_of(model: Any, params: Any, batch: Batch) -> jax.Array:
    """Returns logits [B, T, V], float32 or wider."""
    args, keywords = decoder_arguments(batch, False)
    hidden_BTD = model.apply({"params": params}, *args, **keywords, method="hidden").hidden_BTD
    head_VD = model.apply({"params": params}, method="head_VD").astype(hidden_BTD.dtype)
    form = LogitForm(float(model.logit_scale), model.logit_softcap)
    B, T, D = hidden_BTD.shape
    return form.logits(hidden_BTD.reshape(B * T, D), head_VD).reshape(B, T, -1)


def gauss_newton(
    model: Any, sites: Mapping[str, Site], precision: Precision = "highest"
) -> Callable[..., dict[str, jax.Array]]:
    """Returns the compiled product (params, batch, matrices) -> G_B matrices.

    Logits change by `jvp`, then the softmax's curvature diag(p) - p p^T, then `vjp`; positions without a loss weight add
    nothing. Kernels take their plain forms, which have forward derivatives. `precision` is that of all products.
    """

    def product(params: Any, batch: Batch, matrices: Matrices) -> dict[str, jax.Array]:
        flat = state_tree.flatten(params)
        change = tangents(sites, matrices, params)
        own = {path: flat[path] for path in change}

        def logits(own: Any) -> jax.Array:
            return logits_of(model, with_changed(params, own), batch)

        z_BTV, u_BTV = jax.jvp(logits, (own,), (change,))
        p_BTV = jax.nn.softmax(z_BTV)
        curved = p_BTV * (u_BTV - (p_BTV * u_BTV).sum(-1, keepdims=True))
        weights_BT1 = batch["decoder_loss_weights"][..., None].astype(curved.dtype)
        documents = (batch["decoder_loss_weights"].sum(-1) > 0).sum()
        _, pull = jax.vjp(logits, own)
        (grads,) = pull(curved * weights_BT1 / jnp.maximum(documents, 1).astype(curved.dtype))
        return {
            path: site.matrix(grads).astype(matrices[path].dtype) for path, site in sites.items()
        }

    compiled = jax.jit(product)

    def call(params: Any, batch: Batch, matrices: Matrices) -> dict[str, jax.Array]:
        with use_reference_forms(), jax.default_matmul_precision(precision):
            return compiled(params, batch, matrices)

    return call


def over(
    product: Callable[..., Matrices], params: Any, batches: Sequence[tuple[int, Batch]]
) -> Callable[[Matrices], Matrices]:
    """Returns the product by the Gauss-Newton matrix of all documents of several batches.

    Args:
      product: of `gauss_newton`.
      params: parameters of the model.
      batches: each with its number of documents.
    """
    total = sum(count for count, _ in batches)

    def call(matrices: Matrices) -> Matrices:
        result: dict[str, jax.Array] = {}
        for count, batch in batches:
            for path, own in product(params, batch, matrices).items():
                share = own * jnp.asarray(count / total, own.dtype)
                result[path] = result[path] + share if path in result else share
        return result

    return call


def dot(x: Matrices, y: Matrices) -> float:
    """Returns the inner product over all sites: products and sums are in float64, also where JAX_ENABLE_X64 is off."""
    with jax.enable_x64(True):
        parts = spread.on_host([_sum_of_products(x[path], y[path]) for path in x])
    return math.fsum(parts)


@jax.jit
def _sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x.astype(jnp.float64) * y.astype(jnp.float64)).sum()


@dataclasses.dataclass(frozen=True)
class Solution:
    """A refined query.

    Attributes:
      x: approximate solution by site.
      objectives: x^T A x / 2 - q^T x at the start and after each step, which falls.
      residuals: norm of q - A x, relative to q's, at the same times, by the recursion. Products with bfloat16 parameters are
        rounded to bfloat16, and then the true norms are larger after many steps: see docs/use/influence_settings.md.
      stopped: 'steps', 'converged', or 'curvature' if a direction had none.
    """

    x: dict[str, jax.Array]
    objectives: list[float]
    residuals: list[float]
    stopped: str

    @property
    def note(self) -> dict[str, Any]:
        return {
            "objectives": self.objectives,
            "residuals": self.residuals,
            "stopped": self.stopped,
        }


def solve(
    product: Callable[[Matrices], Matrices],
    curvature: Curvature,
    q: Matrices,
    *,
    steps: int,
    tolerance: float = 1e-10,
) -> Solution:
    """Returns the solution of (G_B + D) x = q after at most `steps` steps; 0 steps are EK-FAC itself.

    Args:
      product: multiplies by G_B.
      curvature: EK-FAC's damped inverse, and D.
      q: gradient of a query.
      steps: maximum number of steps.
      tolerance: relative residual at which the loop ends.
    """

    def damped(v: Matrices) -> dict[str, jax.Array]:
        curved = product(v)
        return {
            p: curved[p] + jnp.asarray(curvature.damping[p]).astype(v[p].dtype) * v[p] for p in v
        }

    def precondition(v: Matrices) -> dict[str, jax.Array]:
        return curvature(v, batched=False)

    def moved(x: Matrices, size: float, along: Matrices) -> dict[str, jax.Array]:
        return {p: x[p] + jnp.asarray(size, x[p].dtype) * along[p] for p in x}

    x = precondition(q)
    if steps == 0:
        return Solution(x, [], [], "steps")
    r = moved(q, -1.0, damped(x))
    scale = max(np.sqrt(dot(q, q)), 1e-300)

    def objective() -> float:
        return -(dot(q, x) + dot(r, x)) / 2

    objectives, residuals = [objective()], [np.sqrt(dot(r, r)) / scale]
    z = precondition(r)
    along, power, stopped = z, dot(r, z), "steps"
    for _ in range(steps):
        if residuals[-1] <= tolerance:
            stopped = "converged"
            break
        curved = damped(along)
        curving = dot(along, curved)
        if curving <= 0:
            stopped = "curvature"
            break
        x = moved(x, power / curving, along)
        r = moved(r, -power / curving, curved)
        objectives.append(objective())
        residuals.append(float(np.sqrt(dot(r, r)) / scale))
        z = precondition(r)
        before, power = power, dot(r, z)
        along = moved(z, power / before, along)
    return Solution(dict(x), objectives, [float(x) for x in residuals], stopped)
