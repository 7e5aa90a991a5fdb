"""Phases that are runs of their own: what each takes of the one before, exactly, and what it records."""

import json
import re

import numpy as np
import pytest
from etils import epath

from espalier.trainers.checkpoints import step_dir
from espalier.trainers.optim import schedules
from espalier.trainers.telemetry.metric_writers import read_jsonl

FIRST = "((0, {'licence': 0.5, 'code': 0.5}),)"
SECOND = "((0, {'licence': 0.25, 'code': 0.75}),)"
LAST = 8
PHASE = (
    "initial.InitialCheckpoint.scope='phase'",
    "initial.InitialCheckpoint.data='continue'",
    f"local_text.open_stream.phases={SECOND}",
    "TRAIN_STEPS=6",
    "schedules.cosine.total_steps=6",
    "train.train.log_period=1",
)


def run(train, path, *bindings, status=0):
    given = (
        f"MODEL_DIR={str(path)!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        "CHECKPOINT_PERIOD=3",
        *bindings,
    )
    config = f"{train.programs}/small_text.gin"
    result = train(f"--gin_file={config}", *[f"--gin.{binding}" for binding in given])
    assert result.status == status, result.err
    return result


def error(result):
    assert result.status == 2, result.err
    return result.err[result.err.rindex("error: ") :]


def arrays(path, step):
    """Name of each array -> shape, dtype and digest of its values."""
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / str(step)).arrays


def logged(path, name):
    return [row[name] for row in read_jsonl(f"{path}/metrics.jsonl") if name in row]


@pytest.fixture(scope="module")
def parent(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("parent")
    run(
        train,
        path,
        f"local_text.open_stream.phases={FIRST}",
        f"TRAIN_STEPS={LAST}",
        "schedules.cosine.total_steps=10",
    )
    return path


@pytest.fixture(scope="module")
def child(train, parent, tmp_path_factory):
    path = tmp_path_factory.mktemp("child")
    run(train, path, f"INITIAL_CHECKPOINT_PATH={str(parent)!r}", *PHASE)
    return path


def test_a_phase_starts_with_parameters_and_moments_of_the_one_before(train, parent, tmp_path):
    # Rolling back saves the state that a run starts with.
    rollback = "anomaly.Anomaly.action='rollback'"
    run(train, tmp_path, f"INITIAL_CHECKPOINT_PATH={str(parent)!r}", *PHASE, rollback)
    before, after = arrays(parent, LAST), arrays(tmp_path, 0)
    kept = {name for name in before if re.match("params/|opt_state/.*/(mu|nu)/", name)}
    assert len(kept) > 20 and before.keys() == after.keys()
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    # Adam's own count stays, that of the schedule, the step and the statistics of losses begin anew.
    counts = {name: after[name] == before[name] for name in before.keys() - kept}
    same = [name for name, equal in counts.items() if equal]
    assert len(same) == 1 and same[0].startswith("opt_state/")
    assert {"step", "variables/loss_statistics/mean"} <= counts.keys() - set(same)
    zero = [name for name in counts if name.startswith("opt_state/") and name not in same]
    assert len(zero) == 1 and after[zero[0]] == after["step"]


def test_a_phase_has_the_schedule_and_reads_the_data_that_one_run_of_both_would(parent, child):
    rate = schedules.cosine(peak=3e-3, total_steps=6, warmup_steps=2)
    np.testing.assert_allclose(
        logged(child, "learning_rate"), [float(rate(s)) for s in range(6)], atol=1e-9
    )
    facts = json.loads((child / "run.json").read_text())
    initial = step_dir.read_meta(child)["initial"]
    assert facts["initial"] == initial
    assert initial["path"] == f"{parent}/checkpoints/{LAST}"
    assert (initial["scope"], initial["data"]) == ("phase", "continue")
    parents_rate = schedules.cosine(peak=3e-3, total_steps=10, warmup_steps=2)
    assert initial["learning_rate"] == pytest.approx(float(parents_rate(LAST)), abs=1e-9)
    # Each row of each source in turn: what the parent read, and what the child did.
    there, here = step_dir.read_meta(parent)["positions"], step_dir.read_meta(child)["positions"]
    assert sum(here[name]["rows"] - there[name]["rows"] for name in here) == 6 * 8
    assert sum(there[name]["rows"] for name in there) == LAST * 8
    assert here["code"]["rows"] - there["code"]["rows"] == pytest.approx(0.75 * 48, abs=3)
    epochs = logged(child, "epochs/code")
    assert epochs == sorted(epochs)
    assert facts["epochs"]["code"] == epochs[-1]


def test_a_phase_that_is_stopped_goes_on_when_the_one_before_is_gone(
    train, parent, child, tmp_path, monkeypatch
):
    from espalier.trainers import signals

    gone = tmp_path / "parent"
    (gone / "checkpoints").mkdir(parents=True)
    saved = f"checkpoints/{LAST}"
    (gone / saved).symlink_to(parent / saved)
    path = tmp_path / "run"
    bindings = (f"INITIAL_CHECKPOINT_PATH={str(gone)!r}", *PHASE)
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 4)
    run(train, path, *bindings, status=75)
    monkeypatch.undo()
    (gone / saved).unlink()
    result = run(train, path, *bindings)
    assert "step 4 from" in result.out
    assert arrays(path, 6) == arrays(child, 6)


def test_a_cooldown_is_a_straight_line_from_where_the_phase_before_stopped(train, child, tmp_path):
    run(
        train,
        tmp_path,
        f"INITIAL_CHECKPOINT_PATH={str(child)!r}",
        *PHASE[:3],
        "TRAIN_STEPS=None",
        "train.train.total_tokens=2400",
        "train.train.log_period=1",
        "recipe.Recipe.learning_rate=@schedules.linear()",
        "schedules.linear.peak=None",
        "schedules.linear.total_steps=None",
        "schedules.linear.final=1e-6",
    )
    rates = logged(tmp_path, "learning_rate")
    begin = float(schedules.cosine(peak=3e-3, total_steps=6, warmup_steps=2)(6))
    steps = len(rates)
    wanted = begin + (1e-6 - begin) * np.arange(steps) / steps
    np.testing.assert_allclose(rates, wanted, atol=1e-9, rtol=0)
    assert step_dir.read_meta(tmp_path)["learning_rate"] == pytest.approx(1e-6, abs=1e-10)
    # A step has at most 8 x 64 tokens with a loss: the budget is met to one step.
    assert 5 <= steps <= 6


@pytest.mark.parametrize(
    ("bindings", "parts"),
    [
        (["initial.InitialCheckpoint.scope='phase'"], ["set INITIAL_CHECKPOINT_PATH"]),
        (["initial.InitialCheckpoint.scope='state'"], ["set INITIAL_CHECKPOINT_PATH"]),
        (["initial.InitialCheckpoint.data='continue'"], ["set INITIAL_CHECKPOINT_PATH"]),
        (["train.train.total_tokens=100"], ["TRAIN_STEPS = 24 and TRAIN_TOKENS = 100"]),
        (["TRAIN_STEPS=None"], ["TRAIN_STEPS = None and TRAIN_TOKENS = None"]),
        (["TRAIN_STEPS=None", "train.train.total_tokens=0.0"], ["total_tokens' is 0.0, but takes"]),
        (
            ["recipe.Recipe.learning_rate=@schedules.linear()", "schedules.linear.peak=None"]
            + ["schedules.linear.total_steps=24"],
            ["peak = None begins at the rate", "INITIAL_CHECKPOINT_PATH"],
        ),
        (
            ["local_text.open_stream.max_epochs=0.5"],
            ["source 'licence' has", "allows 0.5", "on_cap='redistribute'"],
        ),
        (
            [
                "local_text.open_stream.max_epochs=0.5",
                "local_text.open_stream.on_cap='redistribute'",
            ],
            ["From step", "all sources", "The run has 24 steps"],
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(train, tmp_path, bindings, parts):
    path = tmp_path / "run"
    given = (f"MODEL_DIR={str(path)!r}", f"DIRECTORY={train.cache + '/text'!r}", *bindings)
    config = f"{train.programs}/small_text.gin"
    message = error(train(f"--gin_file={config}", *[f"--gin.{binding}" for binding in given]))
    for part in parts:
        assert part in message
    assert not (path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("bindings", "parts"),
    [
        (
            ["initial.InitialCheckpoint.scope='state'"],
            ["continues with the next batch of the same stream"],
        ),
        (
            ["initial.InitialCheckpoint.scope='state'", "initial.InitialCheckpoint.data='restart'"]
            + [f"TRAIN_STEPS={LAST}"],
            [f"TRAIN_STEPS = {LAST}", f"continues at step {LAST}", "nothing to train"],
        ),
        (
            ["local_text.open_stream.seed=1"],
            ["cannot continue where the earlier run stopped", "INITIAL_DATA = 'restart'"],
        ),
        (["LENGTH=32"], ["cannot continue where the earlier run stopped", "row length"]),
        (["config.TransformerConfig.mlp_dim=128"], ["of another model", "mlp"]),
        (["config.TransformerConfig.vocab_size=512"], ["of another model", "token_embed"]),
        (["optimizers.adamw.moment_dtype='bfloat16'"], ["another model or optimiser", "mu"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(train, parent, tmp_path, bindings, parts):
    given = (
        f"MODEL_DIR={str(tmp_path / 'run')!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        f"INITIAL_CHECKPOINT_PATH={str(parent)!r}",
        *PHASE[:3],
        *bindings,
    )
    config = f"{train.programs}/small_text.gin"
    message = error(train(f"--gin_file={config}", *[f"--gin.{binding}" for binding in given]))
    for part in parts:
        assert part in message


def test_a_source_that_reaches_its_cap_is_announced_and_logged(train, tmp_path):
    result = run(
        train,
        tmp_path,
        f"local_text.open_stream.phases={FIRST}",
        "local_text.open_stream.max_epochs={'licence': 0.1}",
        "local_text.open_stream.on_cap='redistribute'",
        f"TRAIN_STEPS={LAST}",
        "train.train.log_period=1",
    )
    said = re.search(r"licence reach max_epochs at step (\d+)", result.out)
    assert said and 0 < int(said[1]) < LAST
    epochs = logged(tmp_path, "epochs/licence")
    assert epochs[int(said[1]) - 1] == epochs[-1] <= 0.1
    assert re.search(r"read: licence [\d.]+ epochs, code [\d.]+ epochs", result.out)
