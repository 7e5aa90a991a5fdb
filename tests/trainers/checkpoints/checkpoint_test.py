"""Real checkpoints on disk: saved, restored onto other meshes, damaged in every way, killed midway."""

import collections
import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from espalier.launch.run import phase
from espalier.model.transforms import base
from espalier.trainers.checkpoints import manifest, state_tree, step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.commit import CheckpointSaveError, Retention
from espalier.trainers.checkpoints.initial import InitialCheckpoint
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError
from espalier.trainers.checkpoints.restore import (
    RunMismatchError,
    restore_or_initialise,
    restore_state,
)
from espalier.trainers.checkpoints.restore_params import CheckpointMismatchError, restore_params
from espalier.trainers.checkpoints.step_dir import read_meta
from espalier.trainers.train_state import TrainState

ROOT = Path(__file__).parents[3]


def mesh_of(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("a", "b")[: len(shape)])


def spec_of(x, mesh):
    """Splits the first axes over the mesh where they divide, so that layouts really differ."""
    axes = [name if x.ndim and x.shape[0] % mesh.shape[name] == 0 else None for name in ["a"]]
    if "b" in mesh.shape and x.ndim > 1 and x.shape[1] % mesh.shape["b"] == 0:
        axes.append("b")
    return P(*axes[: x.ndim])


def placed(tree, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x, mesh))), tree)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def make_params(seed=0, width=16):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"embedding": jnp.asarray(rng.standard_normal((24, width)), jnp.float32)},
        "layers": {
            "kernel": jnp.asarray(rng.standard_normal((2, width, 40)), jnp.bfloat16),
            "scale": jnp.asarray(rng.standard_normal(width), jnp.float32),
        },
    }


def make_state(seed=0, width=16, mesh=None, tx=None):
    params = make_params(seed, width)
    tx = tx or optax.adamw(1e-3)
    opt_state = tx.init(params)
    state = TrainState(
        step=jnp.asarray(seed, jnp.int32),
        params=params,
        opt_state=opt_state,
        variables={"counts": {"seen": jnp.arange(8, dtype=jnp.int32) + seed}},
    )
    # Optimisers begin with zeros: give every leaf values of its own.
    leaves, tree = jax.tree.flatten(state)
    leaves = [x + jnp.asarray(i + seed, x.dtype) for i, x in enumerate(leaves)]
    return placed(jax.tree.unflatten(tree, leaves), mesh or mesh_of(8))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save(directory, states, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step, state in states.items():
            assert checkpointer.save(step, state, meta={"run": {"name": "a"}, "data_step": step})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the steps 10 and 20, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, {10: make_state(10), 20: make_state(20)})
    return directory


@pytest.fixture
def copied(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def files_of(step):
    return sorted(p.relative_to(step) for p in Path(step).rglob("*") if p.is_file())


# Exactness and layouts.


@pytest.mark.parametrize("shape", [(8,), (2, 4), (4, 2), (1,)])
def test_restores_bit_exact_onto_another_mesh_and_back(two_steps, tmp_path, shape):
    target = abstract(placed(make_state(0), mesh_of(*shape)))
    restored = restore_state(two_steps / "20", target)
    assert restored.step == 20 and restored.meta["data_step"] == 20
    assert_same(restored.state, make_state(20))
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
    save(tmp_path / "again", {1: restored.state})
    assert_same(restore_state(tmp_path / "again", abstract(make_state(0))).state, make_state(20))


def masked(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def first_only(params):
    return {"embed": "a", "layers": jax.tree.map(lambda _: "b", params["layers"])}


OPTIMISERS = {
    "adamw": optax.adamw(1e-3, mask=masked),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "masked": optax.masked(optax.adam(1e-3), masked),
    "partition": optax.partition({"a": optax.adam(1e-3), "b": optax.set_to_zero()}, first_only),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3), optax.ema(0.9)),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "none": optax.identity(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser_states_come_back_as_they_were(name, tmp_path):
    state = make_state(3, tx=OPTIMISERS[name])
    save(tmp_path, {3: state})
    assert_same(restore_state(tmp_path, abstract(state)).state, state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 0 - jnp.ones((), x.dtype), tree), donate_argnums=0
    )
    state = {"params": {f"w{i}": jnp.full((512, 512), i, jnp.float32) for i in range(8)}}
    expected = jax.tree.map(lambda x: np.array(x), state)
    like = abstract(state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(5):
            state = overwrite(state)
        jax.block_until_ready(state)
        checkpointer.wait()
    assert_same(restore_state(tmp_path, like).state, expected)


def test_arrays_are_plain_nested_dicts_without_our_code(two_steps):
    tree = ocp.StandardCheckpointer().restore(two_steps / "20" / "state")
    expected = make_state(20)
    assert set(tree) == {"step", "params", "opt_state", "variables"}
    assert_same(tree["params"], expected.params)
    assert np.array_equal(
        tree["opt_state"]["0"]["mu"]["layers"]["scale"], expected.opt_state[0].mu["layers"]["scale"]
    )


def test_nothing_is_unpickled(two_steps, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert restore_state(two_steps, abstract(make_state(0))).step == 20


def test_meta_and_metrics_are_recorded(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        meta = {"data": "abc", "model": {"layers": 2}}
        checkpointer.save(5, make_state(5), meta=meta, metrics={"loss": np.float32(1.5)})
    assert read_meta(tmp_path) == meta  # A run directory
    assert read_meta(tmp_path / "checkpoints") == meta
    assert read_meta(tmp_path / "checkpoints" / "5") == meta
    assert restore_state(tmp_path, abstract(make_state(0))).metrics == {"loss": 1.5}


# Damage.


def damaged_reason(directory, caplog):
    """Restores from a directory whose step 20 is damaged; returns the reason that is given."""
    caplog.clear()
    with Checkpointer(directory) as checkpointer, caplog.at_level(logging.WARNING):
        restored = checkpointer.restore_latest(
            abstract(make_state(0)), expected_meta={"run": {"name": "a"}}
        )
        assert checkpointer.all_steps() == [10]
    assert restored.step == 10
    assert_same(restored.state, make_state(10))
    ((step, reason),) = restored.skipped
    assert step == 20
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("espalier.trainers")]
    assert len(warnings) == 1 and reason in warnings[0] and "from step 10" in warnings[0]
    assert (Path(directory) / "20.aside").is_dir() and not (Path(directory) / "20").exists()
    return reason


def flip_bit(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_one_flipped_bit_in_any_file_is_named_and_passed_over(two_steps, tmp_path, caplog):
    rng = np.random.default_rng(0)
    names = files_of(two_steps / "20")
    assert len(names) >= 8
    for name in names:
        size = (two_steps / "20" / name).stat().st_size
        for position in {int(rng.integers(size)), int(rng.integers(size))}:
            directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
            flip_bit(directory / "20" / name, position, int(rng.integers(8)))
            assert str(name) in damaged_reason(directory, caplog)
            # An explicit request does not fall back.
            with pytest.raises(DamagedCheckpointError, match=str(name)):
                restore_state(directory / "20.aside", abstract(make_state(0)))
            shutil.rmtree(directory)


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "deleted", "zeroed", "longer", "unreadable"]
)
def test_other_damage_to_any_file_is_named_and_passed_over(two_steps, tmp_path, caplog, damage):
    for name in files_of(two_steps / "20"):
        directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
        path = directory / "20" / name
        data = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(data[: len(data) * 2 // 3])
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "deleted":
            path.unlink()
        elif damage == "zeroed":
            path.write_bytes(bytes(len(data)))
        elif damage == "unreadable":
            path.unlink()
            path.symlink_to(path.name)
        else:
            path.write_bytes(data + b"\n")
        assert str(name) in damaged_reason(directory, caplog)
        shutil.rmtree(directory)


def data_files(step):
    return [p for p in (Path(step) / "state").rglob("*") if p.is_file() and p.parent.name == "d"]


def test_swapped_array_files_are_damage(copied, caplog):
    first, second = sorted(data_files(copied / "20"), key=lambda p: p.stat().st_size)[-2:]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert first.name in damaged_reason(copied, caplog)


def test_a_missing_data_folder_is_damage(copied, caplog):
    shutil.rmtree(copied / "20" / "state")
    assert "is missing" in damaged_reason(copied, caplog)


@pytest.fixture
def unsplit(tmp_path):
    """A step whose arrays are one piece each: those above 1 kB lie in the files as they are."""
    save(tmp_path / "unsplit", {20: make_state(20, mesh=mesh_of(1))})
    return epath.Path(tmp_path / "unsplit" / "20")


def flip_in_array(step, name):
    values = np.asarray(state_tree.flatten(make_state(20))[name]).tobytes()
    for path in data_files(step):
        if (offset := path.read_bytes().find(values)) >= 0:
            flip_bit(path, offset + 100, 3)
            return str(path.relative_to(step))
    raise AssertionError(f"{name} is not in any file")


@pytest.mark.parametrize("name", ["params/layers/kernel", "opt_state/0/nu/embed/embedding"])
def test_the_damaged_array_is_named(unsplit, name):
    file = flip_in_array(unsplit, name)
    with pytest.raises(DamagedCheckpointError, match=f"{file} does not.*array {name}") as caught:
        restore_state(unsplit, abstract(make_state(0)))
    assert caught.value.arrays == (name,)
    assert list(caught.value.files) == [file]


def test_what_was_written_wrong_is_found_although_all_files_are_as_written(unsplit):
    """The digests come from memory: they do not vouch for what a bad disk or library wrote."""
    flip_in_array(unsplit, "params/layers/kernel")
    recorded = step_dir.read_manifest(unsplit)
    files = {name: manifest.file_checksum(unsplit / name) for name in recorded.files}
    (unsplit / "manifest.json").write_bytes(manifest.Manifest(recorded.arrays, files).to_bytes())
    with pytest.raises(DamagedCheckpointError, match="array params/layers/kernel") as caught:
        restore_state(unsplit, abstract(make_state(0)))
    assert caught.value.files == {}


def test_two_damaged_steps_end_in_an_error(copied):
    for step in ("10", "20"):
        (copied / step / "meta.json").unlink()
    with Checkpointer(copied) as checkpointer:
        with pytest.raises(DamagedCheckpointError, match="20 is damaged: meta.json is missing"):
            checkpointer.restore_latest(abstract(make_state(0)))
        assert checkpointer.all_steps() == [10, 20]  # Nothing was touched.


def test_a_number_set_aside_can_be_saved_again(copied, caplog):
    (copied / "20" / "manifest.json").unlink()
    damaged_reason(copied, caplog)
    save(copied, {20: make_state(21)})
    assert_same(restore_state(copied / "20", abstract(make_state(0))).state, make_state(21))


def test_read_meta_checks_what_it_reads(copied):
    flip_bit(copied / "20" / "meta.json", 12, 1)
    with pytest.raises(DamagedCheckpointError, match="meta.json does not match its checksum"):
        read_meta(copied)


# Other models and other runs.


def test_a_foreign_model_names_the_first_difference_and_both_shapes(two_steps):
    with pytest.raises(CheckpointMismatchError) as caught:
        restore_state(two_steps, abstract(make_state(0, width=32)))
    text = str(caught.value)
    assert "opt_state/0/mu/embed/embedding" in text
    assert "float32[24, 16]" in text and "float32[24, 32]" in text and "and 8 more" in text


def test_a_foreign_model_is_not_passed_over(copied):
    with Checkpointer(copied) as checkpointer:
        with pytest.raises(CheckpointMismatchError):
            checkpointer.restore_latest(abstract(make_state(0, width=32)))
        assert checkpointer.all_steps() == [10, 20]


def test_another_optimiser_is_named(two_steps):
    with pytest.raises(CheckpointMismatchError, match="opt_state/0/nu.*the model no such array"):
        restore_state(two_steps, abstract(make_state(0, tx=optax.lion(1e-3))))


def test_another_dtype_is_named(two_steps):
    state = make_state(0)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
    with pytest.raises(CheckpointMismatchError, match="bfloat16.2, 16, 40.*float32.2, 16, 40"):
        restore_state(two_steps, abstract(state.replace(params=params)))


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ({"run": {"name": "b"}}, "run.name is 'a' there and 'b' here"),
        ({"run": {"name": "a", "size": 3}}, "run.size is None there and 3 here"),
        ({"other": (1, 2)}, r"other is None there and \[1, 2\] here"),
    ],
)
def test_a_run_directory_of_another_config_is_refused(copied, expected, text):
    with Checkpointer(copied) as checkpointer:
        with pytest.raises(RunMismatchError, match=text):
            checkpointer.restore_latest(abstract(make_state(0)), expected_meta=expected)
        assert checkpointer.all_steps() == [10, 20]


@pytest.mark.parametrize("content", [None, "file", "folder"])
def test_no_checkpoint_is_one_clear_error(tmp_path, content):
    path = tmp_path / "run"
    if content:
        path.mkdir()
        (path / "notes").write_text("x") if content == "file" else (path / "20").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{path}"):
        restore_params(path, {})


# Keeping and saving.


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2}, [4, 5]),
        ({"keep_last": 1, "keep_best": 2}, [2, 4, 5]),
        ({"keep_last": 1, "keep_best": 1, "best_metric": "accuracy", "best_mode": "max"}, [3, 5]),
        ({"keep_last": None, "keep_best": 1}, [1, 2, 3, 4, 5]),
    ],
)
def test_last_and_best_are_kept_across_restarts(tmp_path, options, kept):
    losses = {1: float("nan"), 2: 0.5, 3: 0.9, 4: 0.7, 5: 0.8}
    for step, loss in losses.items():
        with Checkpointer(tmp_path, **options) as checkpointer:
            metrics = {"loss": loss, "accuracy": 1.0 if step == 3 else 0.1}
            checkpointer.save(step, {"params": {"w": jnp.ones(3) * step}}, metrics=metrics)
    assert checkpointer.all_steps() == kept
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == kept
    best = 3 if "best_metric" in options else 2
    metric, mode = options.get("best_metric", "loss"), options.get("best_mode", "min")
    ranked = Retention(metric=metric, mode=mode).best(checkpointer._metrics)
    assert ranked[0] == (best if best in kept else 4)


@pytest.mark.parametrize(
    ("metric", "metrics", "known"),
    [
        ("los", {"loss": 1.0}, False),
        ("eval/b/loss", {"loss": 1.0, "eval/a/loss": 1.0}, False),
        ("eval/a/loss", {"loss": 1.0, "eval/a/loss": 1.0}, True),
        ("eval/a/loss", {"loss": 1.0}, True),  # saved without an evaluation
        ("loss", {}, True),  # saved before the first row
        ("loss/a", {"loss": 1.0, "loss/b": 1.0}, True),  # a row may be without a source
        ("validation/loss", {"loss": 1.0}, False),
        ("validation/loss", {}, True),
    ],
)
def test_a_metric_that_the_run_does_not_have_is_an_error(tmp_path, metric, metrics, known):
    expected = contextlib.nullcontext()
    if not known:
        expected = pytest.raises(ValueError, match=f"best_metric = '{metric}'.*choose from .*loss")
    with Checkpointer(tmp_path, keep_best=1, best_metric=metric) as checkpointer, expected:
        later = ["eval/", "indicators/"]
        checkpointer.save(1, {"params": {"w": jnp.ones(3)}}, metrics=metrics, later=later)
    assert checkpointer.all_steps() == [1]


def test_a_step_without_permission_is_damaged_not_interrupted():
    class Locked:
        def __truediv__(self, name):
            return self

        def exists(self):
            raise PermissionError(13, "Permission denied")

    assert not step_dir.is_incomplete(Locked())


def test_a_saved_step_is_saved_once(tmp_path):
    like = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
        assert checkpointer.save(1, {"params": {"w": jnp.ones(3)}})
        assert not checkpointer.save(1, {"params": {"w": jnp.zeros(3)}})
        assert checkpointer.restore_latest(like).state["params"]["w"][0] == 1


@pytest.mark.parametrize("leaf", [np.ones(3), 1.5, jax.random.key(0)])
def test_what_is_no_numeric_array_is_refused_before_anything_is_written(tmp_path, leaf):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="params/w"):
        checkpointer.save(1, {"params": {"w": leaf}})
    assert list(tmp_path.iterdir()) == []


def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, {"w": jnp.ones(3)}, meta={"x": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_best": -1}, {"best_mode": "least"}])
def test_bad_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpointer(tmp_path, **options)


# The order of restoring.


def test_the_order_is_own_run_then_initial_checkpoint_then_scratch(two_steps, tmp_path):
    fresh = make_state(1)
    arguments = (abstract(fresh), lambda: fresh)
    initial = InitialCheckpoint(path=two_steps)
    with Checkpointer(tmp_path) as checkpointer:
        scratch = restore_or_initialise(checkpointer, *arguments)
        assert scratch.source == "scratch" and scratch.state is fresh

        params = restore_or_initialise(checkpointer, *arguments, initial=initial)
        assert (params.source, params.step) == ("initial", 0)
        there = make_state(20)
        assert_same(params.state, fresh.replace(params=there.params, variables=there.variables))

        whole = InitialCheckpoint(path=two_steps, scope="state")
        state = restore_or_initialise(checkpointer, *arguments, initial=whole)
        assert (state.source, state.step) == ("initial", 20)
        assert_same(state.state, make_state(20))

        checkpointer.save(7, make_state(7))
        own = restore_or_initialise(checkpointer, *arguments, initial=initial)
        assert (own.source, own.step) == ("run", 7)
        assert_same(own.state, make_state(7))


def test_a_moving_average_starts_from_the_initial_parameters(two_steps, tmp_path):
    fresh = make_state(1)
    fresh = fresh.replace(ema_params=fresh.params)
    with Checkpointer(tmp_path) as checkpointer:
        state = restore_or_initialise(
            checkpointer, abstract(fresh), lambda: fresh, initial=InitialCheckpoint(path=two_steps)
        ).state
    assert_same(state.ema_params, make_state(20).params)
    jax.jit(lambda s: s, donate_argnums=0)(state)  # No buffer is there twice.


class Copies:
    def plan(self, sources, target):
        return [base.copied(path, shape, sources[0]) for path, shape in target.items()]


def test_schedules_of_transformed_parameters_count_the_updates_that_were_made(tmp_path):
    """Of a parent that dropped nine of its 20 updates, as its own schedule does."""
    fresh = make_state(1, tx=optax.adamw(lambda count: 1e-3 / (1 + count)))
    first, second = tmp_path / "first", tmp_path / "second"
    with Checkpointer(first) as checkpointer:
        checkpointer.save(20, fresh, meta={"skipped": 9})
    initial = InitialCheckpoint(path=first, scope="state", transform=Copies())
    with Checkpointer(second) as checkpointer:
        made = restore_or_initialise(checkpointer, abstract(fresh), lambda: fresh, initial=initial)
    (schedule,) = (s for s in made.state.opt_state if isinstance(s, optax.ScaleByScheduleState))
    assert (made.step, int(made.state.step), int(schedule.count)) == (20, 20, 11)
    parent = phase.find_parent(second, initial)
    assert (parent.step, parent.skipped) == (20, 9)


def test_a_damaged_run_is_not_silently_started_anew(two_steps, copied):
    for step in ("10", "20"):
        (copied / step / "manifest.json").unlink()
    with Checkpointer(copied) as checkpointer, pytest.raises(DamagedCheckpointError):
        restore_or_initialise(
            checkpointer,
            abstract(make_state(0)),
            lambda: make_state(0),
            initial=InitialCheckpoint(path=two_steps),
        )


# Saves that are cut short.


def test_a_half_written_step_is_cleaned_up(copied, caplog):
    (copied / "30" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (copied / "30" / "incomplete").touch()
    (copied / "30" / "state.orbax-checkpoint-tmp" / "x").write_bytes(b"x")
    (copied / "40").mkdir()  # Killed before the mark.
    # Written by Orbax after the failed save was removed.
    (copied / "50" / "state.orbax-checkpoint-tmp" / "x").mkdir(parents=True)
    assert step_dir.resolve(copied).name == "20"  # Readers pass it over.
    with pytest.raises(FileNotFoundError, match="incomplete"):
        read_meta(copied / "30")
    with Checkpointer(copied) as checkpointer, caplog.at_level(logging.WARNING):
        assert checkpointer.all_steps() == [10, 20]
    assert not any((copied / name).exists() for name in ("30", "40", "50"))
    assert "30: its save was interrupted" in caplog.text


@pytest.mark.parametrize("moment", ["rmtree", "rmdir"])
def test_a_deletion_that_is_cut_short_leaves_no_step(copied, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    step = epath.Path(copied / "10")
    monkeypatch.setattr(type(step), moment, killed)
    with pytest.raises(KeyboardInterrupt):
        step_dir.remove(step)
    monkeypatch.undo()
    assert step.exists() and list(step_dir.complete_steps(epath.Path(copied))) == [20]
    with Checkpointer(copied) as checkpointer:
        assert checkpointer.all_steps() == [20]
    assert not step.exists()


def test_an_old_step_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(f"{path} is locked")

    state = make_state()
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(10, state)
        checkpointer.wait()
        monkeypatch.setattr(step_dir, "remove", refuse)
        with caplog.at_level(logging.WARNING):
            checkpointer.save(20, state)
            checkpointer.wait()
        monkeypatch.undo()
        assert checkpointer.all_steps() == [20]
    assert "could not delete" in caplog.text and "10 is locked" in caplog.text
    assert restore_state(tmp_path, abstract(state)).step == 20
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(30, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["30"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_last_step_good(small_disk, asynchronous):
    def state(step):
        rng = np.random.default_rng(step)
        return {"params": {"w": jnp.asarray(rng.standard_normal((1, 350_000)), jnp.float32)}}

    like = abstract(state(0))
    with Checkpointer(small_disk / "c", asynchronous=asynchronous) as checkpointer:
        checkpointer.save(1, state(1))
        checkpointer.save(2, state(2))
        with pytest.raises(CheckpointSaveError, match="disk is full.*step 2 is good"):
            checkpointer.save(3, state(3))
            checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]
        assert not (small_disk / "c" / "3").exists()  # Its room was given back.
        restored = checkpointer.restore_latest(like)
        assert restored.step == 2
        assert_same(restored.state, state(2))
        step_dir.remove(checkpointer.step_path(1))  # Someone makes room: the next save works.
        checkpointer.save(3, state(3))
    assert_same(restore_state(small_disk / "c", like).state, state(3))


def test_a_file_size_limit_leaves_the_last_step_good(tmp_path):
    """The same without privileges: a quota on the size of files, in a process of its own."""
    script = """
        import resource, sys
        import jax.numpy as jnp
        from espalier.trainers.checkpoints.checkpoint import Checkpointer, CheckpointSaveError
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"w": jnp.ones((100, 100))})
            checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
            try:
                # Some fail while others are being written.
                many = {f"w{i}": jnp.ones((300, 1000)) for i in range(40)}
                checkpointer.save(2, many)
                checkpointer.wait()
            except CheckpointSaveError as error:
                print(error)
            assert checkpointer.all_steps() == [1]
    """
    done = run_script(script, tmp_path)
    assert "disk is full or a quota is reached" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "Event loop" not in done.stderr, done.stderr
    assert "never retrieved" not in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    like = {"w": jax.ShapeDtypeStruct((100, 100), jnp.float32)}
    assert restore_state(tmp_path, like).step == 1


def run_script(script, *arguments, **options):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_sigkill_at_any_moment_leaves_a_good_step(tmp_path):
    """Children that save without pause are killed at many moments; the last step is always exact."""
    script = """
        import os, signal, sys, time
        import jax, jax.numpy as jnp
        from espalier.trainers.checkpoints.checkpoint import Checkpointer

        def state(step):
            return {"params": {f"w{i}": jnp.full((200, 200), step * 10 + i, jnp.float32) for i in range(6)}}

        for trial in range(10):
            child = os.fork()  # Before JAX has started any thread.
            if not child:
                directory = os.path.join(sys.argv[1], str(trial))
                checkpointer = Checkpointer(directory, keep_last=1)
                checkpointer.save(1, state(1))
                checkpointer.wait()
                open(directory + ".started", "w").close()
                for step in range(2, 1000):
                    checkpointer.save(step, state(step))
            started = os.path.join(sys.argv[1], f"{trial}.started")
            while not os.path.exists(started):
                time.sleep(0.002)
            time.sleep(0.006 * trial)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    """
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    like = {"params": {f"w{i}": jax.ShapeDtypeStruct((200, 200), jnp.float32) for i in range(6)}}
    found = collections.Counter()
    for trial in range(10):
        directory = tmp_path / str(trial)
        found["cut short"] += any(
            step_dir.is_incomplete(p)
            for p in step_dir.steps_on_disk(epath.Path(directory)).values()
        )
        with Checkpointer(directory) as checkpointer:
            restored = checkpointer.restore_latest(like)
        assert restored is not None and not restored.skipped
        found[restored.step] += 1
        for i in range(6):
            assert (np.asarray(restored.state["params"][f"w{i}"]) == restored.step * 10 + i).all()
        # The step before is still there if the kill came between its successor and its deletion.
        left = {p.name for p in directory.iterdir()}
        assert {str(restored.step)} <= left <= {str(restored.step), str(restored.step - 1)}
    assert found["cut short"] >= 3, found  # The moments were not all between saves.


# Several processes.


@pytest.mark.multiprocess
def test_two_processes_save_and_restore_as_one(two_processes, tmp_path):
    script = """
        import json, logging, os, sys
        import jax, numpy as np
        logging.basicConfig(level=logging.WARNING)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        index = int(sys.argv[2])
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, index)
        import jax.numpy as jnp
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from espalier.trainers.checkpoints.checkpoint import Checkpointer
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))

        def state(step, shift=0):
            specs = [P("a"), P("b", "a"), P(("a", "b")), P()]
            specs = specs[shift:] + specs[:shift]
            tree = {}
            for i, spec in enumerate(specs):
                value = np.random.default_rng(10 * step + i).standard_normal((64, 48)).astype("f")
                tree[f"w{i}"] = jax.make_array_from_callback(
                    value.shape, NamedSharding(mesh, spec), lambda index, value=value: value[index]
                )
            return {"params": tree}

        def like(tree):
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
            )

        def check(restored, step):
            assert restored.step == step, restored
            same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
            assert all(jax.tree.leaves(same(restored.state, state(step, 1))))

        from espalier.trainers.checkpoints import manifest
        counted = []
        original = manifest.digests
        manifest.digests = lambda blocks: counted.append(
            sum(values.size for parts in blocks.values() for _, values in parts)
        ) or original(blocks)

        with Checkpointer(sys.argv[1], keep_last=2) as checkpointer:
            for step in (1, 2, 3):
                checkpointer.save(step, state(step), meta={"run": 1})
            checkpointer.wait()
            assert checkpointer.all_steps() == [2, 3]
            # Of w0, w1, w2 each process has half, the replicated w3 counts for the first alone.
            assert counted == [3 * 1536 + (3072 if index == 0 else 0)] * 3, counted
            check(checkpointer.restore_latest(like(state(0, 1)), expected_meta={"run": 1}), 3)
            if index == 0:
                path = os.path.join(sys.argv[1], "3", "state", "ocdbt.process_1", "d")
                name = max(os.listdir(path), key=lambda n: os.path.getsize(os.path.join(path, n)))
                with open(os.path.join(path, name), "r+b") as file:
                    file.seek(100)
                    byte = file.read(1)[0]
                    file.seek(100)
                    file.write(bytes([byte ^ 4]))
            jax.experimental.multihost_utils.sync_global_devices("damaged")
            restored = checkpointer.restore_latest(like(state(0, 1)))
            check(restored, 2)
            assert "ocdbt.process_1" in restored.skipped[0][1] and "array" in restored.skipped[0][1]
            assert checkpointer.all_steps() == [2]
            checkpointer.save(3, state(4))
            checkpointer.wait()
        print("fine", index)
    """
    errors = two_processes(script)
    assert sum(err.count("3.aside") for err in errors) == 1  # One warning for the run.
    # One process with another mesh reads what two wrote.
    like = {"params": {f"w{i}": jax.ShapeDtypeStruct((64, 48), jnp.float32) for i in range(4)}}
    like = abstract(placed(jax.tree.map(lambda x: jnp.zeros(x.shape), like), mesh_of(8)))
    restored = restore_state(tmp_path / "3", like)
    for i in range(4):
        expected = np.random.default_rng(40 + i).standard_normal((64, 48)).astype("f")
        assert np.array_equal(restored.state["params"][f"w{i}"], expected)
    names = {p.name for p in (tmp_path / "3").iterdir()}
    assert names == {"state", "meta.json", "manifest.json"}
    assert json.loads((tmp_path / "3" / "meta.json").read_text())["step"] == 3
