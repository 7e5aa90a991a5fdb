"""Runs that start from a bfloat16 checkpoint: which parameters move, in which dtype, and what the step says of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from espalier.model.adapters import adapter
from espalier.model.adapters.lora import Lora
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.heads.reward_model import RewardModel
from espalier.model.mlp import GatedMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers import initialise, inputs, partitioning
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.initial import InitialCheckpoint
from espalier.trainers.checkpoints.restore import restore_or_initialise, restore_state
from espalier.trainers.checkpoints.restore_params import CheckpointMismatchError
from espalier.trainers.distillation.objective import distillation
from espalier.trainers.objectives.lm import language_modelling
from espalier.trainers.online import losses as policy_gradient
from espalier.trainers.online.groups import Groups
from espalier.trainers.online.policy_gradient import policy_gradient as online
from espalier.trainers.optim import optimizers
from espalier.trainers.preference.losses import direct
from espalier.trainers.preference.objectives.preference import preference
from espalier.trainers.recipe import Recipe
from espalier.trainers.train_state import TrainState

CONFIG = TransformerConfig(
    vocab_size=64,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    scan_layers=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
MODEL = Transformer(config=CONFIG)
ADAPTERS = adapter.named(lora=functools.partial(Lora, layers=(".*/attention/.*",), rank=2))
ADAPTED = Transformer(
    config=CONFIG,
    block=functools.partial(
        Block,
        attention=functools.partial(Attention, adapters=ADAPTERS),
        mlp=functools.partial(GatedMlp, adapters=ADAPTERS),
    ),
)
TRAINED = (r"(.*/)?adapter_\w+/.*",)
UPDATES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher of the student's sizes, without a checkpoint."""

    model: object = MODEL

    def check(self, mesh, rules, meta):
        pass

    def abstract(self, mesh, rules):
        return initialise.abstract_params(self.model, mesh, rules)

    def read(self, mesh, rules):
        return jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), self.abstract(mesh, rules))


def recipe_of(model=MODEL, **changes):
    options = {
        "model": model,
        "batch_size": 4,
        "feature_lengths": None if "inputs" in changes else {"targets": 16},
        "optimizer": functools.partial(optimizers.adamw, weight_decay=0.0),
        "learning_rate": 2e-5,
        "mesh": {"fsdp": -1},
        "anomaly": None,
    }
    return Recipe(**{**options, **changes})


PAIRS = inputs.PackedPairs(feature_lengths={"targets": 16})
GROUPS = Groups(
    prompt_length=8, completion_length=8, samples=4, advantages=policy_gradient.group_normalised
)
KINDS = {
    "language model": recipe_of(),
    "preferences": recipe_of(
        inputs=PAIRS, objective=functools.partial(preference, losses=[direct.dpo])
    ),
    "distillation": recipe_of(objective=functools.partial(distillation, teacher=Teacher())),
    "online": recipe_of(
        inputs=GROUPS,
        objective=functools.partial(online, loss=policy_gradient.grpo),
    ),
    "adapters": recipe_of(ADAPTED, trainable=TRAINED),
}


def batch_of(recipe, sharding):
    rng = np.random.default_rng(0)
    batch = {}
    for name, leaf in recipe.abstract_batch(sharding).items():
        batch[name] = np.ones(leaf.shape, leaf.dtype)
        if name.endswith(("input_tokens", "target_tokens")):
            batch[name] = rng.integers(0, 64, leaf.shape).astype(np.int32)
        elif name == "advantages":
            batch[name] = rng.normal(size=leaf.shape).astype(np.float32)
    batch["source_ids"][:] = 0
    batch["decoder_positions"][:] = np.arange(recipe.length)
    if isinstance(recipe.inputs, inputs.PackedPairs):
        batch["decoder_segment_ids"][:, recipe.length // 2 :] = 2
        batch["decoder_positions"][:] %= recipe.length // 2
    return jax.device_put(batch, sharding)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bfloat16 checkpoint of MODEL, as an import writes it."""
    path = tmp_path_factory.mktemp("imported")
    params = jax.jit(lambda: initialise.variables(MODEL, jax.random.key(1)))()["params"]
    with Checkpointer(path) as checkpointer:
        checkpointer.save(0, {"params": jax.tree.map(lambda box: box.value, params, is_leaf=boxed)})
    return path


def boxed(node):
    return hasattr(node, "unbox")


def run(recipe, checkpoint, tmp_path, *, updates=UPDATES, state=None):
    """(program, state before, state after, metrics of each step), the states on the host."""
    program = recipe.program(devices=jax.devices()[:1])
    initial = InitialCheckpoint(path=checkpoint, added=(".*/adapter_.*",))
    with (
        partitioning.use_mesh(program.mesh, program.rules),
        Checkpointer(tmp_path / "none") as empty,
    ):
        if state is None:
            start = restore_or_initialise(
                empty, program.abstract_state, program.init, initial=initial
            )
            state = start.state
        before, metrics = jax.device_get(state), []
        batch, train = batch_of(recipe, program.batch_sharding), program.steps(1).train
        for _ in range(updates):
            state, of_step = train(state, batch)
            metrics.append({name: float(a / b) for name, (a, b) in of_step.items() if a.ndim == 0})
    return program, before, jax.device_get(state), metrics


def dtype_of(name):
    """The dtype of a parameter of MODEL; norms are float32 in every model."""
    return "float32" if name.endswith("norm/scale") else "bfloat16"


def flat(tree):
    return {name: np.asarray(x) for name, x in state_tree.flatten(tree).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_a_bfloat16_checkpoint_are_not_lost(kind, checkpoint, tmp_path):
    recipe = KINDS[kind]
    program, before, after, metrics = run(recipe, checkpoint, tmp_path)
    adapters = kind == "adapters"
    assert list(program.widened) == ([] if adapters else ["bfloat16"])
    old, new = flat(before.params), flat(after.params)
    trained = {name for name in new if not adapters or "adapter_" in name}
    moved = sum(int((new[name] != old[name]).sum()) for name in trained)
    # In the first update of LoRA, the second factor is zero, and so is the gradient of the first.
    assert moved > 0.99 * sum(new[name].size for name in trained)
    assert {new[name].dtype.name for name in trained} == {"float32"}
    for name in new.keys() - trained:
        assert new[name].dtype == dtype_of(name)
        np.testing.assert_array_equal(new[name].view(np.uint8), old[name].view(np.uint8))
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert {x.dtype.name for x in moments} == {"float32"}
    # What was read are the bfloat16 values.
    with_source = flat(restored(checkpoint))
    for name, values in with_source.items():
        np.testing.assert_array_equal(old[name].astype(np.float32), values.astype(np.float32))
    first = metrics[0]["update_norm"]
    assert 0 < first < 2e-5 * np.sqrt(sum(x.size for x in new.values())) * 1.01


def restored(path):
    recipe = recipe_of(rounding="nearest")
    program = recipe.program(devices=jax.devices()[:1])
    from espalier.trainers.checkpoints.restore_params import restore_params

    return jax.device_get(restore_params(path, program.abstract_state.params))


def norm_of(new, old):
    squares = [
        np.sum((new[name].astype(np.float64) - old[name].astype(np.float64)) ** 2) for name in new
    ]
    return np.sqrt(sum(squares))


@pytest.mark.parametrize(
    ("rounding", "moves"), [(None, 0.99), ("stochastic", 0.02), ("nearest", 0.0)]
)
def test_the_update_norm_is_that_of_the_parameters_as_stored(rounding, moves, checkpoint, tmp_path):
    recipe = recipe_of(rounding=rounding)
    program, before, after, (metrics,) = run(recipe, checkpoint, tmp_path, updates=1)
    old, new = flat(before.params), flat(after.params)
    # The update of a float32 parameter is measured before the sum is rounded, by 6e-8 of a scale near 1 for an update of 2e-5.
    assert metrics["update_norm"] == pytest.approx(norm_of(new, old), rel=1e-3, abs=0)
    share = np.mean(np.concatenate([(new[n] != old[n]).ravel() for n in new]))
    assert share >= moves
    for name, values in new.items():
        assert values.dtype == ("float32" if rounding is None else dtype_of(name))
    moments = {x.dtype.name for x in jax.tree.leaves(after.opt_state) if x.ndim}
    assert ("bfloat16" in moments) == (rounding == "nearest")
    if rounding == "nearest":  # 0.02 and more beside 2e-5: all that is lost
        assert share < 0.5


def test_stochastic_rounding_goes_on_exactly_after_a_restart(checkpoint, tmp_path):
    recipe = recipe_of(rounding="stochastic")
    _, _, whole, _ = run(recipe, checkpoint, tmp_path)
    program, _, half, _ = run(recipe, checkpoint, tmp_path, updates=UPDATES // 2)
    with Checkpointer(tmp_path / "run") as saved:
        saved.save(UPDATES // 2, jax.device_put(half))
    state = restore_state(tmp_path / "run", program.abstract_state).state
    _, _, rest, _ = run(recipe, checkpoint, tmp_path, updates=UPDATES // 2, state=state)
    jax.tree.map(np.testing.assert_array_equal, whole, rest)


def test_the_average_of_an_optimiser_is_read_from_within_its_rounding(checkpoint, tmp_path):
    recipe = recipe_of(
        rounding="stochastic",
        optimizer=functools.partial(contrib.schedule_free_adamw, b1=0.9),
        averaged=contrib.schedule_free_eval_params,
    )
    _, _, after, _ = run(recipe, checkpoint, tmp_path, updates=2)
    wanted = contrib.schedule_free_eval_params(after.opt_state.inner, after.params)
    for name, values in flat(after.ema_params).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, flat(wanted)[name].astype(np.float32), rtol=1e-6)


def test_a_run_that_began_in_bfloat16_names_how_to_go_on(checkpoint, tmp_path):
    program, _, state, _ = run(recipe_of(rounding="nearest"), checkpoint, tmp_path, updates=1)
    with Checkpointer(tmp_path / "run") as saved:
        saved.save(1, jax.device_put(state))
    widened = recipe_of().program(devices=jax.devices()[:1])
    with pytest.raises(
        CheckpointMismatchError, match="narrower dtype.*Recipe.rounding = 'nearest'"
    ):
        restore_state(tmp_path / "run", widened.abstract_state)
    same = restore_state(tmp_path / "run", program.abstract_state).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(same), state)


def test_a_dropped_update_has_norm_0():
    from espalier.trainers.anomaly import Anomaly

    recipe = recipe_of(anomaly=Anomaly(), objective=_not_finite)
    program = recipe.program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        state, metrics = program.steps(1).train(
            program.init(), batch_of(recipe, program.batch_sharding)
        )
    assert isinstance(state, TrainState)
    assert float(metrics["anomaly"][0]) == 1.0 and float(metrics["update_norm"][0]) == 0.0


def _not_finite(*, model, num_sources=0):
    loss = language_modelling(model=model)

    def loss_fn(params, batch, rng):
        out = loss(params, batch, rng)
        return dataclasses.replace(out, sum=out.sum * jnp.nan)

    return loss_fn


def test_a_head_of_float32_leaves_its_frozen_base_in_bfloat16():
    model = RewardModel(backbone=ADAPTED)
    recipe = recipe_of(model, inputs=PAIRS, trainable=(*TRAINED, "reward_head/.*"))
    program = recipe.program(devices=jax.devices()[:1])
    params = state_tree.flatten(program.abstract_state.params)
    assert not program.widened
    for name, leaf in params.items():
        trained = "adapter_" in name or "reward_head" in name
        assert leaf.dtype == ("float32" if trained else dtype_of(name)), name


def test_a_part_of_a_bfloat16_model_is_trained_in_float32():
    recipe = recipe_of(trainable=(".*/attention/.*",))
    program = recipe.program(devices=jax.devices()[:1])
    assert program.widened
    dtypes = {x.dtype.name for x in jax.tree.leaves(program.abstract_state.params)}
    boxes = {box.value.dtype.name for box in jax.tree.leaves(program.boxed_params, is_leaf=boxed)}
    assert dtypes == boxes == {"float32"}
