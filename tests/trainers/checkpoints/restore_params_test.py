"""Parameters read whole and in part, by path pattern, onto other layouts and dtypes."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from espalier.model.layer_groups import Group
from espalier.model.transforms import base
from espalier.trainers.checkpoints import state_tree, step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.initial import InitialCheckpoint, transformed
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError, Manifest
from espalier.trainers.checkpoints.restore import restore_state
from espalier.trainers.checkpoints.restore_params import CheckpointMismatchError, restore_params
from espalier.trainers.train_state import TrainState


def make_params(seed=0, layers=2):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    blocks = {f"block_{i}": {"kernel": array(8, 16), "scale": array(8)} for i in range(layers)}
    return {"embed": array(32, 8), "layers": blocks}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    params = make_params(1)
    state = TrainState(
        step=jnp.asarray(5, jnp.int32),
        params=params,
        opt_state={"mu": make_params(2)},
        ema_params=make_params(3),
    )
    with Checkpointer(directory / "checkpoints") as checkpointer:
        checkpointer.save(5, state)
    return directory


def shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/5"])
def test_run_and_step_directories_are_understood(run, where):
    assert_equal(restore_params(run / where, shapes(make_params())), make_params(1))


def test_the_moving_average_is_read_on_request(run):
    assert_equal(restore_params(run, shapes(make_params()), use_ema=True), make_params(3))


def test_a_missing_moving_average_is_an_error(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.ones(3)}})
    with pytest.raises(CheckpointMismatchError, match="holds no ema_params"):
        restore_params(tmp_path, {"w": jnp.ones(3)}, use_ema=True)


def test_layout_and_dtype_are_those_asked_for(run):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    sharding = NamedSharding(mesh, P("b"))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding), make_params()
    )
    params = restore_params(run, wanted)
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding == sharding
    assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(1)))


def test_an_integer_is_not_read_as_a_float(run):
    wanted = shapes(make_params())
    wanted["embed"] = jax.ShapeDtypeStruct((32, 8), jnp.int32)
    with pytest.raises(CheckpointMismatchError, match=r"embed: .*float32\[32, 8\].*int32\[32, 8\]"):
        restore_params(run, wanted)


def test_patterns_rename_repeat_and_skip(run, caplog):
    initial = make_params(9, layers=4)
    with caplog.at_level(logging.WARNING):
        params = restore_params(
            run,
            initial,
            assignment=[
                ("layers/block_3/.*", None),
                (r"layers/block_\d/(scale)", r"layers/block_1/\1"),
                (r"layers/block_2/(.*)", r"layers/block_0/\1"),
            ],
        )
    saved = make_params(1)["layers"]
    assert_equal(params["embed"], make_params(1)["embed"])
    assert_equal(params["layers"]["block_3"], initial["layers"]["block_3"])
    for i, source in enumerate([0, 1, 0]):
        block = params["layers"][f"block_{i}"]
        assert_equal(block["kernel"], saved[f"block_{source}"]["kernel"])
        assert_equal(block["scale"], saved["block_1"]["scale"])
    assert "2 parameters keep their initial values: layers/block_3/kernel" in caplog.text
    jax.jit(lambda p: p, donate_argnums=0)(params)  # No buffer is there twice.


def test_parameters_that_are_declared_as_new_are_no_warning(run, caplog):
    initial = make_params(1)
    initial["layers"]["block_0"]["adapter_lora"] = jax.numpy.ones(3)
    added = [r".*/adapter_\w+"]
    with caplog.at_level(logging.WARNING):
        assert_equal(restore_params(run, initial, added=added), initial)
        assert not caplog.records
        restore_params(run, initial, added=added, assignment=[("embed", None)])
    assert "1 parameters keep their initial values: embed" in caplog.text


def test_nothing_but_initial_values_may_be_asked_for(run):
    initial = {"embed": make_params(9)["embed"]}
    params = restore_params(run, initial, assignment=[(".*", None)], strict=False)
    assert_equal(params, initial)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (3, "lacks layers/block_2/kernel .and 1 more..*did you mean layers/block_1/kernel"),
        (1, "has parameters that the model does not: layers/block_1/kernel .and 1 more"),
    ],
)
def test_strict_reading_names_what_differs(run, layers, text):
    with pytest.raises(CheckpointMismatchError, match=text):
        restore_params(run, make_params(layers=layers))


def test_lenient_reading_keeps_what_is_missing_and_leaves_out_the_rest(run):
    more = restore_params(run, make_params(9, layers=3), strict=False)
    assert_equal(more["layers"]["block_2"], make_params(9, layers=3)["layers"]["block_2"])
    assert_equal(more["layers"]["block_0"], make_params(1)["layers"]["block_0"])
    fewer = restore_params(run, shapes(make_params(layers=1)), strict=False)
    assert_equal(fewer["layers"]["block_0"], make_params(1)["layers"]["block_0"])


def test_another_shape_names_path_and_both_shapes(run):
    wanted = shapes(make_params())
    wanted["embed"] = jax.ShapeDtypeStruct((40, 8), jnp.float32)
    with pytest.raises(CheckpointMismatchError, match=r"embed: .*\[32, 8\].*\[40, 8\]"):
        restore_params(run, wanted)
    with pytest.raises(CheckpointMismatchError, match=r"embed: .*\[8, 16\] \(as layers/block_0/ke"):
        restore_params(run, wanted, assignment=[("embed", "layers/block_0/kernel")], strict=False)


def test_a_pattern_that_matches_nothing_is_an_error(run):
    with pytest.raises(ValueError, match="'embde' matches no parameter.*did you mean embed"):
        restore_params(run, make_params(), assignment=[("embde", None)])
    with pytest.raises(ValueError, match=r"assignment pattern '\*x' is not a regular expression"):
        restore_params(run, shapes(make_params()), assignment=[("*x", None)])
    with pytest.raises(ValueError, match=r"added pattern '\*x' is not a regular expression"):
        restore_params(run, {**make_params(), "new": jnp.ones(1)}, added=["*x"])


def test_an_assigned_path_that_is_not_there_is_an_error_even_if_lenient(run):
    with pytest.raises(CheckpointMismatchError, match="lacks head .assigned to embed"):
        restore_params(run, make_params(), assignment=[("embed", "head")], strict=False)


def test_an_initial_value_that_is_needed_must_be_given(run):
    with pytest.raises(ValueError, match="embed should have its initial value"):
        restore_params(run, shapes(make_params()), assignment=[("embed", None)])


def test_verification_covers_the_whole_step(run):
    path = run / "checkpoints" / "5" / "meta.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"5", b"7", 1))
    try:
        with pytest.raises(DamagedCheckpointError, match="meta.json does not match"):
            restore_params(run, shapes(make_params()))
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": "none"}, "array params/embed has the dtype 'none'"),
        ({"dtype": None}, "array params/embed has the dtype None"),
        ({"dtype": "object"}, "array params/embed has the dtype 'object'"),
        ({"shape": (-32, -8)}, r"array params/embed has the shape \[-32, -8\]"),
        ({"shape": (2**64, 8)}, "array params/embed has the shape"),
        ({"shape": ("a",)}, r"array params/embed has the shape \['a'\]"),
        ({"shape": (64, 8)}, r"float32\[64, 8\] for params/embed, which is stored as float32\[32, 8\]"),
        ({"shape": (2**40, 2**20)}, r"params/embed, which is stored as float32\[32, 8\]"),
        ({"dtype": "float64"}, "float64.* for params/embed, which is stored as float32"),
    ],
)  # fmt: skip
def test_a_manifest_unlike_its_arrays_is_one_clear_error(run, change, problem, capfd):
    path = run / "checkpoints" / "5" / "manifest.json"
    good = path.read_bytes()
    recorded = Manifest.from_bytes(good)
    entry = dataclasses.replace(recorded.arrays["params/embed"], **change)
    forged = dataclasses.replace(recorded, arrays={**recorded.arrays, "params/embed": entry})
    wanted = shapes(make_params())
    if all(type(size) is int and size > 0 for size in entry.shape) and entry.shape[0] < 2**63:
        wanted["embed"] = jax.ShapeDtypeStruct(entry.shape, jnp.float32)
    path.write_bytes(forged.to_bytes())
    try:
        with pytest.raises(DamagedCheckpointError, match=f"manifest.json.*{problem}"):
            restore_params(run, wanted)
    finally:
        path.write_bytes(good)
    assert "Event loop" not in capfd.readouterr().err


@pytest.mark.parametrize("tree", [{"a/b": 1}, {"": 1}, {"a": {"1": 2}, "b": {1: 1, "1": 2}}])
def test_ambiguous_names_are_refused(tree):
    with pytest.raises((ValueError, TypeError)):
        state_tree.flatten(tree)


def test_names_nest_and_come_back():
    state = TrainState(step=1, params={"a": [2, (3, None)]}, opt_state=(), ema_params=None)
    flat = state_tree.flatten(state)
    assert flat == {"step": 1, "params/a/0": 2, "params/a/1/0": 3}
    assert state_tree.nest(flat) == {"step": 1, "params": {"a": {"0": 2, "1": {"0": 3}}}}
    assert state_tree.unflatten(flat, state) == state


LAYOUTS = {  # the groups of four layers, None of unrolled ones
    "one": (Group(0, 1, 4),),
    "two": (Group(0, 2, 2),),
    "all": (Group(0, 4, 1),),
    "one and three": (Group(0, 1, 1), Group(1, 1, 3)),
    "two and two": (Group(0, 1, 2), Group(2, 1, 2)),
    "unrolled": None,
}


def in_layout(layout, seed=5):
    """Parameters whose layer i is the same in every layout; on a mesh, the kernels of layers are split."""
    layers = make_params(seed, layers=4)["layers"]
    if groups := LAYOUTS[layout]:
        layers = {
            f"block_{block}": jax.tree.map(
                lambda *rows: jnp.stack(rows), *(layers[f"block_{i}"] for i in group.layers(block))
            )
            for group in groups
            for block in group.blocks
        }
    return {"embed": jnp.ones((3, 2)), "layers": layers}


@pytest.fixture(scope="module")
def saved_layouts(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        with Checkpointer(root / layout) as checkpointer:
            checkpointer.save(1, whole_state(layout))
    return root


def whole_state(layout):
    moments = {kind: in_layout(layout, seed) for kind, seed in (("mu", 6), ("nu", 7))}
    return {"params": in_layout(layout), "opt_state": moments}


@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("there", LAYOUTS)
def test_layers_are_found_in_another_layout(saved_layouts, there, here):
    """Another `layer_pattern` has another period, and layers may be scanned or not."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def abstract(path, x):
        names = (None,) * (x.ndim - 2) + ("b", "a") if path[-1].key == "kernel" else ()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*names)))

    expected = in_layout(here)
    wanted = jax.tree_util.tree_map_with_path(abstract, expected)
    params = restore_params(saved_layouts / there, wanted)
    assert_equal(params, expected)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted)
    # A new parameter of a layer is no layer of the checkpoint.
    wanted["layers"]["block_0"]["gate"] = jnp.zeros(3)
    params = restore_params(saved_layouts / there, wanted, added=[".*/gate"])
    assert_equal(params["layers"]["block_0"].pop("gate"), np.zeros(3))
    assert_equal(params, expected)


@pytest.mark.parametrize("there", LAYOUTS)
def test_an_optimisers_state_goes_on_only_in_its_own_layout(saved_layouts, there):
    """Moments of one layer never become those of another: every other layout is refused, and the message says why."""
    for here in LAYOUTS:
        state = whole_state(here)
        if here == there:
            assert_equal(restore_state(saved_layouts / there, shapes(state)).state, state)
            continue
        with pytest.raises(CheckpointMismatchError, match="layers are scanned in other groups"):
            restore_state(saved_layouts / there, shapes(state))


def test_moments_are_not_carried_into_another_layout(saved_layouts):
    """A transform that copies each array by name."""

    class Copy:
        def plan(self, sources, target):
            return [base.copied(path, shape, sources[0]) for path, shape in target.items()]

    state = TrainState(step=0, **whole_state("two and two"))
    for there, error in (("two and two", None), ("two", "no layers/block_2"), ("one", "block_")):
        step, initial = saved_layouts / there / "1", InitialCheckpoint(moments="carry")
        made = functools.partial(
            transformed, step, step_dir.read_manifest(step), state, Copy(), initial
        )
        if error is None:
            assert_equal(made().opt_state, state.opt_state)
            continue
        with pytest.raises(base.TransformError, match=error):
            made()


def test_fewer_layers_are_another_model(saved_layouts):
    wanted = shapes(in_layout("two"))
    wanted["layers"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), wanted["layers"]
    )
    with pytest.raises(CheckpointMismatchError, match="lacks layers/block_1/kernel"):
        restore_params(saved_layouts / "one", wanted)
    with pytest.raises(CheckpointMismatchError, match="is of another model"):
        restore_params(saved_layouts / "two", wanted)
