"""A stored program is neither traced nor compiled, is the same bit for bit, and is not used where anything differs."""

import functools
import logging
import os
import subprocess
import sys
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from espalier.model.config import TransformerConfig
from espalier.model.kernels import platform
from espalier.model.transformer import Transformer
from espalier.trainers import partitioning
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.programs import program, surroundings
from espalier.trainers.recipe import Recipe


class State(typing.NamedTuple):
    weights: jax.Array
    key: jax.Array
    others: dict


def make_step(scale):
    def step(state, x, *, bias=None):
        y = jnp.tanh(state.weights @ x) * scale
        return State(state.weights + y[:, None], state.key, {"none": None}), {"sum": (y.sum(), [y])}

    return step


def arguments(size=4):
    weights = jnp.arange(size * 8.0).reshape(size, 8) / 100
    return State(weights, jax.random.key(3), {"none": None}), np.ones(8, np.float32)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.aval == y.aval and x.sharding == y.sharding and x.committed == y.committed
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def fresh(scale=0.5, **options):
    """Returns a function as another process makes it: nothing is left of an earlier one's programs."""
    jax.clear_caches()
    return program.jit(make_step(scale), **options)


def test_the_second_function_is_loaded_and_equals_the_jitted_one(stored_programs, traces):
    expected = jax.jit(make_step(0.5))(*arguments())
    equal(fresh()(*arguments()), expected)
    assert traces == ["step"] and len(list(stored_programs.iterdir())) == 1
    second = fresh()
    equal(second(*arguments()), expected)
    equal(second(*second(*arguments())[:1], arguments()[1]), expected_twice())
    assert traces == ["step"]


def expected_twice():
    step = jax.jit(make_step(0.5))
    return step(step(*arguments())[0], arguments()[1])


def test_a_program_that_jaxs_cache_has_loaded_is_stored_whole(stored_programs, traces):
    expected = fresh()(*arguments())
    (file,) = stored_programs.iterdir()
    file.unlink()
    equal(fresh()(*arguments()), expected)  # jax's cache has it
    equal(fresh()(*arguments()), expected)
    assert traces == ["step", "step"]


def test_a_program_that_jax_had_in_memory_is_not_stored(stored_programs, traces, caplog):
    first = fresh()
    expected = first(*arguments())
    (file,) = stored_programs.iterdir()
    file.unlink()
    again = program.jit(
        first.__wrapped__
    )  # jax knows the function, and returns what it has, read from bytes or not
    with caplog.at_level(logging.DEBUG, "espalier.trainers.programs"):
        equal(again(*arguments()), expected)
    assert "jax had compiled or loaded it before" in caplog.text
    assert not list(stored_programs.iterdir())


def test_a_donated_argument_is_consumed_by_a_loaded_program_too(stored_programs, traces):
    for _ in range(2):
        state, x = arguments()
        fresh(donate_argnums=0)(state, x)
        assert state.weights.is_deleted()
    assert traces == ["step"]
    state, x = arguments()
    fresh()(state, x)
    assert not state.weights.is_deleted() and traces == ["step", "step"]


def test_keyword_arguments_and_python_numbers(stored_programs, traces):
    def add(x, *, y=None):
        return x + (0 if y is None else y)

    for _ in range(2):
        added = program.jit(add)
        assert float(added(1.0, y=2)) == 3 and float(added(np.float32(1))) == 1
    assert traces == ["add", "add"]


def test_a_function_within_another_is_a_part_of_it(stored_programs, traces):
    def square(x):
        return x * x

    assert float(jax.grad(program.jit(square))(3.0)) == 6
    assert traces == [] and not stored_programs.exists()


def test_reference_forms_and_platforms_have_programs_of_their_own(stored_programs, traces):
    def doubled(x):
        return x * (2 if platform.reference_forms() else 3)

    function, x = program.jit(doubled), jnp.ones(3)
    with platform.use_reference_forms():
        np.testing.assert_array_equal(function(x), 2 * x)
    np.testing.assert_array_equal(function(x), 3 * x)
    with platform.use_platform("tpu"):
        np.testing.assert_array_equal(function(x), 3 * x)
    assert len(traces) == len(list(stored_programs.iterdir())) == 3


def test_a_program_that_was_made_ahead_serves_the_call(stored_programs, traces):
    state, x = arguments()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, x))
    seen = []
    for _ in range(2):
        step = fresh()
        program.compiled(step, *shapes, check=seen.append)
        step(state, x)
    assert traces == ["step"]
    assert [jax.tree.leaves(out)[0].shape for out in seen] == [(4, 8), (4, 8)]


def test_a_refused_result_is_refused_of_a_stored_program_too(stored_programs):
    def refuse(out):
        raise MemoryError("too large")

    fresh()(*arguments())
    with pytest.raises(MemoryError, match="too large"):
        program.compiled(fresh(), *arguments(), check=refuse)


@pytest.mark.parametrize(
    "change", ["closure", "shape", "dtype", "donation", "flag", "mesh", "rules", "tree"]
)
def test_another_program_is_another_file(change, stored_programs, traces):
    fresh()(*arguments())
    state, x = arguments()
    if change == "closure":
        fresh(scale=0.25)(state, x)
    elif change == "shape":
        fresh()(*arguments(size=6))
    elif change == "dtype":
        fresh()(state._replace(weights=state.weights.astype(jnp.bfloat16)), x)
    elif change == "donation":
        fresh(donate_argnums=0)(state, x)
    elif change == "flag":
        with jax.default_matmul_precision("bfloat16"):
            fresh()(state, x)
    elif change == "mesh":
        with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
            fresh()(state, x)
    elif change == "rules":
        with nn.logical_axis_rules([("embed", "data")]):
            fresh()(state, x)
    elif change == "tree":
        fresh()(state._replace(others={"none": None, "more": None}), x)
    assert traces == ["step", "step"] and len(list(stored_programs.iterdir())) == 2


INGREDIENTS = (
    "source",
    "other_source",
    "versions",
    "installed",
    "python",
    "devices",
    "processor",
    "variables",
)


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_a_stale_or_foreign_program_is_not_used(ingredient, stored_programs, traces, monkeypatch):
    fresh()(*arguments())
    before = surroundings.of_process()
    assert set(before) == set(INGREDIENTS)
    monkeypatch.setattr(surroundings, "of_process", lambda: {**before, ingredient: "another"})
    fresh()(*arguments())
    assert traces == ["step", "step"] and len(list(stored_programs.iterdir())) == 2


def test_surroundings_name_versions_devices_flags_and_variables(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    facts, call = surroundings.of_process(), surroundings.of_call()
    assert facts["variables"]["XLA_FLAGS"] == "--xla_x=1"
    assert facts["versions"]["jax"] == jax.__version__
    assert {"jax", "jaxlib", "flax", "optax"} <= set(facts["versions"])
    assert len(facts["devices"][2]) == jax.device_count()
    for flag in ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl"):
        assert flag in call["flags"]
    assert "jax_compilation_cache_dir" not in call["flags"]


def test_a_damaged_program_is_compiled_again_and_stored_again(stored_programs, traces, caplog):
    expected = fresh()(*arguments())
    (file,) = stored_programs.iterdir()
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    equal(fresh()(*arguments()), expected)
    assert traces == ["step", "step"] and caplog.text.count("its checksum is wrong") == 1
    equal(fresh()(*arguments()), expected)
    assert traces == ["step", "step"]


def test_an_executable_that_the_runtime_refuses_is_compiled_again(
    stored_programs, traces, caplog, monkeypatch
):
    from espalier.trainers.programs import executable

    with monkeypatch.context() as patch:
        parts = executable.parts
        patch.setattr(executable, "parts", lambda *args: (parts(*args)[0], b"no executable"))
        fresh()(*arguments())
    fresh()(*arguments())
    assert traces == ["step", "step"] and "it cannot be loaded" in caplog.text


def test_a_program_that_calls_the_host_goes_the_ordinary_way(stored_programs, traces, caplog):
    calls = []

    def note(x):
        calls.append(float(x))

    def noted(x):
        jax.debug.callback(print if x.ndim else functools.partial(max, 0), 1)
        return x + 1

    with caplog.at_level(logging.DEBUG, "espalier.trainers.programs"):
        noting = program.jit(noted)
        assert float(noting(np.float32(1))) == 2 and float(noting(np.float32(2))) == 3
    assert caplog.text.count("it calls functions of the host") == 1
    assert not stored_programs.exists() and traces == ["noted"]


def test_a_function_that_reads_an_unknown_object_goes_the_ordinary_way(stored_programs, caplog):
    lines = iter([1.0])

    def reads(x):
        return x + next(lines)

    with caplog.at_level(logging.DEBUG, "espalier.trainers.programs"):
        assert float(program.jit(reads)(np.float32(1))) == 2
    assert "is not stored: it depends on an object of type" in caplog.text
    assert not stored_programs.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_shardings_over_several_devices(sharded, stored_programs, traces):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "model")))
    x = jax.device_put(np.arange(16, dtype=np.float32), rows)
    out = NamedSharding(mesh, PartitionSpec("data")) if sharded else None

    def double(x):
        return 2 * x

    results = [program.jit(double, out_shardings=out)(x) for _ in range(2)]
    equal(results[0], jax.jit(double, out_shardings=out)(x))
    equal(*results)
    assert traces == ["double"]


def recipe(**changes):
    settings = {
        "model": Transformer(
            config=TransformerConfig(
                vocab_size=32, num_layers=1, scan_layers=False, embed_dim=8, num_heads=2, mlp_dim=8
            )
        ),
        "batch_size": 8,
        "feature_lengths": {"targets": 8},
        "optimizer": functools.partial(optimizers.adamw),
        "learning_rate": schedules.constant(peak=0.1),
        "rules": "fsdp_tp",
    }
    return Recipe(**settings | changes)


def trained(recipe):
    jax.clear_caches()
    run = recipe.program()
    with partitioning.use_mesh(run.mesh, run.rules):
        steps = run.steps(1)
        like = recipe.abstract_batch(run.batch_sharding)
        with run.compiling(steps.train, like):
            state = run.init()
        batch = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), like)
        for _ in range(2):
            state, metrics = steps.train(state, batch)
        return state, metrics, steps.evaluate(state.params, batch)


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 8}])
def test_a_run_is_the_same_with_traced_and_stored_programs(
    mesh, stored_programs, traces, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setenv("ESPALIER_PROGRAMS", "0")
        expected = trained(recipe(mesh=mesh))
    traces.clear()
    equal(trained(recipe(mesh=mesh)), expected)
    assert sorted(traces) == ["evaluate", "init", "step"]
    equal(trained(recipe(mesh=mesh)), expected)
    assert sorted(traces) == ["evaluate", "init", "step"]
    trained(recipe(mesh=mesh, learning_rate=schedules.constant(peak=0.2)))
    assert sorted(traces) == ["evaluate", "init", "init", "step", "step"]  # both have the optimiser


PROCESS = """
import jax, numpy as np, sys
from espalier.trainers.programs import program
lower = program._lower
def traced(*arguments):
    print("traced")
    return lower(*arguments)
program._lower = traced
def f(x):
    return {"y": 3 * x}
print(program.jit(f)(np.arange(3.0, dtype=np.float32))["y"])
"""


def test_a_second_process_traces_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    # Settings that tests before this one left in the environment are not of this one.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("JAX_", "XLA_"))}
    environment = inherited | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "ESPALIER_PROGRAMS": "1",
        "PYTHONPATH": os.getcwd(),
    }
    outputs = [
        subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs == ["traced\n[0. 3. 6.]\n", "[0. 3. 6.]\n"]
