"""A recipe: everything that determines the compiled step, and the program it turns into on a mesh.

Training, evaluation and ahead-of-time compilation all start here, so what `precompile` measures is
what `train` runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainers import initialise, partitioning, trainable
from trainers.anomaly import Anomaly
from trainers.inputs import Inputs, PackedTokens
from trainers.objectives.base import Batch, LossFn, Objective
from trainers.objectives.lm import language_modelling
from trainers.optim import schedules
from trainers.optim.gradient_terms import GradientTerm, make_optimizer
from trainers.optim.schedules import Schedule
from trainers.partitioning import Rules
from trainers.reports import Report
from trainers.step import Metrics, make_eval_step, make_train_step
from trainers.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What gin binds of a run besides its data and its directory.

    Attributes:
      model: the linen module.
      batch_size: rows of a global batch.
      feature_lengths: tokens per row by feature, such as {"targets": 2048}; None with `inputs`.
      inputs: what a row is, if not packed tokens of `feature_lengths` (see trainers/inputs.py).
      optimizer: factory, called with (learning_rate=) and, if it has that parameter, (param_axes=).
      gradient_terms: added to the gradient of the loss (see trainers/optim/gradient_terms.py).
      learning_rate: a schedule over update steps, or a number for a constant one.
      objective: factory of the loss or `Objective`, called with (model=, num_sources=).
      trainable: path patterns of the parameters to train; empty for all (see trainers/trainable.py).
      reports: called with the parameters' shapes before anything is allocated; each returns lines to be
        shown at the start of a run, or raises ValueError for a model that is not as it was meant.
      microbatches: parts a batch is processed in, in evaluation too.
      gradient_dtype: dtype of gradients, taken of a copy of the parameters in it; None for their own.
      ema_decay: decay of averaged parameters kept beside the trained ones; None for none.
      anomaly: policy for non-finite and spiking losses; None applies every update.
      rules: name of a rule set in trainers/partitioning.py.
      mesh: mesh shape by axis name, e.g. {"fsdp": 8, "tensor": 2}; None puts all devices on data.
      seed: of initial parameters and of any randomness in steps.
    """

    model: Any
    batch_size: int
    optimizer: Callable[..., optax.GradientTransformation]
    learning_rate: Schedule
    feature_lengths: Mapping[str, int] | None = None
    inputs: Inputs | None = None
    objective: Callable[..., LossFn] = language_modelling
    gradient_terms: Sequence[GradientTerm] = ()
    trainable: Sequence[str] = ()
    reports: Sequence[Report] = ()
    microbatches: int = 1
    gradient_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    ema_decay: float | None = None
    anomaly: Anomaly | None = Anomaly()
    rules: str = "fsdp"
    mesh: Mapping[str, int] | None = None
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "learning_rate", schedules.as_schedule(self.learning_rate))
        if self.microbatches < 1 or self.batch_size % self.microbatches:
            raise ValueError(
                f"BATCH_SIZE = {self.batch_size} is not a multiple of the "
                f"{self.microbatches} microbatches."
            )
        if self.inputs is None and "targets" not in (self.feature_lengths or {}):
            raise ValueError(
                f"TASK_FEATURE_LENGTHS = {dict(self.feature_lengths or {})} lacks 'targets', for example "
                '{"targets": 512}.'
            )
        if self.inputs is not None and self.feature_lengths is not None:
            raise ValueError(
                "Recipe.inputs and Recipe.feature_lengths both say what a row is: bind one of them."
            )

    @property
    def reads(self) -> Inputs:
        """What a row is."""
        if self.inputs is not None:
            return self.inputs
        assert self.feature_lengths is not None  # see __post_init__
        return PackedTokens(self.feature_lengths["targets"])

    @property
    def length(self) -> int:
        """Units in a row: its tokens; 1 for an image."""
        return self.reads.length or 1

    def over(self, span: schedules.Span) -> "Recipe":
        """This recipe with its schedule made for a run's span, which only some schedules wait for."""
        return dataclasses.replace(self, learning_rate=schedules.span(self.learning_rate, span))

    def program(self, *, devices: Sequence[jax.Device] | None = None) -> "Program":
        """Resolves mesh, shardings and functions; validates, allocates and compiles nothing.

        Args:
          devices: devices to use, possibly of an absent topology; all present ones by default.

        Raises:
          ValueError: mesh, rules and sizes that do not fit together.
        """
        mesh = partitioning.make_mesh(shape=self.mesh, devices=devices)
        rules = partitioning.rules_named(self.rules)
        variables = initialise.abstract_variables(self.model, self.reads)
        boxed = variables["params"]
        partitioning.validate(
            mesh=mesh,
            rules=rules,
            config=self.model.config,
            batch_size=self.batch_size // self.microbatches,
            length=self.reads.length,
            boxed_params=boxed,
        )
        params = initialise.param_shardings(boxed, mesh, rules)
        mask = trainable.mask_of(self.trainable, boxed)
        shapes = jax.tree.map(lambda leaf: leaf.value, boxed, is_leaf=_is_boxed)
        reports = [line for report in self.reports for line in report(shapes)]
        optimizer = make_optimizer(
            self.optimizer,
            learning_rate=self.learning_rate,
            boxed_params=boxed,
            terms=self.gradient_terms,
        )
        make_state = functools.partial(
            initialise.make_state,
            optimizer=optimizer,
            mask=mask,
            ema=self.ema_decay is not None,
            anomaly=self.anomaly,
        )
        abstract = jax.eval_shape(make_state, variables)
        shardings = initialise.state_shardings(abstract, optimizer, params, mesh=mesh, mask=mask)

        def steps(num_sources: int) -> Steps:
            objective = Objective.of(self.objective(model=self.model, num_sources=num_sources))
            train_step = make_train_step(
                loss_fn=objective,
                optimizer=optimizer,
                seed=self.seed,
                mask=mask,
                microbatches=self.microbatches,
                gradient_dtype=self.gradient_dtype,
                ema_decay=self.ema_decay,
                anomaly=self.anomaly,
            )

            evaluate = make_eval_step(loss_fn=objective, microbatches=self.microbatches)
            # Metrics of any shape are read by every process.
            replicated = NamedSharding(mesh, PartitionSpec())
            train = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))
            given = _given_extras(objective, mesh, rules)
            return Steps(
                train=_with_extras(train, given),
                evaluate=_with_extras(jax.jit(evaluate, out_shardings=replicated), given),
            )

        return Program(
            mesh=mesh,
            rules=rules,
            boxed_params=boxed,
            reports=reports,
            mask=mask,
            abstract_state=jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                abstract,
                shardings,
            ),
            init=jax.jit(
                lambda: make_state(
                    initialise.variables(self.model, jax.random.key(self.seed), self.reads)
                ),
                out_shardings=shardings,
            ),
            steps=steps,
            batch_sharding=partitioning.batch_sharding(mesh, rules),
        )

    def abstract_batch(self, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch."""
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for name, array in self.reads.arrays(self.batch_size).items()
        }


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Compiled on first call, or ahead by `lower` and `trace` with the same arguments.

    Attributes:
      train: (state, batch) -> (state, metrics); consumes the state.
      evaluate: (params, batch, variables=None) -> metrics as (sum, weight); `variables` are those of
        a state, for a model that has some.
    """

    train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[..., Metrics]


class _Extras:
    """Extras of an objective: arrays at the first call, what they will be like before that."""

    def __init__(self, abstract: Any, read: Callable[[], Any]):
        self.abstract, self._read = abstract, read

    @functools.cached_property
    def arrays(self) -> Any:
        return self._read()


def _given_extras(objective: Objective, mesh: Mesh, rules: Rules) -> _Extras | None:
    if (stored := objective.stored_extras) is not None:
        return _Extras(stored.abstract(mesh, rules), lambda: stored.read(mesh, rules))
    if objective.extras is None:
        return None
    return _Extras(objective.extras, lambda: objective.extras)


@dataclasses.dataclass(frozen=True, eq=False)
class _WithExtras:
    """A jitted function with its keyword `extras` given, in the forms in which it is used."""

    jitted: Any
    extras: _Extras

    def __call__(self, *args: Any) -> Any:
        return self.jitted(*args, extras=self.extras.arrays)

    def lower(self, *args: Any) -> Any:
        return self.jitted.lower(*args, extras=self.extras.abstract)

    def trace(self, *args: Any) -> Any:
        return self.jitted.trace(*args, extras=self.extras.abstract)


def _with_extras(jitted: Any, extras: _Extras | None) -> Any:
    return jitted if extras is None else _WithExtras(jitted, extras)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A recipe on a mesh. Call its functions inside `partitioning.use_mesh(mesh, rules)`.

    Attributes:
      mesh: the resolved mesh.
      rules: logical to mesh axes.
      boxed_params: abstract parameters with their logical names.
      reports: lines that say how the model is meant.
      mask: tree of bools, True where trained; None when everything is.
      abstract_state: shapes, dtypes and shardings of the state.
      init: () -> state of step 0, created sharded.
      steps: number of data sources whose loss is reported separately -> the jitted functions.
      batch_sharding: sharding of every input array.
    """

    mesh: Mesh
    rules: Rules
    boxed_params: Any
    reports: Sequence[str]
    mask: Any
    abstract_state: TrainState
    init: Callable[[], TrainState]
    steps: Callable[[int], Steps]
    batch_sharding: NamedSharding

    def num_params(self, *, trained_only: bool = False) -> int:
        """Numbers that are learned or, with `trained_only`, that this run learns; data is neither."""
        params = self.abstract_state.params
        counted = trainable.mask_of((), self.boxed_params)
        if trained_only and self.mask is not None:
            counted = self.mask
        if counted is not None:
            params = trainable.split(params, counted)[0]
        return sum(leaf.size for leaf in jax.tree.leaves(params))
