"""The loop on least squares: what it logs, when it calls, and what it does when a step goes wrong."""

import dataclasses
import errno
import glob
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from espalier.trainers import partitioning
from espalier.trainers.anomaly import STATISTICS, Anomaly, AnomalyRecords
from espalier.trainers.batches import Prefetcher, global_batch
from espalier.trainers.checkpoints import checkpoint, step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.restore import Restored, restore_state
from espalier.trainers.evaluate import Evaluation
from espalier.trainers.hooks import Hook, HookInterruptedError
from espalier.trainers.loop import AnomalousStepError, Loop, Outputs, Schedule
from espalier.trainers.objectives.base import LossOut
from espalier.trainers.optim.averages import MovingAverage
from espalier.trainers.signals import StopRequest
from espalier.trainers.step import make_train_step
from espalier.trainers.telemetry.goodput import Goodput
from espalier.trainers.telemetry.metric_writers import measures_time
from espalier.trainers.telemetry.profiler import ProfilerWindow
from espalier.trainers.train_state import TrainState

W = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.0]], np.float32)
MESH = partitioning.make_mesh(devices=jax.devices()[:1])
REPLICATED = jax.sharding.NamedSharding(MESH, P())


class Rows:
    """Batches of least squares by step; those in `bad` are poisoned, those in `skipped` left out."""

    batch_size, length, fingerprint = 8, 1, "rows"
    source_names = ("even", "odd")

    def __init__(self, bad=None, skipped=()):
        self.bad, self.skipped = bad or {}, skipped

    def batch(self, step, lo, hi):
        step = [i for i in range(step + len(self.skipped) + 1) if i not in self.skipped][step]
        rng = np.random.default_rng(step)
        x = rng.normal(size=(8, 3)).astype(np.float32)
        weight = rng.integers(1, 4, 8).astype(np.float32)
        y = (x @ W + rng.normal(size=(8, 2))).astype(np.float32) + self.bad.get(step, 0.0)
        return {"x": x[lo:hi], "y": y[lo:hi], "weight": weight[lo:hi]}

    def documents(self, step, lo, hi):
        return [{"source": self.source_names[row % 2], "row": [step, row]} for row in range(lo, hi)]

    def summary(self):
        return {}


def loss_fn(params, batch, rng):
    del rng
    error_B = ((batch["x"] @ params["w"] - batch["y"]) ** 2).sum(-1) * batch["weight"]
    by_source = error_B.reshape(-1, 2).sum(0), batch["weight"].reshape(-1, 2).sum(0)
    total, weight = error_B.sum(), batch["weight"].sum()
    metrics = {"loss": (total, weight), "source_loss": by_source}
    return LossOut(sum=total, weight=weight, metrics=metrics)


class Recorder:
    """Keeps what is written."""

    def __init__(self):
        self.rows = []

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def having(self, name):
        return [(step, values[name]) for step, values in self.rows if name in values]


class Never:
    def reached(self, step):
        return False


class Later(Never):
    def requested(self, batch):
        return False


# Compiled once for each policy; the loops of this file share them.
STEPS = {}


def train_step(anomaly, ema):
    if (anomaly, ema) not in STEPS:
        optimizer = optax.adamw(0.05)
        extensions = [*([MovingAverage(0.9)] if ema else []), *([anomaly] if anomaly else [])]
        step = make_train_step(loss_fn=loss_fn, optimizer=optimizer, extensions=extensions)
        STEPS[anomaly, ema] = jax.jit(step, donate_argnums=0), optimizer
    return STEPS[anomaly, ema]


def make_loop(
    path, *, stream=None, total=10, anomaly=None, ema=False, checkpointer=None, **changes
):
    step, optimizer = train_step(anomaly, ema)
    params = {"w": jnp.zeros((3, 2))}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params={"w": jnp.zeros((3, 2))} if ema else None,
        variables={STATISTICS: anomaly.init()} if anomaly else {},
    )
    state = jax.device_put(state, REPLICATED)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=REPLICATED), state
    )
    first, counts = 0, {"data_step": 0, "skipped": 0}
    restored = checkpointer.restore_latest(abstract) if checkpointer is not None else None
    if restored is not None:
        state, first, counts = restored.state, restored.step, restored.meta
    stream = stream or Rows()
    settings = {
        "total_steps": total,
        "train_step": step,
        "stream": stream,
        "feed": Prefetcher(stream, REPLICATED),
        "folder": path,
        "writer": Recorder(),
        "goodput": Goodput(),
        "checkpointer": checkpointer,
        "checkpoint_period": 100,
        "log_period": 3,
        "row_metrics": lambda updates, batches, rate: {"rate": rate},
        "hooks": (),
        "anomaly": anomaly,
        "stop": Never(),
        "abstract_state": abstract,
    }
    settings |= changes

    def group(kind):
        names = [field.name for field in dataclasses.fields(kind) if field.name in settings]
        return kind(**{name: settings.pop(name) for name in names})

    meta = {
        **counts,
        "hooks_left_out": settings.pop("hooks_left_out", False),
    }
    source = settings.pop("source", "run")
    start = Restored(state=state, step=first, meta=meta, source=source)
    return Loop(start=start, schedule=group(Schedule), outputs=group(Outputs), **settings)


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", keep_last=None) as checkpointer:
        yield checkpointer


def by_hand(stream, steps):
    """(loss, weight, sum and weight by source) before each update, and the final parameters."""
    optimizer = optax.adamw(0.05)
    params = {"w": jnp.zeros((3, 2))}
    state, found = optimizer.init(params), []
    for index in range(steps):
        batch = stream.batch(index, 0, 8)

        def mean(p, batch=batch):
            out = loss_fn(p, batch, None)
            return out.sum / out.weight, out.metrics

        grads, metrics = jax.grad(mean, has_aux=True)(params)
        found.append(jax.device_get(metrics))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return found, params


def assert_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# ---- What is logged.


def test_rows_are_sums_over_their_steps_and_no_step_is_lost(tmp_path):
    loop = make_loop(tmp_path)
    state = loop.run()
    found, params = by_hand(Rows(), 10)
    np.testing.assert_allclose(state.params["w"], params["w"], rtol=1e-5)
    assert [step for step, _ in loop.outputs.writer.having("loss")] == [1, 3, 6, 9, 10]
    windows = [slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    for (_, row), window in zip(loop.outputs.writer.rows, windows, strict=True):
        pairs = [m["loss"] for m in found[window]]
        want = sum(p[0] for p in pairs) / sum(p[1] for p in pairs)
        assert row["loss"] == pytest.approx(want, rel=1e-5)
        for index, name in enumerate(("even", "odd")):
            pairs = [m["source_loss"] for m in found[window]]
            want = sum(p[0][index] for p in pairs) / sum(p[1][index] for p in pairs)
            assert row[f"source_loss/{name}"] == pytest.approx(want, rel=1e-5)
    assert loop.outputs.writer.having("rate")[-1][1] > 0
    assert all(row["time/goodput"] <= 1 for _, row in loop.outputs.writer.rows)


def test_hooks_run_at_the_start_of_a_run_if_they_ask_and_not_when_it_goes_on(tmp_path):
    class AtStart(Hook):
        every, at_start = 4, True

        def __init__(self):
            self.seen = []

        def __call__(self, step, state, metrics):
            self.seen.append((step, int(state.step)))
            return {"hook/step": step}

    hook = AtStart()
    loop = make_loop(tmp_path, hooks=(hook,), total=5, source="scratch")
    loop.run()
    assert hook.seen == [(0, 0), (4, 4), (5, 5)]
    assert loop.outputs.writer.having("hook/step") == [(0, 0), (4, 4), (5, 5)]
    hook = AtStart()
    make_loop(tmp_path, hooks=(hook,), total=5).run()
    assert hook.seen == [(4, 4), (5, 5)]


def test_hooks_run_at_further_steps_if_they_name_some(tmp_path):
    class Often(Hook):
        every, at_start, also_at = 4, True, (1, 2, 6)

        def __init__(self):
            self.seen = []

        def __call__(self, step, state, metrics):
            self.seen.append((step, int(state.step)))

    hook = Often()
    make_loop(tmp_path, hooks=(hook,), total=9, source="scratch").run()
    assert hook.seen == [(step, step) for step in (0, 1, 2, 4, 6, 8, 9)]


def test_hooks_keep_their_cadence_see_the_state_of_their_step_and_run_last(tmp_path, saver):
    seen = []

    class Recording(Hook):
        every = 4

        def __call__(self, step, state, metrics):
            seen.append((step, int(state.step), metrics["loss"]))
            return {"hooked": step}

    loop = make_loop(tmp_path, hooks=(Recording(),), checkpointer=saver, checkpoint_period=8)
    loop.run()
    losses = dict(loop.outputs.writer.having("loss"))
    # With the newest row of metrics: those of steps 3, 6 and 10.
    assert seen == [(4, 4, losses[3]), (8, 8, losses[6]), (10, 10, losses[10])]
    assert loop.outputs.writer.having("hooked") == [(4, 4), (8, 8), (10, 10)]
    assert saver.all_steps() == [8, 10]
    restored = saver.restore_latest(loop.abstract_state)
    assert restored.metrics["hooked"] == 10  # so that the best step can be that of a hook's metric
    assert restored.metrics["loss"] == losses[10]


def test_evaluation_judges_the_averaged_parameters(tmp_path):
    class Split(Rows):
        name, num_steps, bytes_per_token = "held_out", 3, 0.0

    evaluation = Evaluation(
        every=5,
        eval_step=jax.jit(lambda params, batch, _: loss_fn(params, batch, None).metrics),
        streams=(Split(),),
        sharding=REPLICATED,
    )
    loop = make_loop(tmp_path, ema=True, total=5, hooks=(evaluation,))
    state = loop.run()
    average = np.zeros((3, 2))
    for steps in range(1, 6):
        average = 0.9 * average + 0.1 * np.asarray(by_hand(Rows(), steps)[1]["w"], np.float64)
    np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-5, atol=1e-7)
    outs = [loss_fn({"w": average}, Rows().batch(i, 0, 8), None) for i in range(3)]
    want = float(sum(o.sum for o in outs) / sum(o.weight for o in outs))
    assert evaluation.results[5]["eval/held_out/loss"] == pytest.approx(want, rel=1e-5)
    assert loop.outputs.writer.having("eval/held_out/loss") == [
        (5, evaluation.results[5]["eval/held_out/loss"])
    ]


def test_a_profile_is_left_behind(tmp_path):
    window = ProfilerWindow(first_step=2, num_steps=2, directory=str(tmp_path / "profile"))
    make_loop(tmp_path, total=6, profiler=window).run()
    assert glob.glob(str(tmp_path / "profile" / "**" / "*.xplane.pb"), recursive=True)


def test_an_error_in_the_data_reaches_the_caller(tmp_path):
    class Broken(Rows):
        def batch(self, step, lo, hi):
            if step == 4:
                raise OSError("disk gone")
            return super().batch(step, lo, hi)

    loop = make_loop(tmp_path, stream=Broken())
    with pytest.raises(OSError, match="disk gone"):
        loop.run()
    assert loop.step == 4


# ---- Bad steps.


def test_stop_saves_the_batch_and_its_documents_and_applies_nothing(tmp_path, saver):
    stream = Rows({5: np.nan})
    loop = make_loop(tmp_path, stream=stream, anomaly=Anomaly(), checkpointer=saver)
    with pytest.raises(AnomalousStepError) as caught:
        loop.run()
    for part in ("Step 6 (batch 5)", "loss nan", "batch_5.json", "Anomaly.action", "learning rate"):
        assert part in str(caught.value)
    record = json.loads((tmp_path / "anomalies" / "batch_5.json").read_text())
    assert (record["step"], record["data_step"]) == (6, 5)
    assert record["documents"] == stream.documents(5, 0, 8)
    saved = np.load(tmp_path / "anomalies" / "batch_5.npz")
    assert_bits(dict(saved), stream.batch(5, 0, 8))
    assert loop.outputs.writer.having("anomaly")[-1] == (6, 1.0)
    assert np.isfinite(loop.state.params["w"]).all()


def test_only_the_newest_bad_batches_are_stored_whole(tmp_path):
    """A run that skips thousands of updates does not fill its disk."""
    records, fetched = AnomalyRecords(tmp_path, Rows()), {"loss": (np.float32(1), np.float32(1))}
    for step in range(95, 130):
        records.record(step + 1, step, fetched, "skip")
    numbers = [sorted(int(p.stem[6:]) for p in tmp_path.rglob(f"*.{x}")) for x in ("npz", "json")]
    assert numbers == [[*range(98, 130)], [*range(95, 130)]]


def test_skip_drops_the_update_counts_it_and_goes_on(tmp_path):
    loop = make_loop(tmp_path, stream=Rows({5: np.nan, 9: np.inf}), anomaly=Anomaly(action="skip"))
    state = loop.run()
    # Both bad steps are logged, and the last row, due at a bad step, is still written.
    assert [row for row in loop.outputs.writer.having("anomaly") if row[1]] == [(6, 1.0), (10, 1.0)]
    assert [step for step, _ in loop.outputs.writer.having("loss")] == [1, 3, 6, 9]
    assert loop.outputs.writer.rows[-1][0] == 10
    # The row of step 6 averages steps 4 and 5.
    found, _ = by_hand(Rows(), 5)
    pairs = [found[i]["loss"] for i in (3, 4)]
    want = sum(p[0] for p in pairs) / sum(p[1] for p in pairs)
    assert dict(loop.outputs.writer.having("loss"))[6] == pytest.approx(want, rel=1e-5)
    assert int(state.step) == 10
    assert np.isfinite(state.params["w"]).all()


def test_host_metrics_get_the_count_of_the_optimiser_also_in_a_continued_run(tmp_path, saver):
    for total in (6, 12):
        loop = make_loop(
            tmp_path,
            stream=Rows({1: np.nan, 4: np.nan, 8: np.nan}),
            total=total,
            anomaly=Anomaly(action="skip"),
            checkpointer=saver,
            log_period=1,
            row_metrics=lambda updates, batches, rate: {"updates": updates},
        )
        state = loop.run()
        count = int(optax.tree.get(state.opt_state, "count"))
        assert loop.outputs.writer.having("updates")[-1] == (total, count)
    assert count == 9
    assert loop.outputs.writer.having("updates") == [
        (7, 5),
        (8, 6),
        (9, 6),
        (10, 7),
        (11, 8),
        (12, 9),
    ]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    policy = Anomaly(action="skip", max_skips=2)
    stream = Rows({3: np.nan, 4: np.nan, 6: np.nan, 7: np.nan, 8: np.nan})
    loop = make_loop(tmp_path, stream=stream, anomaly=policy)
    with pytest.raises(AnomalousStepError, match=r"Step 9 \(batch 8\).*3 bad steps in a row"):
        loop.run()


@pytest.mark.parametrize("saves", [4, 6, 100])
def test_rollback_skips_the_window_and_equals_a_clean_run_without_it(tmp_path, saver, saves):
    policy = Anomaly(action="rollback")
    loop = make_loop(
        tmp_path,
        stream=Rows({7: np.nan}),
        total=12,
        anomaly=policy,
        checkpointer=saver,
        checkpoint_period=saves,
    )
    state = loop.run()
    back_to = saves if saves < 8 else 0  # without a checkpoint yet, to the start
    skipped = tuple(range(back_to, 8))
    clean = make_loop(tmp_path, stream=Rows(skipped=skipped), total=12, anomaly=policy,
                      checkpointer=Checkpointer(tmp_path / "clean"))  # fmt: skip
    assert_bits(state, clean.run())
    assert loop.outputs.writer.having("rollback_to") == [(8, back_to)]
    assert loop.outputs.writer.having("skipped_batches") == [(8, len(skipped))]
    assert loop.data_step == 12 + len(skipped)
    # The rows after the return are those of the clean run.
    again = {4: 3, 6: 2, 100: 5}[saves]  # of steps 6, 9 and 12, without the first, or with 1 and 3
    assert (
        loop.outputs.writer.having("loss")[-again:] == clean.outputs.writer.having("loss")[-again:]
    )
    record = json.loads((tmp_path / "anomalies" / "batch_7.json").read_text())
    assert record["data_step"] == 7
    lines = (tmp_path / "anomalies" / "batch_7_skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"data_step": batch, "documents": Rows().documents(batch, 0, 8)} for batch in skipped
    ]
    # A run that goes on from a later checkpoint knows which batch is next.
    assert saver.restore_latest(loop.abstract_state).meta["data_step"] == 12 + len(skipped)


def test_rollback_at_a_step_that_saves_saves_nothing_bad(tmp_path, saver):
    loop = make_loop(
        tmp_path,
        stream=Rows({7: np.nan}),
        anomaly=Anomaly(action="rollback"),
        checkpointer=saver,
        checkpoint_period=4,
    )
    loop.run()
    assert loop.outputs.writer.having("rollback_to") == [(8, 4)]
    assert loop.data_step == 10 + 4
    assert saver.all_steps() == [0, 4, 8, 10]
    assert saver.restore_latest(loop.abstract_state).meta["data_step"] == 14


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_no_state_after_a_non_finite_update_is_saved(tmp_path, saver, action):
    """Of finite loss and gradient, as an optimiser's division may make it."""
    policy = Anomaly(action=action)
    compiled, _ = train_step(policy, False)
    broken_once = iter([True])

    def step(state, batch):
        state, metrics = compiled(state, batch)
        if int(state.step) == 4 and next(broken_once, False):
            state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            metrics = {**metrics, "update_norm": (jnp.asarray(jnp.nan), metrics["update_norm"][1])}
        return state, metrics

    settings = {"anomaly": policy, "checkpointer": saver, "checkpoint_period": 2, "total": 8}
    loop = make_loop(tmp_path, train_step=step, **settings)
    if action == "rollback":
        state = loop.run()
        assert loop.outputs.writer.having("rollback_to") == [(4, 2)]
        clean = make_loop(tmp_path, stream=Rows(skipped=(2, 3)), total=8, anomaly=policy,
                          checkpointer=Checkpointer(tmp_path / "clean"))  # fmt: skip
        assert_bits(state, clean.run())
    else:
        with pytest.raises(
            AnomalousStepError, match="Its update was not finite, and no later state is saved"
        ):
            loop.run()
        saver.wait()
        assert saver.all_steps() == [2]
    for saved in saver.all_steps():
        kept = restore_state(saver.step_path(saved), loop.abstract_state).state
        assert np.isfinite(kept.params["w"]).all()


def test_a_spike_counts_as_bad(tmp_path, saver):
    policy = Anomaly(action="rollback", spike_sigmas=6.0, window=4)
    loop = make_loop(tmp_path, stream=Rows({8: 1e3}), anomaly=policy, checkpointer=saver)
    loop.run()
    assert loop.outputs.writer.having("rollback_to") == [(9, 0)]


def test_too_many_rollbacks_end_the_run(tmp_path, saver):
    policy = Anomaly(action="rollback", max_skips=2)
    stream = Rows({step: np.nan for step in range(5, 50)})
    loop = make_loop(tmp_path, stream=stream, anomaly=policy, checkpointer=saver)
    with pytest.raises(AnomalousStepError, match="2 rollbacks"):
        loop.run()
    # Batch 5 at step 6, and the two after it at step 1: each left its own record.
    names = sorted(path.name for path in (tmp_path / "anomalies").glob("*.json"))
    assert names == ["batch_5.json", "batch_6.json", "batch_7.json"]


def test_rollback_needs_a_checkpointer(tmp_path):
    with pytest.raises(ValueError, match="needs a checkpointer"):
        make_loop(tmp_path, anomaly=Anomaly(action="rollback"))


# ---- Stopping and going on.


def test_sigterm_saves_and_a_restart_equals_the_uninterrupted_run(tmp_path, saver):
    class Terminate(Hook):
        every = 5

        def __call__(self, step, state, metrics):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = make_loop(tmp_path, total=12)
    want = whole.run()
    with StopRequest() as stop:
        first = make_loop(tmp_path, total=12, checkpointer=saver, stop=stop, hooks=(Terminate(),))
        first.run()
    assert first.interrupted and first.step == 6  # the step after the signal is the last
    assert saver.all_steps() == [6]
    second = make_loop(tmp_path, total=12, checkpointer=saver)
    assert second.step == second.data_step == 6
    assert_bits(second.run(), want)
    rows = [*first.outputs.writer.having("loss"), *second.outputs.writer.having("loss")]
    assert rows == whole.outputs.writer.having("loss")


def timeless(rows):
    return [(s, {k: v for k, v in row.items() if not measures_time(k)}) for s, row in rows]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_rows_after_a_kill_at_any_update_are_those_of_the_whole_run(tmp_path, saver, action):
    settings = {
        "stream": Rows({4: np.nan, 7: np.nan}),
        "total": 10,
        "anomaly": Anomaly(action=action),
        "row_metrics": lambda updates, batches, rate: {"updates": updates},
        "checkpoint_period": 1,
    }
    whole = make_loop(tmp_path, checkpointer=saver, **settings)
    want = whole.run()

    def metrics(path):
        return step_dir.read_record(path)["metrics"]

    for step in (1, 4, 5, 7, 8):
        folder = tmp_path / f"from_{step}"
        shutil.copytree(saver.step_path(step), folder / str(step))
        with Checkpointer(folder, keep_last=None) as own:
            again = make_loop(tmp_path, checkpointer=own, **settings)
            assert again.step == step
            assert_bits(again.run(), want)
            later = [(s, row) for s, row in whole.outputs.writer.rows if s > step]
            assert timeless(again.outputs.writer.rows) == timeless(later)
            for s in range(step + 1, 11):
                assert metrics(own.step_path(s)) == metrics(saver.step_path(s))


def test_rows_of_a_run_stopped_between_two_of_them_are_those_of_the_whole_run(tmp_path, saver):
    class AtFive:
        def reached(self, step):
            return step == 5

    rates = {"row_metrics": lambda *counts: {}}
    whole = make_loop(tmp_path, **rates)
    whole.run()
    first = make_loop(tmp_path, checkpointer=saver, stop=AtFive(), **rates)
    first.run()
    second = make_loop(tmp_path, checkpointer=saver, **rates)
    second.run()
    # The last look of the stop is no part of what the checkpoint confirms.
    rows = [*first.outputs.writer.rows[:-1], *second.outputs.writer.rows]
    assert timeless(rows) == timeless(whole.outputs.writer.rows)


def test_a_checkpoint_without_sums_goes_on(tmp_path, saver):
    make_loop(tmp_path, checkpointer=saver, checkpoint_period=4, total=4).run()
    old = make_loop(tmp_path, checkpointer=saver)
    restored = saver.restore_latest(old.abstract_state)
    meta = {name: restored.meta[name] for name in ("data_step", "skipped", "hooks_left_out")}
    again = make_loop(tmp_path, checkpointer=saver)
    again.__post_init__(dataclasses.replace(restored, meta=meta))
    again.run()
    found, _ = by_hand(Rows(), 6)
    pairs = [found[i]["loss"] for i in (4, 5)]
    want = sum(p[0] for p in pairs) / sum(p[1] for p in pairs)
    assert dict(again.outputs.writer.having("loss"))[6] == pytest.approx(want, rel=1e-5)


def test_a_run_may_begin_or_cease_to_judge_spikes(tmp_path, saver):
    """The losses of the first window are in the checkpoints of some policies only, and of its size."""
    policies = [{}, {"spike_sigmas": 50.0, "window": 4}, {"spike_sigmas": 50.0, "window": 8}, {}]
    for total, policy in enumerate(policies, 1):
        loop = make_loop(tmp_path, checkpointer=saver, anomaly=Anomaly(**policy), total=2 * total)
        state = loop.run()
        assert int(state.variables[STATISTICS]["count"]) == 2 * total


def test_an_evaluation_under_way_is_given_up_and_the_state_saved_without_hooks(tmp_path, saver):
    class Split(Rows):
        name, num_steps, bytes_per_token = "held_out", 9, 0.0

        def batch(self, step, lo, hi):
            read.append(step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step, lo, hi)

    class EveryStep(Hook):
        every = 1

        def __call__(self, step, state, metrics):
            called.append(step)

    read, called = [], []
    with StopRequest() as stop:
        evaluation = Evaluation(
            every=4,
            eval_step=lambda params, batch, _: loss_fn(params, batch, None).metrics,
            streams=(Split(), Split()),
            sharding=REPLICATED,
            stop=stop.requested,
        )
        loop = make_loop(tmp_path, checkpointer=saver, stop=stop, hooks=(evaluation, EveryStep()))
        loop.run()
    assert loop.interrupted
    assert read == [0, 1, 2] and evaluation.results == {}
    assert not loop.outputs.writer.having("eval/held_out/loss")
    assert called == [1, 2, 3] and saver.all_steps() == [4]


@pytest.mark.parametrize("moment", ["in the last update", "in the last evaluation"])
def test_hooks_skipped_by_a_stop_at_the_end_run_when_the_run_goes_on(tmp_path, saver, moment):
    class Split(Rows):
        name, num_steps, bytes_per_token = "held_out", 3, 0.0

    class Stop:
        def reached(self, step):
            return moment == "in the last update" and step == 10

        def requested(self, batch):
            return moment == "in the last evaluation" and batch == 1

    def evaluation(stop):
        return Evaluation(
            every=100,
            eval_step=lambda params, batch, _: loss_fn(params, batch, None).metrics,
            streams=(Split(),),
            sharding=REPLICATED,
            stop=stop.requested,
        )

    stop = Stop()
    first = make_loop(tmp_path, checkpointer=saver, stop=stop, hooks=(evaluation(stop),))
    first.run()
    assert first.interrupted and saver.all_steps() == [10]
    assert not first.outputs.writer.having("eval/held_out/loss")
    assert step_dir.read_meta(saver.step_path(10))["hooks_left_out"]
    hooks = (evaluation(Later()),)
    again = make_loop(tmp_path, checkpointer=saver, hooks=hooks, hooks_left_out=True)
    again.run()
    assert not again.interrupted
    assert [step for step, _ in again.outputs.writer.having("eval/held_out/loss")] == [10]


def test_an_evaluation_that_a_stop_delays_ranks_its_step(tmp_path):
    class Stops(Hook):
        """An evaluation, which a stop ends at step 4 of the first start."""

        every, stopped = 4, False

        def __call__(self, step, state, metrics):
            if step == 4 and not self.stopped:
                self.stopped = True
                raise HookInterruptedError
            return {"eval/x/loss": float(step)}

    hook = Stops()
    folder = tmp_path / "checkpoints"
    best = {"keep_last": 1, "keep_best": 1, "best_metric": "eval/x/loss"}
    for left_out in (False, True):
        with Checkpointer(folder, **best) as checkpointer:
            loop = make_loop(
                tmp_path,
                checkpointer=checkpointer,
                hooks=(hook,),
                checkpoint_period=4,
                hooks_left_out=left_out,
            )
            loop.run()
            assert loop.interrupted is not left_out
    assert sorted(path.name for path in folder.iterdir()) == ["10", "4"]


def test_skipped_hooks_that_have_written_their_metrics_are_not_run_again(tmp_path, saver):
    class Counted(Hook):
        def __init__(self, prefix):
            self.every, self.prefix, self.steps = 5, prefix, []

        def __call__(self, step, state, metrics):
            self.steps.append(step)

    first, second = Counted("eval/"), Counted("other/")
    hooks = (first, second)
    written = {"loss", "eval/a/loss"}
    loop = make_loop(tmp_path, hooks=hooks, hooks_left_out=True, written=written)
    loop.step = 5
    loop.run()
    assert first.steps == [10] and second.steps == [5, 10]


class EndsAt(Hook):
    """Ends a run at its step."""

    every, ended, last = 3, False, 6

    def __call__(self, step, state, metrics):
        self.ended = step == self.last
        return {"end/here": float(self.ended)}


def test_a_hook_ends_a_run_which_is_saved_and_evaluated_as_at_its_last_step(tmp_path, saver):
    class Rare(Hook):
        every, steps = 100, ()

        def __call__(self, step, state, metrics):
            self.steps += (step,)
            return {"rare": 1.0}

    end, rare = EndsAt(), Rare()
    loop = make_loop(tmp_path, checkpointer=saver, hooks=(end, rare), checkpoint_period=100)
    loop.run()
    assert loop.step == 6 and loop.ended and not loop.interrupted
    assert rare.steps == (6,) and saver.all_steps() == [6]
    assert not step_dir.read_meta(saver.step_path(6))["hooks_left_out"]
    again = make_loop(tmp_path, checkpointer=saver, hooks=(end, rare))
    again.run()
    assert again.step == 6 and saver.all_steps() == [6] and rare.steps == (6,)


def test_a_hook_that_ends_a_run_where_it_resumes_is_followed_by_the_others(tmp_path):
    class Others(Hook):
        every = 100

        def __init__(self, prefix):
            self.prefix, self.steps = prefix, []

        def __call__(self, step, state, metrics):
            self.steps.append(step)

    end, has_written, rare = EndsAt(), Others("eval/"), Others("rare/")
    hooks = (end, has_written, rare)
    loop = make_loop(tmp_path, hooks=hooks, hooks_left_out=True, written={"eval/a/loss"})
    loop.step = 6
    loop.run()
    assert loop.ended and loop.step == 6
    assert has_written.steps == [] and rare.steps == [6]


def test_a_skipped_update_is_counted_in_the_rows_that_follow(tmp_path):
    loop = make_loop(tmp_path, stream=Rows(bad={4: np.nan}), anomaly=Anomaly(action="skip"))
    loop.run()
    assert loop.outputs.writer.having("skipped_updates") == [(6, 1), (9, 1), (10, 1)]


def test_a_stop_between_two_rows_logs_what_it_has(tmp_path, saver):
    class AtFive:
        def reached(self, step):
            return step == 5

    first = make_loop(tmp_path, checkpointer=saver, stop=AtFive())
    first.run()
    second = make_loop(tmp_path, checkpointer=saver)
    second.run()
    assert [step for step, _ in first.outputs.writer.having("loss")] == [1, 3, 5]
    assert [step for step, _ in second.outputs.writer.having("loss")] == [6, 9, 10]


def test_a_checkpoint_period_saves_and_the_last_step_is_saved_once(tmp_path, saver):
    make_loop(tmp_path, checkpointer=saver, checkpoint_period=5).run()
    assert saver.all_steps() == [5, 10]


def test_a_save_that_fails_in_the_background_ends_the_run_long_before_the_next(
    tmp_path, saver, monkeypatch
):
    commit = checkpoint.commit

    def full(path, record, *arrays, written, barrier):
        if record["step"] == 4:
            written()
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(path, record, *arrays, written=written, barrier=barrier)

    class UntilItFailed(Hook):
        every = 5

        def __call__(self, step, state, metrics):
            if saver._pending is not None:
                saver._pending.exception()  # waits

    monkeypatch.setattr(checkpoint, "commit", full)
    hooks = (UntilItFailed(),)
    loop = make_loop(tmp_path, checkpointer=saver, checkpoint_period=2, hooks=hooks)
    with pytest.raises(checkpoint.CheckpointSaveError, match="disk is full.*step 2 is good"):
        loop.run()
    assert loop.step == 5 and saver.all_steps() == [2]


# ---- Batches.


def test_the_prefetcher_hands_out_what_the_stream_has_in_any_order():
    stream = Rows()
    prefetcher = Prefetcher(stream, REPLICATED, ahead=2)
    for step in (0, 1, 2, 7, 8, 3):
        assert_bits(prefetcher.get(step), stream.batch(step, 0, 8))
    prefetcher.close()
    assert_bits(prefetcher.get(4), stream.batch(4, 0, 8))
    prefetcher.close()


def test_each_range_of_rows_is_read_once():
    calls = []

    class Counting(Rows):
        def batch(self, step, lo, hi):
            calls.append((lo, hi))
            return super().batch(step, lo, hi)

    mesh = partitioning.make_mesh(shape={"fsdp": 4, "tensor": 2})
    sharding = partitioning.batch_sharding(mesh, partitioning.rules_named("fsdp_tp"))
    found = global_batch(Counting(), 3, sharding)
    assert_bits(found, Rows().batch(3, 0, 8))
    assert sorted(calls) == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_what_makes_batches_of_the_state_does_not_pay_for_the_update_before(tmp_path):
    step, _ = train_step(None, False)

    @jax.jit
    def slow_step(state, batch):
        x = jnp.full((400, 400), state.step, jnp.float32)
        spent = jax.lax.fori_loop(0, 30, lambda i, x: jnp.cos(x @ x), x).sum()
        after, metrics = step(state, batch)
        return after.replace(params={"w": after.params["w"] + 0 * spent}), metrics

    class OfState(Prefetcher):
        part, of_state = "generation", True

        def get(self, step, state):
            ready.append(state.params["w"].is_ready())
            return super().get(step, state)

    ready = []
    feed = OfState(Rows(), REPLICATED)
    make_loop(tmp_path, total=4, train_step=slow_step, feed=feed).run()
    assert ready == [True] * 4
