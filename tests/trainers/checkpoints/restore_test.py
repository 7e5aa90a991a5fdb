"""Where a state comes from when the newest step is damaged, and what may be taken of another run's."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.trainers.checkpoints import manifest, step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.initial import InitialCheckpoint
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError
from espalier.trainers.checkpoints.restore import restore_or_initialise, restore_state
from espalier.trainers.checkpoints.restore_params import restore_params
from espalier.trainers.telemetry import marks
from espalier.trainers.telemetry.metrics import Window
from espalier.trainers.train_state import TrainState


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


HUGE = 10**400
WINDOW = {"sums": {}, "newest": {}}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("step", -1, "step = -1 in the place of"),
        ("step", 2**40, "step = 1099511627776 in the place"),
        ("step", "20", "step = '20'"),
        ("step", 19, "is the record of step 19"),
        ("metrics", {"loss": "low"}, "metrics.loss = 'low'"),
        ("metrics", {"loss": HUGE}, "metrics.loss = 10000"),
        ("metrics", [], "metrics and meta are objects"),
        ("more", 1, "is not a record of"),
        ("meta/data_step", -1, "meta.data_step = -1"),
        ("meta/data_step", HUGE, "meta.data_step = 1000"),
        ("meta/data_step", 1.5, "meta.data_step = 1.5"),
        ("meta/skipped", 21, "meta.skipped 21 of 20 steps"),
        ("meta/rollbacks", "1", "meta.rollbacks = '1'"),
        ("meta/learning_rate", HUGE, "meta.learning_rate = 1000"),
        ("meta/positions", {"a": {"rows": -1, "order": ""}}, "meta.positions = "),
        ("meta/initial", "x", "meta.initial = 'x'"),
        ("meta/metrics_file", [[1, -1, 0]], "meta.metrics_file"),
        ("meta/metrics_file", [[1, 2**70, 0]], "meta.metrics_file"),
        ("meta/metrics_file", [[1, 2, 0], [2, 1, 0]], "meta.metrics_file, which has sizes"),
        ("meta/metrics_file", {"a": 1}, "meta.metrics_file"),
        ("meta/window", [1], "meta.window, which is not a window"),
        ("meta/window", {**WINDOW, "newest": {"loss": "x"}}, "meta.window"),
        ("meta/window", {**WINDOW, "newest": {"loss": HUGE}}, "meta.window"),
        ("meta/window", {**WINDOW, "sums": {"a": [["S999999999999", [1]], ["int32", [1]]]}}, "window"),
        ("meta/window", {**WINDOW, "sums": {"a": [["int32", 2**40], ["int32", 1]]}}, "window"),
        ("meta/window", {**WINDOW, "sums": {"a": [["float32", "1"], ["float32", 1]]}}, "window"),
        ("meta/window", {**WINDOW, "sums": {"a": [["float32", [1, 2]], ["float32", 1]]}}, "window"),
        ("meta/window", {**WINDOW, "sums": {"a": [["float32", 1]]}}, "window"),
    ],
)  # fmt: skip
def test_a_forged_record_is_one_clear_error(other_run, key, value, problem):
    step = step_dir.resolve(other_run)
    record = step_dir.read_record(step)
    parent, _, name = key.rpartition("/")
    (record[parent] if parent else record)[name] = value
    step_dir.write_record(step, record)
    recorded = step_dir.read_manifest(step)
    files = {**recorded.files, step_dir.META: manifest.file_checksum(step / step_dir.META)}
    (step / step_dir.MANIFEST).write_bytes(manifest.Manifest(recorded.arrays, files).to_bytes())
    with pytest.raises(DamagedCheckpointError, match=f"20 is damaged: meta.json.*{problem}"):
        restore_state(step, shapes(make_state(0)))
    with Checkpointer(other_run / "checkpoints", keep_best=1) as checkpointer:
        assert checkpointer.restore_latest(shapes(make_state(0))).step == 10


def test_marks_beyond_the_end_of_a_file_are_not_read(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b"x")
    first = marks.EMPTY.after(1, b"x")
    assert marks.last_good(str(path), [first, marks.Mark(2, 2**62, 0)]) == first


def test_a_metric_of_another_shape_than_in_the_checkpoint_is_one_clear_error():
    saved = Window()
    saved.add({"loss": (np.ones(3), np.ones(3))})
    restored = Window()
    restored.restore(saved.state())
    with pytest.raises(ValueError, match=r"sums of 'loss' in the shape \[3\], this run in \[\]"):
        restored.add({"loss": (np.ones(()), np.ones(()))})
