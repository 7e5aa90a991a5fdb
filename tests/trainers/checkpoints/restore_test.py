"""Where a state comes from when the newest step is damaged, and what may be taken of another run's."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.checkpoints.checkpoint import Checkpointer
from trainers.checkpoints.initial import InitialCheckpoint
from trainers.checkpoints.manifest import DamagedCheckpointError
from trainers.checkpoints.restore import restore_or_initialise, restore_state
from trainers.checkpoints.restore_params import restore_params
from trainers.train_state import TrainState


def make_state(value, *, name="w", averaged=True):
    array = lambda x: {name: jnp.full((4, 8), x, jnp.float32)}  # noqa: E731
    return TrainState(
        step=jnp.asarray(value, jnp.int32),
        params=array(value),
        opt_state={"mu": array(-value)},
        ema_params=array(value / 2) if averaged else None,
    )


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def other_run(tmp_path):
    """Another run with good steps 10 and 20."""
    path = tmp_path / "other"
    with Checkpointer(path / "checkpoints") as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, make_state(step), meta={"step": step})
    return path


@pytest.fixture
def start(tmp_path):
    """`restore_or_initialise` of a new run whose parameters are 1."""

    def call(path, fresh=None, **options):
        fresh = make_state(1) if fresh is None else fresh
        with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
            return restore_or_initialise(
                checkpointer,
                shapes(fresh),
                lambda: fresh,
                initial=InitialCheckpoint(path=path, **options),
            )

    return call


def flip_bit(run, step):
    """Damages an array of a step; its manifest and record stay good."""
    folder = run / "checkpoints" / str(step) / "state"
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def files_of(run):
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


READERS = {
    "parameters": lambda path, start: restore_params(path, shapes(make_state(0).params)),
    "state": lambda path, start: restore_state(path, shapes(make_state(0))).state.params,
    "initial parameters": lambda path, start: start(path).state.params,
    "initial state": lambda path, start: start(path, scope="state").state.params,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_newest_step_is_passed_over_and_left_alone(other_run, start, caplog, reader):
    flip_bit(other_run, 20)
    before = files_of(other_run)
    for path in (other_run, other_run / "checkpoints"):
        with caplog.at_level(logging.WARNING):
            assert_same(READERS[reader](path, start), make_state(10).params)
        assert "checkpoints/20 is damaged" in caplog.text and "Reading step 10" in caplog.text
        caplog.clear()
    assert files_of(other_run) == before


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_step_that_is_named_is_an_error(other_run, start, reader):
    flip_bit(other_run, 20)
    with pytest.raises(DamagedCheckpointError, match="checkpoints/20 is damaged"):
        READERS[reader](other_run / "checkpoints" / "20", start)


def test_the_newest_error_is_raised_when_no_step_is_good(other_run, start):
    flip_bit(other_run, 20)
    flip_bit(other_run, 10)
    with pytest.raises(DamagedCheckpointError, match="checkpoints/20 is damaged"):
        start(other_run)


def test_parameters_and_their_record_are_of_one_step(other_run, start):
    flip_bit(other_run, 20)
    found = start(other_run)
    assert found.meta == {"step": 10} and found.path.name == "10" and found.step == 0


# What may be taken of an initial checkpoint.


def test_initial_parameters_may_be_assigned(other_run, start):
    found = start(other_run, make_state(1, name="v"), assignment=[("v", "w")])
    assert_same(found.state.params["v"], make_state(20).params["w"])
    kept = start(other_run, assignment=[("w", None)], strict=False)
    assert_same(kept.state.params, make_state(1).params)


def test_initial_parameters_may_be_incomplete(other_run, start):
    fresh = make_state(1, name="v")
    found = start(other_run, fresh, strict=False)
    assert found.source == "initial"
    assert_same(found.state.params, fresh.params)
    assert_same(found.state.opt_state, fresh.opt_state)


def test_averaged_parameters_may_be_taken(other_run, start):
    found = start(other_run, use_ema=True).state
    assert_same(found.params, make_state(10).params)  # the average of step 20
    assert_same(found.ema_params, found.params)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"assignment": [("w", None)]}, "so InitialCheckpoint.assignment would"),
        ({"strict": False}, "so InitialCheckpoint.strict = False would"),
        ({"use_ema": True}, "so InitialCheckpoint.use_ema would"),
        (
            {"strict": False, "use_ema": True},
            "InitialCheckpoint.strict = False, InitialCheckpoint.use_ema would",
        ),
    ],
)
def test_options_for_parameters_are_refused_with_a_whole_state(other_run, start, options, named):
    with pytest.raises(ValueError, match=f"INITIAL_SCOPE = 'state'.*{named}"):
        start(other_run, scope="state", **options)
