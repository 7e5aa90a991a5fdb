"""Meshes, rule sets, what is refused, and that no mesh, rule set or microbatching changes the numbers."""

import ast
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from espalier.model import axes
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.embed import Embed
from espalier.model.moe.moe import MoeMlp
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block, Transformer
from espalier.trainers import initialise, partitioning
from espalier.trainers.batches import global_batch
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe
from espalier.trainers.trainable import path_name

SIZES = {
    "vocab_size": 64,
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 4,
    "mlp_dim": 64,
}
# For what scanned layers do not change: traced and compiled in half the time.
ONE_LAYER = {"num_layers": 1, "scan_layers": False}
ROWS, LENGTH = 8, 16


def mesh_of(**shape):
    count = int(np.prod(list(shape.values())))
    return partitioning.make_mesh(shape=shape, devices=jax.devices()[:count])


# ---- Meshes.


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, (8, 1, 1, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 4}, (1, 2, 1, 1, 4)),
        ({"fsdp": 2, "expert": 4}, (1, 2, 4, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"fsdp": -1, "context": 4}, (1, 2, 1, 4, 1)),
    ],
)
def test_a_mesh_covers_all_devices(shape, sizes):
    mesh = partitioning.make_mesh(shape=shape)
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == sizes
    assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"dta": 8},
            r"unknown axes \['dta'\]: use \('data', 'fsdp', 'expert', 'context', 'tensor'\)",
        ),
        ({"data": 4}, "does not cover the 8 available devices"),
        ({"data": 16}, "does not cover the 8 available devices"),
        ({"data": 3, "fsdp": -1}, "does not cover the 8 available devices"),
        ({"data": 3, "fsdp": -1}, r"Here: --gin.MESH=\"{'fsdp': 8}\"\."),
        ({"data": 2, "fsdp": 64, "tensor": 2}, r"MESH=\"{'data': 2, 'fsdp': 2, 'tensor': 2}\""),
        ({"data": 6}, r"MESH=\"{'data': 8}\""),
        ({"fsdp": 32, "tensor": -1}, r"MESH=\"{'fsdp': 8}\""),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 8, "tensor": 0}, "give positive sizes"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        partitioning.make_mesh(shape=shape)


def test_an_unknown_rule_set_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'fdsp': choose from \['dp', 'ep', 'fsdp', 'fsdp_cp', 'fsdp_ep'"
    ):
        partitioning.rules_named("fdsp")


@pytest.mark.parametrize(
    ("count", "mesh", "batch", "microbatches", "message"),
    # By hand: with these rules a batch divides by all devices.
    [
        (
            12,
            {"fsdp": -1},
            16,
            1,
            "12 devices divides a batch of 16 rows: take BATCH_SIZE=12 or 24, or 8 or 16 devices.",
        ),
        (12, {"fsdp": 8}, 16, 1, "8 or 16 devices."),
        (
            4,
            {"fsdp": -1},
            6,
            1,
            "4 devices divides a batch of 6 rows: take BATCH_SIZE=4 or 8, or 2 devices.",
        ),
        (32, {"fsdp": 2, "tensor": 16}, 16, 1, "take BATCH_SIZE=32, or 16 devices."),
        (
            12,
            {"fsdp": -1},
            32,
            2,
            "32 rows in 2 microbatches: take BATCH_SIZE=24 or 48, or 8 or 16 devices.",
        ),
    ],
)
def test_where_no_mesh_fits_the_nearest_batches_and_numbers_of_devices_are_named(
    count, mesh, batch, microbatches, message
):
    def check(mesh, rows):
        validate(mesh, "fsdp", batch=rows, embed_dim=96)

    sizes = {"batch_size": batch, "microbatches": microbatches}
    with pytest.raises(ValueError, match=re.escape(message)):
        partitioning.checked_mesh(mesh, count, check, **sizes)


# ---- Validation.


def validate(
    mesh, rules, *, boxed=None, batch=ROWS, length=LENGTH, limit=2**31, model=None, **sizes
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "_MOST_WHOLE", limit)
        partitioning.validate(
            mesh=mesh,
            rules=partitioning.rules_named(rules) if isinstance(rules, str) else rules,
            config=TransformerConfig(**{**SIZES, **sizes}),
            batch_size=batch,
            length=length,
            boxed_params=boxed,
            model=model,
        )


def boxed_params(**sizes):
    return initialise.abstract_variables(
        Transformer(config=TransformerConfig(**{**SIZES, **sizes}))
    )["params"]


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        ("dp", {"data": 8}),
        ("fsdp", {"data": 2, "fsdp": 4}),
        ("tp", {"data": 2, "tensor": 4}),
        ("fsdp_tp", {"fsdp": 4, "tensor": 2}),
        ("fsdp_tp_sp", {"fsdp": 2, "tensor": 4}),
    ],
)
def test_what_fits_passes(rules, mesh):
    validate(mesh_of(**mesh), rules, boxed=boxed_params())


@pytest.mark.parametrize(
    ("mesh", "settings", "problem"),
    [
        (
            {"fsdp": 8},
            {"batch": 12},
            r"BATCH_SIZE \(divided by the microbatches\) = 12 .* 8 shards",
        ),
        ({"tensor": 8}, {"length": 20}, "the row length = 20 is not a multiple of the 8 shards"),
        ({"tensor": 8}, {}, "num_heads = 4 is not a multiple of the 8 shards of 'heads'"),
        ({"tensor": 4}, {"num_kv_heads": 2}, "num_kv_heads = 2 is not a .* of the 4 .*whole_kv"),
        ({"tensor": 4}, {"mlp_dim": 66}, "mlp_dim = 66 is not a multiple of the 4 shards of 'mlp'"),
        ({"tensor": 4}, {"vocab_size": 61}, "vocab_size = 61 is not a multiple of the 4 shards"),
        ({"fsdp": 8}, {"embed_dim": 36}, "embed_dim = 36 is not a multiple of the 8 shards"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, settings, problem):
    with pytest.raises(ValueError, match=problem):
        validate(mesh_of(**mesh), "fsdp_tp_sp", **settings)


def test_layers_may_be_split_only_where_they_divide():
    rules = tuple((n, "fsdp" if n == axes.LAYERS else t) for n, t in partitioning.RULE_SETS["dp"])
    validate(mesh_of(fsdp=2), rules)
    with pytest.raises(ValueError, match="num_layers over the pattern = 2 .* 4 shards"):
        validate(mesh_of(fsdp=4), rules)


def mixture(num_experts, *, expert_dim=None, **sizes):
    mlp = functools.partial(
        MoeMlp, num_experts=num_experts, expert_dim=expert_dim, balance_loss=0.01
    )
    config = TransformerConfig(**{**SIZES, **sizes})
    return Transformer(config=config, block=functools.partial(Block, mlp=mlp))


def test_experts_that_the_mesh_does_not_divide_are_refused():
    boxed = initialise.abstract_variables(mixture(6))["params"]
    validate(mesh_of(expert=2, fsdp=4), "fsdp_ep", boxed=boxed)
    with pytest.raises(ValueError) as caught:
        validate(mesh_of(expert=4, fsdp=2), "fsdp_ep", boxed=boxed)
    assert str(caught.value).count("\n  - ") == 1
    assert "num_experts = 6 is not a multiple of the 4 shards of 'expert'" in str(caught.value)


def test_a_width_of_experts_that_the_mesh_does_not_divide_is_refused():
    boxed = initialise.abstract_variables(mixture(8, expert_dim=6))["params"]
    validate(mesh_of(tensor=2, fsdp=4), "fsdp_tp", boxed=boxed)
    with pytest.raises(ValueError) as caught:
        validate(mesh_of(tensor=4, fsdp=2), "fsdp_tp_whole_kv", boxed=boxed)
    assert str(caught.value).count("\n  - ") == 1
    assert "expert_dim or mlp_dim) = 6 is not a multiple of the 4 shards" in str(caught.value)


def test_expert_parallelism_leaves_the_rest_whole_on_purpose():
    boxed = initialise.abstract_variables(mixture(8))["params"]
    validate(mesh_of(expert=8), "ep", boxed=boxed, limit=0)
    with pytest.raises(ValueError, match="would stay whole on every device"):
        validate(mesh_of(expert=4, fsdp=2), "fsdp_ep", boxed=boxed, limit=0)


def attending(implementation="auto", **sizes):
    attention = functools.partial(Attention, implementation=implementation)
    config = TransformerConfig(**{**SIZES, **sizes})
    return Transformer(config=config, block=functools.partial(Block, attention=attention))


@pytest.mark.parametrize(
    ("model", "mesh", "batch", "problem"),
    [
        (attending(), {"fsdp": 2, "context": 4}, 4, "not of 2: multiply Recipe.microbatches by 2"),
        (mixture(4), {"fsdp": 2, "context": 4}, 2, "no mixtures of experts.* 'fsdp_ep'"),
        (
            EncoderDecoder(config=TransformerConfig(**SIZES)),
            {"context": 8},
            1,
            "rows of a decoder alone: use the rules 'fsdp'",
        ),
        (attending("blocked"), {"context": 2}, 1, "'blocked' reads whole rows: use 'auto'"),
        (attending("all_to_all"), {"context": 8}, 1, "'all_to_all' divides the 4 key/value heads"),
        (attending("ring"), {"fsdp": 2}, 2, "'ring' is for rows whose length the mesh splits"),
    ],
)
def test_what_cannot_be_trained_on_parts_of_rows_is_refused(model, mesh, batch, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        validate(mesh_of(**mesh), "fsdp_cp", batch=batch, model=model)
    assert str(caught.value).count("\n  - ") == 1


def test_rows_that_the_context_does_not_divide_are_refused():
    validate(mesh_of(fsdp=2, context=4), "fsdp_cp", batch=2, model=attending())
    with pytest.raises(ValueError, match="the row length = 18 is not a multiple of the 4 shards"):
        validate(mesh_of(fsdp=2, context=4), "fsdp_cp", batch=2, length=18)


def test_the_start_of_a_run_says_how_parts_of_rows_are_read():
    rules = partitioning.rules_named("fsdp_cp")
    for mesh, model, method in [
        (mesh_of(fsdp=2, context=4), attending(), "all_to_all"),
        (mesh_of(context=8), attending(), "ring"),
        (mesh_of(context=4), attending("ring"), "ring"),
        (mesh_of(fsdp=4), attending(), ""),
    ]:
        assert partitioning.attention_method(mesh, rules, model) == method


@pytest.mark.parametrize(("rules", "axis"), [("dp", "tensor"), ("dp", "expert")])
def test_devices_that_no_rule_uses_are_refused(rules, axis):
    with pytest.raises(ValueError, match=f"mesh axis '{axis}' has size 2, but no rule uses it"):
        validate(mesh_of(**{axis: 2, "data": 4}), rules)


def test_a_rule_for_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="rule for the unknown logical axis 'haeds'"):
        validate(mesh_of(data=8), (*partitioning.RULE_SETS["dp"], ("haeds", "tensor")))


def renamed(boxed, old, new):
    """The boxed parameters with one logical name replaced."""
    return jax.tree.map(
        lambda box: box.replace(names=tuple(new if n == old else n for n in box.names)),
        boxed,
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )


def test_a_parameter_with_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match=r"mlp/up/kernel has axes \['mpl'\] without a rule"):
        validate(mesh_of(fsdp=8), "fsdp", boxed=renamed(boxed_params(), axes.MLP, "mpl"))


def test_a_parameter_without_names_is_refused():
    boxed = boxed_params()
    boxed["final_norm"]["scale"] = nn.meta.unbox(boxed["final_norm"]["scale"])
    with pytest.raises(
        ValueError, match="parameter final_norm/scale carries no logical axis names"
    ):
        validate(mesh_of(fsdp=8), "fsdp", boxed=boxed)


def test_large_parameters_that_stay_whole_are_refused():
    boxed = boxed_params()
    norms = 5 * 32 * 4  # bytes of all gains, which no rule set splits
    validate(mesh_of(fsdp=8), "fsdp", boxed=boxed, limit=norms)
    with pytest.raises(ValueError, match="would stay whole on every device"):
        validate(mesh_of(fsdp=8), "fsdp", boxed=boxed, limit=norms - 1)
    lost = renamed(boxed, axes.EMBED, axes.NORM)
    with pytest.raises(ValueError, match="would stay whole on every device"):
        validate(mesh_of(fsdp=8), "fsdp", boxed=lost, limit=10_000)
    validate(mesh_of(data=8), "dp", boxed=boxed, limit=0)  # meant to be whole


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        validate(
            mesh_of(fsdp=2, tensor=4),
            (*partitioning.RULE_SETS["tp"], ("haeds", "tensor")),
            boxed=renamed(boxed_params(), axes.MLP, "mpl"),
            batch=9,
            num_kv_heads=2,
            mlp_dim=66,
        )
    message = str(caught.value)
    for part in ("'haeds'", "BATCH_SIZE", "num_kv_heads", "mlp_dim", "mlp/down/kernel"):
        assert part in message
    assert message.startswith(
        "Mesh {'data': 1, 'fsdp': 2, 'expert': 1, 'context': 1, 'tensor': 4} and the rule set do not fit"
    )


# ---- Shardings.

# Of the (fsdp 2, tensor 4) mesh, by hand. Column-parallel projections split their outputs over tensor,
# row-parallel ones their inputs (arXiv 1909.08053); fsdp splits the width of the residual stream.
COLUMN = ("query/kernel", "key/kernel", "value/kernel", "up/kernel", "gate/kernel")
ROW = ("attention/out/kernel", "down/kernel")


def expected_spec(name, *, fsdp, tensor):
    if name.endswith("scale"):
        return (None,) if name.startswith("final") else (None, None)
    if name.endswith("embedding"):
        return (tensor, fsdp)
    if name.endswith(COLUMN):
        return (None, fsdp, tensor)
    assert name.endswith(ROW)
    return (None, tensor, fsdp)


@pytest.mark.parametrize(
    ("rules", "fsdp", "tensor"),
    [
        ("dp", None, None),
        ("fsdp", "fsdp", None),
        ("tp", None, "tensor"),
        ("fsdp_tp", "fsdp", "tensor"),
        ("fsdp_tp_sp", "fsdp", "tensor"),
    ],
)
def test_shardings_of_every_parameter(rules, fsdp, tensor):
    model = Transformer(config=TransformerConfig(**SIZES), tie_embeddings=False)
    mesh, rules = mesh_of(fsdp=2, tensor=4), partitioning.rules_named(rules)
    shardings = initialise.param_shardings(
        initialise.abstract_variables(model)["params"], mesh, rules
    )
    found = {path_name(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    assert len(found) == 12
    for name, spec in found.items():
        padded = (*spec, *[None] * (len(expected_spec(name, fsdp=0, tensor=1)) - len(spec)))
        assert padded == expected_spec(name, fsdp=fsdp, tensor=tensor), name


def test_activations_are_split_as_the_rule_sets_say():
    residual = (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)
    heads = (axes.BATCH, axes.INNER_LENGTH, axes.ACT_HEADS, None)
    batch = ("data", "fsdp")
    for rules, residual_length, head in [
        ("dp", None, None),
        ("fsdp", None, None),
        ("tp", None, "tensor"),
        ("fsdp_tp", None, "tensor"),
        ("fsdp_tp_sp", "tensor", "tensor"),
        ("fsdp_cp", "context", None),
        ("fsdp_tp_cp", "context", "tensor"),
    ]:
        inner_length = "context" if "cp" in rules else None
        rules = partitioning.rules_named(rules)
        assert tuple(partitioning.mesh_spec(residual, rules)) == (batch, residual_length, None)
        assert tuple(partitioning.mesh_spec(heads, rules)) == (batch, inner_length, head, None)


@pytest.mark.parametrize("rules", ["fsdp", "fsdp_tp", "fsdp_tp_sp", "fsdp_cp"])
def test_no_device_has_a_whole_table_or_its_gradient(rules):
    table = Embed(num_embeddings=96, features=48)
    ids_BT = jax.ShapeDtypeStruct((64, 128), jnp.int32)
    mesh, rules = mesh_of(data=2, fsdp=2, tensor=2), partitioning.rules_named(rules)

    def loss(params, ids_BT):
        x_BTD = table.apply({"params": params}, ids_BT)
        return jnp.sum(jnp.sin(axes.constrain(x_BTD, axes.BATCH, axes.LENGTH, axes.ACT_EMBED)))

    abstract = jax.eval_shape(table.init, jax.random.key(0), ids_BT)["params"]
    shardings = initialise.param_shardings(abstract, mesh, rules)
    batch = NamedSharding(mesh, partitioning.mesh_spec((axes.BATCH, None), rules))
    params = jax.tree.map(lambda _: jax.ShapeDtypeStruct((96, 48), jnp.float32), shardings)
    with partitioning.use_mesh(mesh, rules):
        step = jax.jit(jax.grad(loss), in_shardings=(shardings, batch), out_shardings=shardings)
        text = step.lower(params, ids_BT).compile().as_text()
    assert "[96,24]" in text or "[48,24]" in text
    assert "[96,48]" not in text


@pytest.mark.parametrize("name", sorted(partitioning.RULE_SETS))
def test_experts_are_split_by_expert_parallelism_and_ranks_where_the_other_side_is_not(name):
    rules, fsdp = partitioning.rules_named(name), "fsdp" if "fsdp" in name else None
    fsdp = ("fsdp", "context") if "cp" in name else fsdp
    kernel = (axes.LAYERS, axes.EXPERT, axes.RANK, axes.UNMODELED)
    expert = "expert" if name in ("ep", "fsdp_ep") else None
    assert tuple(partitioning.mesh_spec(kernel, rules)) == (None, expert, fsdp, None)
    assert tuple(partitioning.mesh_spec((axes.EMBED, axes.RANK), rules)) == (fsdp, None)


# ---- Invariance.


class Rows:
    """Random packed rows of two documents, from two sources."""

    batch_size, length = ROWS, LENGTH
    source_names = ("even", "odd")

    def batch(self, step, lo, hi):
        rng = np.random.default_rng(step)
        tokens = rng.integers(3, 64, (ROWS, LENGTH + 1)).astype(np.int32)
        cut = rng.integers(3, LENGTH - 3, (ROWS, 1))
        index = np.arange(LENGTH)
        weights = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
        whole = {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_loss_weights": weights,
            "decoder_segment_ids": (1 + (index >= cut)).astype(np.int32),
            "decoder_positions": (index - cut * (index >= cut)).astype(np.int32),
            "source_ids": np.arange(ROWS, dtype=np.int32) % 2,
        }
        return {name: value[lo:hi] for name, value in whole.items()}


def train(rules, mesh, *, microbatches=1, steps=4, model=None, **sizes):
    """(losses by step, their per-source values, parameters) after a few steps."""
    # SGD: Adam divides by the gradient's size and would turn rounding of tiny gradients into steps.
    recipe = Recipe(
        model=model or Transformer(config=TransformerConfig(**{**SIZES, **sizes})),
        batch_size=ROWS,
        feature_lengths={"targets": LENGTH},
        optimizer=functools.partial(optimizers.sgd, momentum=0.9, max_grad_norm=1.0),
        learning_rate=schedules.constant(peak=0.5),
        microbatches=microbatches,
        rules=rules,
        mesh=mesh,
    )
    program = recipe.program(devices=jax.devices()[: int(np.prod(list(mesh.values())))])
    step = program.steps(2).train
    losses, by_source = [], []
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = jax.device_get(state.params)
        for index in range(steps):
            state, metrics = step(state, global_batch(Rows(), index, program.batch_sharding))
            losses.append(metrics["loss"][0] / metrics["loss"][1])
            by_source.append(metrics["source_loss"][0] / metrics["source_loss"][1])
    after = jax.device_get(state.params)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), after, before))
    assert min(moved) > 1e-4  # every parameter takes part in the comparison
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.mesh.shape == program.mesh.shape
    return np.array(losses), np.array(by_source), after


@pytest.fixture(scope="module")
def reference():
    return train("dp", {"data": 1})


def assert_same(found, want):
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-5)

    def same(a, b):
        # Relative to the array: a single entry may be near zero.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    jax.tree.map(same, found[2], want[2])


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        ("dp", {"data": 8}),
        ("fsdp", {"fsdp": 8}),
        ("tp", {"data": 2, "tensor": 4}),
        ("fsdp_tp", {"fsdp": 4, "tensor": 2}),
        pytest.param("fsdp_tp_sp", {"fsdp": 2, "tensor": 4}, marks=pytest.mark.smoke),
    ],
)
def test_no_mesh_or_rule_set_changes_the_numbers(reference, rules, mesh):
    assert_same(train(rules, mesh), reference)


def test_expert_parallelism_changes_no_numbers():
    """Attention, blocks and all, with the experts' losses."""
    model = mixture(4, **ONE_LAYER)
    want = train("dp", {"data": 1}, steps=2, model=model)
    assert_same(train("fsdp_ep", {"fsdp": 2, "expert": 4}, steps=2, model=model), want)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_whole_key_value_heads_change_no_numbers(num_kv_heads):
    mesh, sizes = {"fsdp": 2, "tensor": 4}, {**ONE_LAYER, "num_kv_heads": num_kv_heads}
    want = train("dp", {"data": 1}, **sizes)
    assert_same(train("fsdp_tp_whole_kv", mesh, **sizes), want)
    rules = partitioning.rules_named("fsdp_tp_whole_kv")
    shardings = initialise.param_shardings(boxed_params(**sizes), mesh_of(**mesh), rules)
    attention = shardings["layers"]["block_0"]["attention"]
    assert "tensor" in attention["query"]["kernel"].spec
    assert "tensor" not in attention["key"]["kernel"].spec


@pytest.mark.parametrize(
    ("rules", "implementation", "mesh"),
    [
        ("fsdp_cp", "ring", {"fsdp": 2, "context": 4}),
        ("fsdp_tp_cp", "auto", {"fsdp": 2, "context": 2, "tensor": 2}),
    ],
)
def test_parts_of_rows_change_no_numbers(reference, rules, implementation, mesh):
    model = attending(implementation)
    assert_same(train(rules, mesh, microbatches=4, model=model), reference)


def test_accumulation_changes_no_numbers(reference):
    assert_same(train("fsdp_tp", {"fsdp": 4}, microbatches=2), reference)


def resolve(rules, mesh, devices, **sizes):
    """The error of a recipe on these devices; '' without one."""
    recipe = Recipe(
        model=Transformer(config=TransformerConfig(**{**SIZES, **ONE_LAYER, **sizes})),
        batch_size=ROWS,
        feature_lengths={"targets": LENGTH},
        optimizer=optimizers.sgd,
        learning_rate=0.1,
        rules=rules,
        mesh=mesh,
    )
    try:
        recipe.program(devices=devices)
    except ValueError as error:
        return str(error)
    return ""


def proposed(error):
    found = re.search(r'--gin.MESH="(.*)"', error)
    return found and ast.literal_eval(found[1])


@pytest.mark.parametrize("rules", ["dp", "fsdp", "fsdp_tp", "fsdp_tp_sp", "fsdp_ep"])
def test_a_number_of_absent_devices_is_judged_as_present_ones_are(rules):
    """And every mesh that an error proposes is accepted."""
    meshes = [{"data": -1}, {"fsdp": 4, "tensor": -1}, {"tensor": -1}, {"fsdp": 3}, {"expert": 2}]
    errors = {str(mesh): resolve(rules, mesh, 8, num_kv_heads=2) for mesh in meshes}
    assert errors == {str(m): resolve(rules, m, jax.devices(), num_kv_heads=2) for m in meshes}
    remedies = [proposed(error) for error in errors.values() if error]
    assert None not in remedies
    assert {resolve(rules, mesh, 8, num_kv_heads=2) for mesh in remedies} == {""}


def test_a_proposed_mesh_keeps_the_own_axes_and_there_may_be_none():
    """Key/value heads are fewer than the devices that only `tensor` would take."""
    mesh = {"fsdp": 32, "tensor": -1}
    assert proposed(resolve("fsdp_tp", mesh, 8, num_kv_heads=2)) == {"fsdp": 8}
    assert proposed(resolve("fsdp_tp", {"tensor": 8}, 8, num_kv_heads=2)) == {
        "fsdp": 4,
        "tensor": 2,
    }
    odd = {"num_kv_heads": 1, "num_heads": 1, "mlp_dim": 7, "embed_dim": 10, "vocab_size": 11}
    error = resolve("fsdp_tp", {"tensor": -1}, 3, **odd)
    assert "vocab_size = 11 is not" in error and "--gin.MESH" not in error


def test_a_batch_that_microbatches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="BATCH_SIZE = 8 is not a multiple of the 3 microbatches"):
        train("dp", {"data": 1}, microbatches=3)


def test_moments_follow_their_parameter():
    recipe = Recipe(
        model=Transformer(config=TransformerConfig(**SIZES)),
        batch_size=ROWS,
        feature_lengths={"targets": LENGTH},
        optimizer=optimizers.adamw,
        learning_rate=schedules.constant(peak=0.1),
        ema_decay=0.9,
        rules="fsdp_tp",
        mesh={"fsdp": 2, "tensor": 4},
    )
    state = recipe.program().abstract_state
    want = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    assert [leaf.sharding for leaf in jax.tree.leaves(state.ema_params)] == want
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert [leaf.sharding for leaf in moments] == 2 * want
    assert all(x.dtype == jnp.float32 for x in moments)
