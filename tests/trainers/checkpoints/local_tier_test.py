"""Checkpoints in two tiers: the newest good one is restored, and only if all processes hold it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from espalier.trainers.checkpoints import checkpoint, local_tier
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.commit import CheckpointSaveError
from espalier.trainers.checkpoints.local_tier import TOKEN, LocalTier
from espalier.trainers.checkpoints.restore import RunMismatchError

ROOT = Path(__file__).parents[3]


def mesh_of(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("a", "b")[: len(shape)])


SPECS = (P("a"), P(None, "a"), P(), P())


def state_of(step, mesh=None, specs=SPECS):
    """Arrays of several dtypes, split in several ways, with a scalar among them."""
    rng = np.random.default_rng(step)
    mesh = mesh or mesh_of(8)
    values = {
        "kernel": jnp.asarray(rng.standard_normal((16, 24)), jnp.float32),
        "table": jnp.asarray(rng.standard_normal((3, 8)), jnp.bfloat16),
        "step": jnp.asarray(step, jnp.int32),
        "mask": jnp.asarray(rng.integers(2, size=(5, 1)), jnp.bool_),
    }
    return {
        name: jax.device_put(x, NamedSharding(mesh, spec))
        for (name, x), spec in zip(values.items(), specs, strict=True)
    }


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of a run, with a local tier on a named host."""

    def open_on(host="a", run="run", **options):
        local = LocalTier(directory=str(tmp_path / host), period=1, **options)
        return Checkpointer(tmp_path / run / "checkpoints", local=local)

    return open_on


@pytest.fixture
def saved(opened):
    """A run with the shared step 2 and the local steps 3 and 4 on host a."""
    with opened() as checkpointer:
        for step, occasion in ((2, "period"), (3, "local"), (4, "local")):
            assert checkpointer.save(step, state_of(step), meta={"run": 1}, occasion=occasion)
        checkpointer.wait()
        assert checkpointer.all_steps() == [2]


def local_folders(tmp_path, host="a"):
    return sorted(p for p in tmp_path.glob(f"{host}/*/*/*") if p.is_dir())


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("espalier.trainers")]


@pytest.mark.parametrize("shape", [(8,), (4, 2), (1,)])
def test_the_newest_step_is_restored_bit_exact_on_any_mesh_of_one_process(saved, opened, shape):
    target = like(state_of(0, mesh_of(*shape), (P(None, "a"), P(), P(), P())))
    with opened() as checkpointer:
        restored = checkpointer.restore_latest(target, expected_meta={"run": 1})
    assert (restored.step, restored.source, restored.skipped) == (4, "run", [])
    assert_same(restored.state, state_of(4))
    for name, leaf in restored.state.items():
        assert leaf.sharding == target[name].sharding


def test_few_are_kept_and_the_first_is_shared_whatever_it_was_for(tmp_path, opened):
    with opened(keep_last=2) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, state_of(step), occasion="local")
        checkpointer.wait()
        assert checkpointer.all_steps() == [1]
    assert [p.name for p in local_folders(tmp_path)] == ["4", "5"]


@pytest.mark.parametrize("part", ["blocks.bin", "blocks.json", "meta.json", "manifest.json"])
def test_a_damaged_local_step_is_named_in_one_line_and_the_next_one_is_used(
    saved, opened, tmp_path, caplog, part
):
    for step in ("3", "4"):
        [path] = tmp_path.glob(f"a/*/*/{step}/**/{part}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with opened() as checkpointer:
        restored = checkpointer.restore_latest(like(state_of(0)))
        assert_same(restored.state, state_of(2))
        [line] = warnings(caplog)
        assert part in line and "/4 is damaged" in line and "Continuing from step 2 of" in line
        assert [step for step, _ in restored.skipped] == [4, 3]
        # They are gone, and their numbers can be saved again.
        assert local_folders(tmp_path) == []
        checkpointer.save(3, state_of(30), occasion="local")
    with opened() as checkpointer:
        assert_same(checkpointer.restore_latest(like(state_of(0))).state, state_of(30))


def test_a_shared_step_that_is_newer_or_alone_good_is_used(saved, opened):
    with opened() as checkpointer:
        checkpointer.restore_latest(like(state_of(0)))
        checkpointer.save(5, state_of(5), occasion="period")
        checkpointer.save(6, state_of(6), occasion="local")
        checkpointer.wait()
    with opened("elsewhere") as checkpointer:  # a host that holds nothing
        restored = checkpointer.restore_latest(like(state_of(0)))
    assert restored.step == 5
    assert_same(restored.state, state_of(5))


def test_local_steps_do_not_outlive_the_run_or_follow_a_copy(saved, opened, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with opened(run="copy") as checkpointer:
        assert checkpointer.restore_latest(like(state_of(0))).step == 2
    with opened() as checkpointer:
        assert checkpointer.restore_latest(like(state_of(0))).step == 4
    shutil.rmtree(tmp_path / "run")
    with opened() as checkpointer:  # another run in the same place
        assert checkpointer.restore_latest(like(state_of(0))) is None
        checkpointer.save(1, state_of(1))
    with opened() as checkpointer:
        assert checkpointer.restore_latest(like(state_of(0))).step == 1


def test_a_host_that_was_away_has_nothing_to_say(saved, opened, tmp_path):
    """Steps that a host kept are of a past from which the run has gone another way."""
    with opened("b") as checkpointer:
        assert checkpointer.restore_latest(like(state_of(0))).step == 2
        checkpointer.save(3, state_of(33), occasion="local")
    with opened("a") as checkpointer:
        restored = checkpointer.restore_latest(like(state_of(0)))
    assert restored.step == 2
    assert [p.parent for p in local_folders(tmp_path, "a")] == []


def test_local_steps_alone_are_not_used(saved, opened, tmp_path):
    (tmp_path / "run" / "checkpoints" / "2" / "meta.json").unlink()
    missing = pytest.raises(ValueError, match="2 is damaged: meta.json is missing")
    with opened() as checkpointer, missing:
        checkpointer.restore_latest(like(state_of(0)))


def test_another_run_is_refused_in_the_local_tier_too(saved, opened):
    with opened() as checkpointer, pytest.raises(RunMismatchError, match="/4 belongs to another"):
        checkpointer.restore_latest(like(state_of(0)), expected_meta={"run": 2})


@pytest.mark.parametrize(
    ("grace", "seconds", "shared"), [(None, 1e6, True), (30.0, 1.0, True), (30.0, 60.0, False)]
)
def test_a_signal_saves_locally_first_and_shared_if_the_time_suffices(
    saved, opened, tmp_path, caplog, grace, seconds, shared
):
    with opened(grace_seconds=grace) as checkpointer:
        checkpointer.restore_latest(like(state_of(0)))
        checkpointer._shared_seconds = seconds
        checkpointer.save(7, state_of(7), occasion="signal")
        assert [p.name for p in local_folders(tmp_path)][-1] == "7"  # complete at once
        checkpointer.wait()
        assert checkpointer.all_steps() == ([2, 7] if shared else [2])
        assert checkpointer.lacks(7) is not shared
    assert bool(warnings(caplog)) is not shared
    with opened() as checkpointer:
        assert_same(checkpointer.restore_latest(like(state_of(0))).state, state_of(7))


def test_a_full_local_disk_is_one_warning_and_a_signal_then_saves_shared(
    saved, opened, tmp_path, caplog, monkeypatch
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_tier, "_bytes", full)
    with opened(grace_seconds=1e-9) as checkpointer:
        checkpointer.restore_latest(like(state_of(0)))
        checkpointer.save(5, state_of(5), occasion="local")
        checkpointer.save(6, state_of(6), occasion="local")
        checkpointer.save(7, state_of(7), occasion="signal")
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 7]
    [line] = warnings(caplog)
    assert "the local tier cannot be used (OSError: [Errno 28] No space left" in line
    assert [p.name for p in local_folders(tmp_path)] == ["3", "4"]


def test_a_signal_is_no_error_if_the_local_tier_alone_can_be_written(
    saved, opened, tmp_path, caplog, monkeypatch
):
    def refuse(*arguments, written, barrier):
        written()
        raise OSError(5, "Input/output error")

    with opened() as checkpointer:
        checkpointer.restore_latest(like(state_of(0)))
        monkeypatch.setattr(checkpoint, "commit", refuse)
        checkpointer.save(7, state_of(7), occasion="signal")
        checkpointer.wait()
        assert checkpointer.all_steps() == [2]
    [line] = warnings(caplog)
    assert "could not save" in line and line.endswith("Step 7 is in the local tier.")
    monkeypatch.undo()
    with opened() as checkpointer:
        assert_same(checkpointer.restore_latest(like(state_of(0))).state, state_of(7))
        monkeypatch.setattr(checkpoint, "commit", refuse)
        checkpointer.save(8, state_of(8))
        with pytest.raises(CheckpointSaveError, match="could not save .*/8: OSError"):
            checkpointer.wait()


@pytest.mark.parametrize("directory", ["", "gs://bucket/x"])
def test_a_directory_that_is_no_local_folder_is_refused(directory):
    with pytest.raises(ValueError, match="LocalTier.directory = '.*': give a folder on a disk"):
        LocalTier(directory=directory)


def test_a_disk_that_is_not_there_is_an_error_before_training(tmp_path):
    (tmp_path / "file").touch()
    local = LocalTier(directory=str(tmp_path / "file" / "disk"))
    with pytest.raises(OSError, match="Not a directory: '.*/file/disk"):
        Checkpointer(tmp_path / "checkpoints", local=local)


def test_without_a_local_tier_nothing_of_it_is_written(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_of(1))
        assert not checkpointer.is_due_locally(100) and not checkpointer.lacks(100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


@pytest.mark.multiprocess
def test_two_processes_use_a_local_step_only_if_both_hold_it_undamaged(two_processes, tmp_path):
    script = """
        import glob, logging, os, shutil, sys
        import jax, numpy as np
        logging.basicConfig(level=logging.WARNING)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        index = int(sys.argv[2])
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, index)
        from jax.experimental.multihost_utils import sync_global_devices
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from espalier.trainers.checkpoints.checkpoint import Checkpointer
        from espalier.trainers.checkpoints.local_tier import LocalTier
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
        disk = os.path.join(sys.argv[1], f"disk{index}")

        def opened():
            local = LocalTier(directory=disk, period=1, keep_last=5)
            return Checkpointer(os.path.join(sys.argv[1], "checkpoints"), local=local)

        def state(step, specs=(P("a"), P("b", "a"), P(("a", "b")), P())):
            tree = {}
            for i, spec in enumerate(specs):
                value = np.random.default_rng(10 * step + i).standard_normal((8, 12)).astype("f")
                tree[f"w{i}"] = jax.make_array_from_callback(
                    value.shape, NamedSharding(mesh, spec), lambda index, value=value: value[index]
                )
            return tree

        def restored(step, tier, *specs):
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, *specs)
            )
            with opened() as checkpointer:
                got = checkpointer.restore_latest(like)
                assert got.step == step and tier in str(got.path), got
            same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
            assert all(jax.tree.leaves(same(got.state, state(step, *specs))))

        def local(step):
            return glob.glob(f"{disk}/*/*/{step}/state/blocks.bin")

        with opened() as checkpointer:
            for step, occasion in ((1, "period"), (2, "local"), (3, "local"), (4, "signal")):
                checkpointer.save(step, state(step), occasion=occasion)
            checkpointer.save(5, state(5), occasion="local")
        # Half of w0 to w2, and all of w3.
        assert os.path.getsize(local(5)[0]) == 4 * 8 * 12 * (3 / 2 + 1)
        restored(5, "disk")
        if index == 1:
            shutil.rmtree(os.path.dirname(os.path.dirname(local(5)[0])))
        sync_global_devices("lost")
        restored(4, "disk")
        if index == 0:
            with open(local(4)[0], "r+b") as file:
                file.seek(100)
                byte = file.read(1)[0]
                file.seek(100)
                file.write(bytes([byte ^ 4]))
        sync_global_devices("damaged")
        restored(4, "checkpoints")  # of the shared tier, where the signal saved it too
        # Another layout of the arrays: no process has what it needs.
        with opened() as checkpointer:
            checkpointer.save(6, state(6), occasion="local")
        restored(4, "checkpoints", (P("b"), P("a", "b"), P(("b", "a")), P()))

        # Adapters, whose base all processes read together.
        from espalier.trainers.checkpoints import base_step, step_dir
        kernel, adapter = state(0)["w0"], {"adapter_a": {"b": state(0)["w1"]}}
        with Checkpointer(os.path.join(sys.argv[1], "base")) as checkpointer:
            checkpointer.save(7, {"params": {"mlp": {"kernel": kernel}}})
        params = {"mlp": {"kernel": kernel, **adapter}}
        mask = {"mlp": {"kernel": False, "adapter_a": {"b": True}}}
        sync_global_devices("base")
        base = step_dir.resolve(os.path.join(sys.argv[1], "base"))
        facts = base_step.frozen(base, params, mask, base_step.added({}), use_ema=False)
        for expected in (None, 2, 1):
            tier = LocalTier(directory=f"{disk}.adapters", period=1)
            folder = os.path.join(sys.argv[1], "adapters")
            with Checkpointer(folder, local=tier) as checkpointer:
                got = checkpointer.restore_latest({"params": params})
                assert (got and got.step) == expected, got
                if got is None:
                    for step, occasion in ((1, "period"), (2, "local")):
                        meta = {base_step.META: facts}
                        checkpointer.save(step, {"params": params}, meta=meta, occasion=occasion)
            sync_global_devices("adapters")
            if expected == 2 and index == 1:
                [path] = glob.glob(f"{disk}.adapters/*/*/2/state/blocks.bin")
                with open(path, "r+b") as file:
                    file.truncate(8)
            sync_global_devices("adapters damaged")
        print("fine", index)
    """
    errors = two_processes(script)
    lines = [line for line in errors[0].splitlines() if "Continuing from" in line]
    assert len(lines) == 4, lines
    assert "local step 5 is held by 1 of 2 processes only. Continuing from step 4 of" in lines[0]
    assert "disk0" in lines[1] and "state/blocks.bin does not match its checksum" in lines[1]
    assert "has another mesh's part of w" in lines[2]
    assert "disk1.adapters" in lines[3] and "Continuing from step 1 of" in lines[3]
    assert "Continuing from" not in errors[1]  # one process speaks
    token = json.loads((tmp_path / "checkpoints" / TOKEN).read_text())["token"]
    for i in range(2):
        [folder] = (tmp_path / f"disk{i}").glob("*/*")
        assert folder.name == f"{token}.{i}of2"
