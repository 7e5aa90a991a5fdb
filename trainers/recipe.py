"""The recipe of a run, which determines the compiled step, and the program it becomes on a mesh.

Training, evaluation and ahead-of-time compilation all start here, so that `precompile` measures the
program that `train` runs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.common.ranges import AxisSize, Decay, NonNegative, Seed, Size
from espalier.model import flops
from espalier.model.axes import Rules
from espalier.model.protocol import LanguageModel, Model
from espalier.trainers import host_memory, initialise, partitioning, trainable
from espalier.trainers.anomaly import Anomaly
from espalier.trainers.extensions import StepExtension
from espalier.trainers.inputs import Inputs, rows_of
from espalier.trainers.objectives import bound_extras
from espalier.trainers.objectives.base import Batch, LossFn, Metrics, Objective, StoredExtras
from espalier.trainers.objectives.lm import language_modelling
from espalier.trainers.optim import averages, schedules
from espalier.trainers.optim import rounding as rounding_lib
from espalier.trainers.optim.gradient_terms import GradientTerm, make_optimizer
from espalier.trainers.optim.schedules import Schedule
from espalier.trainers.reports import Report
from espalier.trainers.step import make_eval_step, make_train_step
from espalier.trainers.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model, the objective and how they are trained: all of a run but its data and its directory.

    Attributes:
      model: a linen module that answers model/protocol.py.
      batch_size: rows of a global batch.
      feature_lengths: tokens per row by feature, such as {"targets": 2048}, of an encoder-decoder also of its "inputs";
        None with `inputs`.
      inputs: the arrays of a batch, if not packed tokens of `feature_lengths` (see trainers/inputs.py).
      optimizer: factory, called with (learning_rate=) and, if it has that parameter, (param_axes=).
      gradient_terms: added to the gradient of the loss (see trainers/optim/gradient_terms.py).
      learning_rate: a schedule over update steps, or a number for a constant one.
      objective: factory of the loss or `Objective`, called with (model=, num_sources=).
      trainable: path patterns of the parameters to train; empty for all (see trainers/trainable.py).
      reports: called with the parameters' shapes before anything is allocated; each returns lines to print at the start
        of a run, or raises ValueError for a model it does not accept.
      microbatches: parts in which a batch is processed, in evaluation too.
      rounding: None stores a model whose trained parameters are narrower than float32 in float32. 'stochastic' and 'nearest'
        keep its dtype, see trainers/optim/rounding.py.
      gradient_dtype: dtype in which a copy of the parameters is differentiated; None for their own.
      ema_decay: decay of a moving average of the parameters, which is evaluated, saved for use beside the trained ones
        and exported; None for none.
      averaged: in its place, (optimiser's state, trained parameters) -> the parameters to evaluate and to release, of an
        optimiser that defines an average of its own, such as optax.contrib.schedule_free_eval_params; called every step.
      anomaly: policy for non-finite and spiking losses; None applies every update.
      moving_reference: moves the objective's reference to the policy; None for a fixed one.
      extensions: what else the state holds and a step does (see trainers/extensions.py).
      rules: name of a rule set in trainers/partitioning.py.
      mesh: mesh shape by axis name, e.g. {"fsdp": 8, "tensor": 2}; None puts all devices on data.
      seed: of initial parameters and of any randomness in steps.
    """

    model: Model
    batch_size: Size
    optimizer: Callable[..., optax.GradientTransformation]
    learning_rate: Schedule | NonNegative
    feature_lengths: Mapping[str, Size] | None = None
    inputs: Inputs | None = None
    objective: Callable[..., LossFn] = language_modelling
    gradient_terms: Sequence[GradientTerm] = ()
    trainable: Sequence[str] = ()
    reports: Sequence[Report] = ()
    microbatches: Size = 1
    rounding: rounding_lib.Rounding | None = None
    gradient_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    ema_decay: Decay | None = None
    averaged: averages.Averaged | None = None
    anomaly: Anomaly | None = Anomaly()
    moving_reference: StepExtension | None = None
    extensions: Sequence[StepExtension] = ()
    rules: str = "fsdp"
    mesh: Mapping[str, AxisSize] | None = None
    seed: Seed = 0

    def __post_init__(self):
        object.__setattr__(self, "learning_rate", schedules.as_schedule(self.learning_rate))
        if self.microbatches < 1 or self.batch_size % self.microbatches:
            raise ValueError(
                f"BATCH_SIZE = {self.batch_size} is not a multiple of the {self.microbatches} microbatches: change "
                "BATCH_SIZE or Recipe.microbatches."
            )
        # Their errors come before anything is made.
        averages.average_of(self.ema_decay, self.averaged)
        rows_of(self.model, self.inputs, self.feature_lengths)

    @functools.cached_property
    def step_extensions(self) -> Sequence[StepExtension]:
        """All that the state holds besides parameters, optimiser and the model's collections."""
        average = averages.average_of(self.ema_decay, self.averaged)
        own = (average, self.moving_reference, self.anomaly, *self.extensions)
        return [extension for extension in own if extension is not None]

    @functools.cached_property
    def inputs_spec(self) -> Inputs:
        """Names, shapes and units of a batch."""
        return rows_of(self.model, self.inputs, self.feature_lengths)

    @property
    def language_model(self) -> LanguageModel:
        """The model of a run that continues texts; raises ValueError for another kind of model."""
        if not isinstance(self.model, LanguageModel):
            raise ValueError(
                f"Recipe.model, a {type(self.model).__name__}, is not a language model."
            )
        return self.model

    @property
    def length(self) -> int:
        """Units in a row: its tokens; 1 for an image."""
        return self.inputs_spec.length or 1

    @property
    def units_per_batch(self) -> int:
        """Tokens or images in a global batch, padding included."""
        return self.batch_size * self.length

    def with_span(self, span: schedules.Span) -> "Recipe":
        """Returns this recipe with its schedule made for a run's span, if the schedule needs one."""
        return dataclasses.replace(self, learning_rate=schedules.span(self.learning_rate, span))

    def program(self, *, devices: Sequence[jax.Device] | int | None = None) -> "Program":
        """Resolves mesh, shapes and shardings, and validates them; allocates and compiles nothing.

        Args:
          devices: devices to use, possibly of an absent topology; all present ones by default. A number stands for as many
            devices of which nothing is known: the program is then good for checks alone.

        Raises:
          ValueError: mesh, rules and sizes that do not fit together.
        """
        count = devices if isinstance(devices, int) else len(devices or jax.devices())
        rules = partitioning.rules_named(self.rules)
        variables = initialise.abstract_variables(self.model, self.inputs_spec)
        boxed = variables["params"]
        mesh: Any = partitioning.checked_mesh(
            self.mesh,
            count,
            lambda mesh, rows: partitioning.validate(
                mesh=mesh,
                rules=rules,
                config=self.model.config,
                batch_size=rows,
                length=self.inputs_spec.length,
                boxed_params=boxed,
                model=self.model,
            ),
            batch_size=self.batch_size,
            microbatches=self.microbatches,
        )
        if not isinstance(devices, int):
            mesh = partitioning.make_mesh(shape=self.mesh, devices=devices)
        shapes = initialise.shapes_of(boxed)
        # Before the mask: without adapters, the pattern of what is trained matches nothing, but is not the cause.
        reports = [line for report in self.reports for line in report(shapes)]
        mask = trainable.mask_of(self.trainable, boxed)
        narrow = rounding_lib.narrow_dtypes(shapes, mask)
        rounding_lib.check(self.rounding, narrow)
        if widened := narrow if self.rounding is None else []:
            variables = jax.eval_shape(initialise.widened, variables)
            boxed = variables["params"]
        states = self._states(boxed, mask)
        abstract = jax.eval_shape(states, variables)
        params = initialise.param_shardings(boxed, mesh, rules)
        shardings = states.shardings(abstract, params, mesh)
        return Program(
            recipe=self,
            mesh=mesh,
            rules=rules,
            boxed_params=boxed,
            reports=reports,
            mask=mask,
            widened=widened,
            abstract_state=initialise.with_shardings(abstract, shardings),
            batch_sharding=partitioning.batch_sharding(mesh, rules),
        )

    def abstract_batch(self, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch."""
        arrays = self.inputs_spec.arrays(self.batch_size)
        return initialise.with_shardings(arrays, dict.fromkeys(arrays, sharding))

    def _states(self, boxed_params: Any, mask: Any) -> initialise.StateMaker:
        optimizer = make_optimizer(
            self.optimizer,
            learning_rate=schedules.as_schedule(self.learning_rate),
            boxed_params=boxed_params,
            terms=self.gradient_terms,
        )
        if self.rounding == "stochastic":
            optimizer = rounding_lib.stochastic(optimizer, seed=self.seed)
        return initialise.StateMaker(
            optimizer=optimizer, mask=mask, extensions=self.step_extensions
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Compiled on first call, or ahead by `lower` and `trace` with the same arguments.

    Attributes:
      train: (state, batch) -> (state, metrics); consumes the state.
      evaluate: (params, batch, variables=None) -> metrics as (sum, weight); `variables` are the
        other collections of a state, for a model that has some.
    """

    train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[..., Metrics]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A recipe on a mesh. Call its functions inside `partitioning.use_mesh(mesh, rules)`.

    Attributes:
      rules: logical to mesh axes.
      boxed_params: abstract parameters with their logical names.
      reports: lines about the model to print at the start of a run.
      mask: tree of bools, True where trained; None when everything is.
      widened: the narrower dtypes that trained parameters have in the model, if the state's are all float32; else empty.
      abstract_state: shapes, dtypes and shardings of the state.
      batch_sharding: sharding of every input array.
    """

    recipe: Recipe
    mesh: Mesh
    rules: Rules
    boxed_params: Any
    reports: Sequence[str]
    mask: Any
    widened: Sequence[str]
    abstract_state: TrainState
    batch_sharding: NamedSharding

    def with_span(self, span: schedules.Span) -> "Program":
        """See `Recipe.with_span`; a schedule changes neither shapes nor shardings."""
        return dataclasses.replace(self, recipe=self.recipe.with_span(span))

    def check_extras(self, meta: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Checks the objective's files, such as a reference's checkpoint; see `StoredExtras.check`.

        Args:
          meta: returns the known facts about the data; called only if there are such files.
        """
        if (extras := self.stored_extras) is not None:
            extras.check(self.mesh, self.rules, meta())
            extras.check_trained(self.abstract_state.params, self.mask)

    @property
    def stored_extras(self) -> StoredExtras | None:
        """The objective's files; see `Objective`."""
        recipe = self.recipe
        return Objective.of(recipe.objective(model=recipe.model, num_sources=0)).stored_extras

    @functools.cached_property
    def init(self) -> Callable[[], TrainState]:
        """A jitted function () -> state of step 0, created sharded."""
        recipe = self.recipe
        model, inputs, seed = recipe.model, recipe.inputs_spec, recipe.seed
        make_state = self._states
        widened = self.widened

        def init() -> TrainState:
            variables = initialise.variables(model, jax.random.key(seed), inputs)
            return make_state(initialise.widened(variables) if widened else variables)

        return jax.jit(init, out_shardings=self._state_shardings)

    @functools.cached_property
    def restart(self) -> Callable[[TrainState], TrainState] | None:
        """State -> the state with a fresh optimiser for its parameters.

        None where a fresh optimiser's state does not depend on their values.
        """
        return self._states.restart(self.abstract_state, self._state_shardings)

    @property
    def train_flops_per_unit(self) -> float:
        """Model FLOPs of training on one token, or on one image: three forward passes, a third of it for gradients of weights.

        Frozen weights of a language model have no such gradients. Residual networks count theirs.
        """
        state, recipe = self.abstract_state, self.recipe
        model, row = recipe.model, recipe.inputs_spec.arrays(1)
        forward = model.forward_flops(row, {"params": state.params, **state.variables})
        if self.mask is None or recipe.inputs_spec.unit == "images":
            return 3.0 * forward
        trained = flops.trained_shapes(state.params, self.mask)
        return 2.0 * forward + model.forward_flops(row, {"params": trained, **state.variables})

    @property
    def _states(self) -> initialise.StateMaker:
        return self.recipe._states(self.boxed_params, self.mask)

    @property
    def _state_shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def steps(self, num_sources: int) -> Steps:
        """Returns the jitted step of training and the jitted evaluation of a batch.

        `steps.train(state, batch)` returns the next state and metrics, and uses up the memory of the state that it is given.
        `steps.evaluate(params, batch)` returns metrics as (sum, weight), which `divide` makes means of.

        Args:
          num_sources: number of data sources whose losses are reported separately; 0 for none.
        """
        recipe = self.recipe
        objective = Objective.of(recipe.objective(model=recipe.model, num_sources=num_sources))
        # The steps take the extras as an argument: wherever their files are, the program is the same.
        loss_fn = dataclasses.replace(objective, stored_extras=None)
        train_step = make_train_step(
            loss_fn=loss_fn,
            optimizer=self._states.optimizer,
            seed=recipe.seed,
            mask=self.mask,
            microbatches=recipe.microbatches,
            gradient_dtype=recipe.gradient_dtype,
            extensions=recipe.step_extensions,
        )
        evaluate = make_eval_step(
            loss_fn=loss_fn,
            microbatches=recipe.microbatches,
            extensions=recipe.step_extensions,
        )
        # Metrics of any shape are read by every process.
        replicated = NamedSharding(self.mesh, PartitionSpec())
        train = jax.jit(
            train_step, donate_argnums=0, out_shardings=(self._state_shardings, replicated)
        )
        with_extras = bound_extras.binder(objective, self.mesh, self.rules)
        return Steps(
            train=with_extras(train),
            evaluate=with_extras(jax.jit(evaluate, out_shardings=replicated)),
        )

    @contextlib.contextmanager
    def compiling(self, train_step: Any, batch: Any) -> Iterator[None]:
        """Compiles the train step in a thread while the body runs, waits for it at the end, and raises its error.

        jax caches the program, so that the first call of `train_step` neither traces nor compiles.

        Args:
          batch: shapes, dtypes and shardings of a batch.
        """

        def compile_step() -> None:
            with partitioning.use_mesh(self.mesh, self.rules):  # it is local to a thread
                train_step.lower(self.abstract_state, batch).compile()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            compilation = pool.submit(compile_step)
            yield
        compilation.result()
        host_memory.give_back()

    def num_params(self, *, trained_only: bool = False) -> int:
        """Returns the number of learnable parameters; with `trained_only`, of those that this run trains."""
        counted = self.mask if trained_only else None
        if counted is None:
            counted = trainable.mask_of((), self.boxed_params)
        params, _ = trainable.split(self.abstract_state.params, counted)
        return sum(leaf.size for leaf in jax.tree.leaves(params))
