"""From a model and an optimiser to a sharded train state, without ever holding it on one device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.common import ranges, stages
from espalier.model import axes
from espalier.model.axes import Rules
from espalier.model.protocol import Same
from espalier.model.transforms import int8_weights
from espalier.trainers import trainable
from espalier.trainers.extensions import StepExtension
from espalier.trainers.inputs import Inputs, PackedTokens
from espalier.trainers.optim import rounding
from espalier.trainers.partitioning import mesh_spec, shards_of
from espalier.trainers.train_state import TrainState

# Collections of a single call: sown values and perturbations. The state stores all other collections.
TRANSIENT = ("counts", "intermediates", "losses", "metrics", "perturbations")

_TEXT = PackedTokens(8)


def variables(model: Any, key: jax.Array, inputs: Inputs = _TEXT) -> Any:
    """Returns new variables of a model that reads `inputs`, boxed with their logical axis names."""
    return model.init(key, *inputs.init_arguments())


def widened(variables: Any) -> Any:
    """Returns a model's variables with parameters in float32 that are narrower."""
    return {**variables, "params": jax.tree.map(rounding.wide, variables["params"])}


def abstract_variables(model: Any, inputs: Inputs = _TEXT) -> Any:
    """Returns shapes and dtypes of `variables`; allocates nothing."""
    found = _abstract_variables(Same(model), jax.eval_shape(inputs.init_arguments))
    return jax.tree.map(lambda leaf: leaf, found)  # callers may change theirs


# The start of a run or of a command asks several times, and tracing a deep model takes seconds.
@functools.lru_cache(maxsize=4)
def _abstract_variables(model: Same, arguments: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    def init(*arguments: Any) -> Any:
        return model.value.init(jax.random.key(0), *arguments)

    with stages.stage("tracing the model"):
        return jax.eval_shape(init, *arguments)


def abstract_params(
    model: Any, mesh: Mesh, rules: Rules, *, weights_dtype: Literal["int8"] | None = None
) -> Any:
    """Returns shapes, dtypes and shardings of a model's parameters, with int8 kernels by request; allocates nothing.

    Raises:
      ValueError: another dtype of weights.
    """
    ranges.check_choice("weights_dtype", weights_dtype, (None, "int8"))
    boxed = abstract_variables(model)["params"]
    if weights_dtype is not None:
        boxed = int8_weights.declared(boxed)
    return with_shardings(shapes_of(boxed), param_shardings(boxed, mesh, rules))


def shapes_of(boxed: Any) -> Any:
    """Returns the shapes and dtypes of boxed abstract parameters."""
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=axes.is_boxed)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Returns shapes and dtypes with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Returns NamedShardings of boxed abstract parameters, as a plain tree.

    A rank that the devices do not divide is not split: layers have many ranks, and few are round numbers.
    """

    def sharding(box: Any) -> NamedSharding:
        spec = list(mesh_spec(box.names, rules))
        for axis, (name, size) in enumerate(zip(box.names, box.value.shape, strict=True)):
            if name == axes.RANK and size % shards_of(mesh, spec[axis]):
                spec[axis] = None
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, boxed, is_leaf=axes.is_boxed)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StateMaker:
    """Makes the states of a run.

    Attributes:
      optimizer: over the trainable parameters only.
      mask: tree of bools over the parameters, True where trained; None trains everything.
      extensions: what else a state holds.
    """

    optimizer: optax.GradientTransformation
    mask: Any = None
    extensions: Sequence[StepExtension] = ()

    def __call__(self, boxed: Any) -> TrainState:
        """Returns the state of step 0 with these boxed variables; jit it with `out_shardings` to create it sharded."""
        collections = jax.tree.map(axes.unboxed, boxed, is_leaf=axes.is_boxed)
        params = collections["params"]
        lasting = {k: v for k, v in collections.items() if k not in ("params", *TRANSIENT)}
        parts = {each.name: each.init(params, self.mask) for each in self.extensions}
        parts = {name: part for name, part in parts.items() if part is not None}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self._opt_state(params),
            variables=lasting,
        ).with_parts(parts)

    def _opt_state(self, params: Any) -> Any:
        return self.optimizer.init(trainable.split(params, self.mask)[0])

    def restart(
        self, abstract: TrainState, shardings: Any
    ) -> Callable[[TrainState], TrainState] | None:
        """Returns a function that consumes a state and returns it with a fresh optimiser for its parameters.

        Returns None where the optimiser's first state has zeros and counts alone, as moments do: it fits any parameters.
        Schedule-free methods begin with a copy of the parameters.
        """
        jaxpr = jax.make_jaxpr(self._opt_state)(abstract.params).jaxpr
        inputs = [variable for equation in jaxpr.eqns for variable in equation.invars]
        read = {id(variable) for variable in (*inputs, *jaxpr.outvars)}
        if not any(id(variable) in read for variable in jaxpr.invars):
            return None
        return jax.jit(
            lambda state: state.replace(opt_state=self._opt_state(state.params)),
            donate_argnums=0,
            out_shardings=shardings,
        )

    def shardings(self, abstract: TrainState, shardings: Any, mesh: Mesh) -> Any:
        """Returns shardings of a whole state.

        Moments and what extensions have of parameters follow their parameter; all else is replicated.

        Args:
          abstract: the state's shapes (`jax.eval_shape` of this maker).
          shardings: of the parameters.
        """
        replicated = NamedSharding(mesh, PartitionSpec())
        trained, _ = trainable.split(abstract.params, self.mask)
        trained_shardings, _ = trainable.split(shardings, self.mask)

        def masked(node):
            return isinstance(node, optax.MaskedNode)

        def like_parameter(moment, param, sharding):
            if masked(moment):  # a parameter that another part of the optimiser takes care of
                return moment
            # Adafactor's row and column statistics are small vectors of another shape.
            return sharding if moment.shape == param.shape else replicated

        opt_state = optax.tree.map_params(
            self.optimizer,
            like_parameter,
            abstract.opt_state,
            trained,
            trained_shardings,
            transform_non_params=lambda _: replicated,
            is_leaf=masked,
        )
        whole = jax.tree.map(lambda _: replicated, abstract.variables)
        parts = {each.name: shardings for each in self.extensions if each.like_params}
        tree: Any = TrainState  # of shardings, where a state holds arrays
        state = tree(step=replicated, params=shardings, opt_state=opt_state, variables=whole)
        return state.with_parts(parts)
