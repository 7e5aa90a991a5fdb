"""A router that uses embeddings of its experts' training data (Nexus, arXiv 2408.15901, section 3.2), and its first parameters.

The logit of an expert is the dot product of a token's state and the expert's vector. This vector is a learned
projection of an embedding d_i of the expert's training data:

  e_i = W2 (silu(W1a d_i) * (W1b d_i)),  logit_i = x . e_i

The embeddings are data, not parameters. An expert that is added later has its own embedding, and the projection that
was trained on other domains gives its vector.

A softmax sees differences of logits only, so that the projection learns nothing about the level of an expert it has not
seen: in one layer such an expert may get no token and in another one half of them, whatever the domain. Subtracting one
vector from all e_i, such as the mean of the first ones, changes no difference and hence no gate. `levelled` places
vectors of later experts where the first ones have learned to be, which stay as they are.

The last kernel of a router with a gated hidden layer is drawn with the standard deviation that gives the first logits the
standard deviation `logit_std`.

Shapes: E experts, D width, M width of an embedding of a domain, F hidden width, '...' any leading.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import NonNegative, Size, recordable
from espalier.model import axes
from espalier.model.flops import Counted
from espalier.model.kernels import matmul
from espalier.model.linear import Dense, Pointwise, fan_in_normal
from espalier.model.transforms.base import TransformError


class GatedRouter(Counted):
    """A router with a gated hidden layer, a `router` factory of MoeMlp and MixtureOfAttention.

    Attributes:
      features: E.
      axes: logical axes of a linear router's kernel [D, E].
      domain_dim: M.
      logit_std: standard deviation of the first logits, for states of unit variance.
      dense: factory of the three projections, called with (features=, axes=, kernel_init=, ...).
    """

    features: int
    axes: tuple[str, str]
    domain_dim: Size = 1024
    logit_std: NonNegative = 0.1
    dense: Pointwise = Dense
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32


@recordable
class DomainRouter(GatedRouter):
    """A router by the embeddings of its experts' data; it ignores `axes`.

    Attributes:
      levelled: number of first experts to which the vectors of all later ones are levelled, see `level`; None for none.

    `domains` [E, M] is stored among the parameters but is not trained (axes.constant). `espalier upcycle` writes
    embeddings of the experts' data to it; otherwise it has random directions.

    Its logits serve a softmax and sigmoids (MoeMlp.score). Sigmoids also learn the level of a vector, which differences do
    not show, and an expert that is added later leaves the others' weights as they are.
    """

    of_data: ClassVar[bool] = True  # equal data, as of the parts of one expert, have equal logits
    linear: ClassVar[bool] = True  # in the state: model/hf/folded_routers.py makes it a kernel

    levelled: Size | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits [..., E] of states [..., D]."""
        shape = (self.features, self.domain_dim)
        domains_EM = axes.constant(self, "domains", random_directions, shape, jnp.float32)
        width = x.shape[-1]
        project = functools.partial(
            self.dense,
            features=width,
            axes=(axes.UNMODELED, axes.EMBED),  # split: a replicated copy would take gigabytes
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        gate_ED = project(kernel_init=fan_in_normal, name="gate")(domains_EM)
        up_ED = project(kernel_init=fan_in_normal, name="up")(domains_EM)
        down_init = nn.initializers.normal(down_std(self.domain_dim, width, self.logit_std))
        experts_ED = project(kernel_init=down_init, name="down")(jax.nn.silu(gate_ED) * up_ED)
        if self.levelled is not None:
            experts_ED = level(experts_ED, self.levelled)
        return matmul.matmul(x.astype(self.dtype), experts_ED.T)

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Counts the product with the experts' vectors.

        The projection of the vectors is not counted: it is computed once per step for all tokens.
        """
        return 2.0 * self.features * shapes["down"]["kernel"].shape[-1]


def level(experts_ED: jax.Array, first: int) -> jax.Array:
    """Returns experts' vectors; the vectors after the `first` ones are levelled to them, and the first ones do not change.

    With m the mean of the first vectors, a later one becomes m + r u: u is the direction of its difference from m,
    projected to the span of the first ones' differences from m, and r the mean length of these. Its logit is then an
    affine combination of the first ones' logits, so that it is on their level in every layer, and as far from their mean
    as they are. m, r and the span are constants of the gradient.

    Raises:
      ValueError: fewer than 3 first vectors: two span a line, on which a later one would be one of the two.
    """
    if first < 3:
        raise ValueError(
            f"levelled = {first}: an expert levelled to fewer than 3 has the logits of one of them."
        )
    first_ND, later_ED = experts_ED[:first], experts_ED[first:].astype(jnp.float32)
    fixed_ND = jax.lax.stop_gradient(first_ND).astype(jnp.float32)
    mean_1D = fixed_ND.mean(0, keepdims=True)
    apart_ND = fixed_ND - mean_1D
    # The differences sum to 0: the cut-off leaves out that direction.
    projection_DD = jnp.linalg.pinv(apart_ND, rtol=1e-4) @ apart_ND
    inside_ED = (later_ED - mean_1D) @ projection_DD
    length = jnp.linalg.norm(apart_ND, axis=-1).mean()
    lengths_E1 = jnp.linalg.norm(inside_ED, axis=-1, keepdims=True)
    placed_ED = mean_1D + length * inside_ED / jnp.maximum(lengths_E1, 1e-12)
    return jnp.concatenate([first_ND, placed_ED.astype(experts_ED.dtype)])


def random_directions(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Returns vectors [..., M] of length 1, uniform over directions."""
    drawn = jax.random.normal(key, shape, dtype)
    return drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)


def expert_vectors(router: dict, domains_EM: np.ndarray) -> np.ndarray:
    """Returns the expert vectors e_i [E, D], not levelled, float64, from a router's parameters {gate, up, down: {kernel}}."""
    gate, up, down = (np.asarray(router[x]["kernel"], np.float64) for x in ("gate", "up", "down"))
    domains_EM = np.asarray(domains_EM, np.float64)
    inner = domains_EM @ gate
    return (inner / (1 + np.exp(-inner)) * (domains_EM @ up)) @ down


def down_std(domain_dim: int, width: int, logit_std: float, length: float = 1.0) -> float:
    """Returns the standard deviation of a DomainRouter's `down` [D, D] that gives logits with `logit_std`.

    States are assumed to have unit variance. For an embedding of length l, `gate` and `up` with variance 1/M give
    Gaussians a and b of variance l^2/M. With h = silu(a) b, |e|^2 = D^2 std^2 E[h^2], and a logit's variance is |e|^2.
    """
    power = _silu_power(length / np.sqrt(domain_dim)) * length**2 / domain_dim
    return float(logit_std / (width * np.sqrt(power)))


def token_down_std(hidden: int, logit_std: float) -> float:
    """Returns the standard deviation of an MlpRouter's `down` [F, E] that gives logits with `logit_std`.

    `gate` and `up` are assumed to give Gaussians of variance 1.
    """
    return float(logit_std / np.sqrt(hidden * _silu_power(1.0)))


def _silu_power(std: float) -> float:
    """Returns E[silu(a)^2] for a Gaussian a with this standard deviation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    gate = std * nodes
    return float(np.sum(weights * (gate / (1 + np.exp(-gate))) ** 2) / np.sum(weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpRouters:
    """Routers that are an MLP of the token.

    Attributes:
      logit_std: standard deviation of the first logits.
    """

    logit_std: float = 0.1

    def axis(self, name: str) -> int | None:
        return -1 if name == "down/kernel" else None

    def initial(self, name: str, path: str, shape: tuple[int, ...]) -> float | np.ndarray | None:
        if name in ("gate/kernel", "up/kernel"):
            return 1 / math.sqrt(shape[-2])
        return self._down_std(shape) if name == "down/kernel" else None

    def of_last(self) -> "MlpRouters":
        return self

    def _down_std(self, shape: tuple[int, ...]) -> float:
        return token_down_std(shape[-2], self.logit_std)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProjectionRouters(MlpRouters):
    """Routers that project embeddings of the experts' data.

    Attributes:
      domains: the embeddings [E, M].
    """

    domains: np.ndarray

    def axis(self, name: str) -> int | None:
        return -2 if name == "domains" else None

    def initial(self, name: str, path: str, shape: tuple[int, ...]) -> float | np.ndarray | None:
        if name != "domains":
            return super().initial(name, path, shape)
        if self.domains.shape != shape[-2:]:
            raise TransformError(
                f"{path} of the mixture is {list(shape)}, and embeddings are {list(self.domains.shape)}: "
                "set DomainRouter.domain_dim to their width."
            )
        return self.domains

    def of_last(self) -> "ProjectionRouters":
        return dataclasses.replace(self, domains=self.domains[-1:])

    def _down_std(self, shape: tuple[int, ...]) -> float:
        # Rounded: float32 vectors have length 1 only nearly.
        length = round(float(np.linalg.norm(self.domains, axis=-1).mean()), 3)
        return down_std(self.domains.shape[-1], shape[-1], self.logit_std, length)
