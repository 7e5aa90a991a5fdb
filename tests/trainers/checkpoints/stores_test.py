"""Checkpoints in object stores: the faults of local ones, and those of stores."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.common.storage import paths
from espalier.launch.environment import ROOT
from espalier.trainers.checkpoints import step_dir, stream_checkpoint
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.commit import CheckpointSaveError
from espalier.trainers.checkpoints.local_tier import LocalTier
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError
from espalier.trainers.checkpoints.restore import restore_state
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint
from tests.faults import stores
from tests.trainers.checkpoints import saver


def state(step):
    params = {"a": jnp.arange(12.0).reshape(3, 4) + step, "b": jnp.full(5, step, jnp.bfloat16)}
    return {"params": params, "step": jnp.array(step)}


ABSTRACT = jax.eval_shape(lambda: state(0))


def check(restored, step):
    assert restored.step == step
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(step))


@pytest.fixture
def saved(store):
    """A run with the steps 1 and 2."""
    directory = f"{store.address}/run/checkpoints"
    with Checkpointer(directory, keep_last=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), meta={"x": 1}, metrics={"loss": step})
    return directory


def data_file(directory, step):
    return next(
        f"{directory}/{step}/{n}" for n in paths.entries(f"{directory}/{step}") if "/d/" in n
    )


def test_steps_are_saved_verified_kept_and_restored(store, saved):
    check(restore_state(f"{store.address}/run", ABSTRACT), 2)
    with Checkpointer(saved, keep_last=2) as checkpointer:
        assert checkpointer.all_steps() == [1, 2]
        checkpointer.save(3, state(3))
    assert paths.names(saved) == ["2", "3"]  # the oldest is deleted with all its objects
    assert not paths.exists(f"{saved}/3/incomplete")


def test_a_damaged_and_a_missing_object_are_named_and_the_step_before_is_used(store, saved):
    address = data_file(saved, 2)
    content = bytearray(paths.read(address))
    content[len(content) // 2] ^= 1
    paths.write(address, bytes(content))
    name = address.removeprefix(f"{saved}/2/")
    with pytest.raises(DamagedCheckpointError, match=f"{name} does not match its checksum"):
        restore_state(f"{saved}/2", ABSTRACT)
    paths.delete(address)
    with pytest.raises(DamagedCheckpointError, match=f"{name} is missing"):
        restore_state(f"{saved}/2", ABSTRACT)
    with Checkpointer(saved) as checkpointer:
        check(checkpointer.restore_latest(ABSTRACT), 1)
    assert paths.names(saved) == ["1", "2.aside"]


def test_a_run_in_a_store_records_its_reference_there(store, saved, tmp_path, monkeypatch):
    path, model_dir = f"{store.address}/run", f"{store.address}/mine"
    reference = FrozenCheckpoint(macro="REFERENCE", path=path, model_dir=model_dir)
    step = reference.resolve()
    assert step.step == f"{saved}/2"
    recorded = json.loads(paths.read(f"{model_dir}/reference.json"))
    assert recorded["reference"] == path and recorded["step"] == step.step
    with Checkpointer(saved, keep_last=2) as checkpointer:
        checkpointer.save(3, state(3))
    monkeypatch.chdir(tmp_path)
    assert reference.resolve(record=False) == step


def test_an_older_record_of_a_reference_in_a_store_is_that_reference(store, saved, tmp_path):
    path = f"{store.address}/run"
    reference = FrozenCheckpoint(macro="REFERENCE", path=path, model_dir=str(tmp_path))
    step, file = reference.resolve(), tmp_path / "reference.json"
    older = {**json.loads(file.read_text()), "reference": os.path.abspath(path)}
    assert "://" not in older["reference"]
    file.write_text(json.dumps(older))
    assert reference.resolve() == step


def test_a_half_written_step_is_not_used_and_is_removed(store, saved):
    paths.write(f"{saved}/3/incomplete", b"")
    paths.write(f"{saved}/3/state/d/x", b"half")
    check(restore_state(f"{store.address}/run", ABSTRACT), 2)
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.all_steps() == [1, 2]
    assert paths.names(saved) == ["1", "2"]


def test_kills_at_random_requests_of_saves(store, tmp_path):
    """Each start goes on from the last committed step or a newer one, and the end is that of a run without kills."""
    directory, plan, choice = (
        f"{store.address}/run/checkpoints",
        tmp_path / "plan",
        random.Random(0),
    )
    store.fault = stores.Killer(plan)
    # A save changes about 20 objects.
    planned = [[choice.randrange(2, 45), choice.random() < 0.5] for _ in range(3)]
    words = [directory, "6", str(plan), json.dumps(planned)]
    command = [sys.executable, "-m", "tests.trainers.checkpoints.saver", *words]
    variables = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    starts = [re.findall(r"(\w+) (-?\d+)", part) for part in done.stdout.split("start\n")[1:]]
    committed = 0
    for number, lines in enumerate(starts):
        kinds = dict(lines)
        if "from" in kinds:
            assert committed <= int(kinds["from"]) <= committed + 1, done.stdout
        committed = int(kinds.get("saved", kinds.get("from", committed)))
        killed = number < len(planned) and int(kinds["ended"]) == -signal.SIGKILL
        assert killed or kinds["ended"] == "0", done
    assert done.stdout.count("ended -9") >= 2 and "damaged" not in done.stdout + done.stderr
    restored = restore_state(f"{store.address}/run", jax.eval_shape(lambda: saver.state(0)))
    assert restored.step == 6
    jax.tree.map(np.testing.assert_array_equal, restored.state, saver.state(6))


def test_a_local_tier_beside_a_store(store, saved, tmp_path):
    """The newest good step of both tiers is used: the local one, and if it is damaged, that of the store."""
    tier = LocalTier(directory=str(tmp_path / "disk"), period=1)
    with Checkpointer(saved, local=tier) as checkpointer:
        check(checkpointer.restore_latest(ABSTRACT), 2)
        checkpointer.save(3, state(3), meta={"x": 1}, occasion="local")
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]
    with Checkpointer(saved, local=tier) as checkpointer:
        check(checkpointer.restore_latest(ABSTRACT), 3)
    (blocks,) = tmp_path.glob("disk/*/*/3/**/blocks.bin")
    blocks.write_bytes(b"")
    with Checkpointer(saved, local=tier) as checkpointer:
        check(checkpointer.restore_latest(ABSTRACT), 2)


def test_a_store_that_fails_now_and_then_and_is_slow_does_no_harm(store, saved):
    numbers, lock, failed = itertools.count(1), threading.Lock(), []
    # The client of Google Cloud Storage waits longer after each failure.
    every = 15 if store.address.startswith("gs:") else 7

    def fault(method, path):
        with lock:
            number = next(numbers)
        if number % every:
            return 0.01
        failed.append(path)
        return 503

    store.fault = fault
    with Checkpointer(saved) as checkpointer:
        checkpointer.save(3, state(3))
    check(restore_state(f"{store.address}/run", ABSTRACT), 3)
    assert len(failed) >= 2


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_that_refuses_to_write_is_an_error_and_the_steps_before_stay(store, saved):
    store.fault = lambda method, path: 403 if method in ("PUT", "POST") else None
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(CheckpointSaveError, match="step 2 is good"):
            checkpointer.save(3, state(3))
            checkpointer.wait()
        store.fault = None
    check(restore_state(f"{store.address}/run", ABSTRACT), 2)


def test_arrays_that_are_computed_while_they_are_written(store):
    values = np.arange(24, dtype=np.float32).reshape(6, 4)

    def blocks():
        for row in range(0, 6, 2):
            yield (row, 0), values[row : row + 2]

    array = stream_checkpoint.StreamedArray((6, 4), np.dtype(np.float32), (2, 4), blocks)
    step = stream_checkpoint.save(f"{store.address}/run/checkpoints", {"params/w": array})
    restored = restore_state(step, {"params": {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}})
    np.testing.assert_array_equal(restored.state["params"]["w"], values)
    assert step_dir.read_record(step)["step"] == 0
