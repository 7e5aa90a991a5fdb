"""Runs that are cut short, or go on from others, against one that is not."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from espalier.trainers import signals
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.state_tree import flatten
from espalier.trainers.optim import schedules
from espalier.trainers.telemetry.metric_writers import measures_time, read_jsonl

ROOT = pathlib.Path(__file__).parents[2]


def flags(train, path, *bindings):
    config = f"{train.programs}/small_text.gin"
    given = [f"MODEL_DIR={str(path)!r}", f"DIRECTORY={train.cache + '/text'!r}", "LENGTH=32"]
    return [f"--gin_file={config}", *[f"--gin.{binding}" for binding in (*given, *bindings)]]


def run(train, path, *bindings, status=0):
    result = train(*flags(train, path, *bindings))
    assert result.status == status, result.err
    return result


def digests(path, step):
    """Name of each array -> shape, dtype and digest of its values."""
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / str(step)).arrays


def rows(path):
    """What was logged and does not depend on the clock, by step."""
    found = {}
    file = f"{path}/metrics.jsonl"
    for row in read_jsonl(file) if os.path.exists(file) else ():
        untimed = {k: v for k, v in row.items() if not measures_time(k)}
        found.setdefault(row["step"], {}).update(untimed)
    return found


def points(path):
    """What TensorBoard shows and does not depend on the clock: (step, name) -> value."""
    found = {}
    for file in sorted((pathlib.Path(path) / "tensorboard").iterdir()):
        data = file.read_bytes()
        # Records: length, its checksum, event, its checksum; a killed process leaves half of one.
        while len(data) >= 12 and len(data) >= 16 + (length := int.from_bytes(data[:8], "little")):
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                if not measures_time(value.tag):
                    found[event.step, value.tag] = value.simple_value
    return found


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that nothing happens to."""
    path = tmp_path_factory.mktemp("whole")
    run(train, path)
    assert list(rows(path)) == [1, *range(2, 25, 2)]
    return path


def start(train, path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "espalier.launch.train", *flags(train, path), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(train, whole, tmp_path):
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    sleep = "--gin.train.train.hooks=[@local_text.Sleep]"
    reached = 0
    for moment in ("while it starts", "early", "late"):
        process = start(train, tmp_path, sleep)
        target = {"while it starts": 0, "early": rng.randint(2, 9)}.get(moment, rng.randint(12, 19))
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and reached < target:
            time.sleep(0.01)
            # Rows of an earlier start stay until training goes on: more of them are new ones.
            reached = max(rows(tmp_path), default=0)
        time.sleep(rng.uniform(0, 0.1 if target else 4))
        process.kill()
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, (out, err)
    assert 12 <= reached < 24
    result = run(train, tmp_path)
    assert re.search(r"start +step (\d+) from ", result.out), result.out
    assert digests(tmp_path, 24) == digests(whole, 24)
    assert rows(tmp_path) == rows(whole)
    assert points(tmp_path) == points(whole)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert len(facts["earlier"]) >= 2  # of the first start only if it came to train


def test_a_requested_stop_between_two_checkpoints_goes_on_exactly(
    train, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 7)
    assert "stopped by a signal at step 7" in run(train, tmp_path, status=75).out
    monkeypatch.undo()
    assert "step 7 from" in run(train, tmp_path).out
    assert digests(tmp_path, 24) == digests(whole, 24)
    assert rows(tmp_path) == rows(whole)
    assert points(tmp_path) == points(whole)


def test_the_best_step_stays_if_a_stop_delayed_its_evaluation(train, tmp_path, monkeypatch):
    best = [f"checkpoint.Checkpointer.keep_{kind}=1" for kind in ("last", "best")]
    best += ["checkpoint.Checkpointer.best_metric='eval/licence/loss'"]
    best += ["checkpoint.Checkpointer.best_mode='max'"]  # the first: the loss falls
    given = ("train.train.eval_tasks=None", "EVAL_PERIOD=4", *best)
    monkeypatch.setattr(signals.StopRequest, "requested", lambda self, done: True)
    run(train, tmp_path, *given, status=75)
    monkeypatch.undo()
    for last in (
        8,
        12,
    ):  # at the second of these starts, the evaluation was one of an earlier start
        run(train, tmp_path, *given, f"TRAIN_STEPS={last}")
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", str(last)}


def test_damaged_and_half_written_checkpoints_are_passed_over_and_said(
    train, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 10)
    run(train, tmp_path, status=75)
    monkeypatch.undo()
    saved = tmp_path / "checkpoints"
    data = max((saved / "10" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    half = saved / "12"
    (half / "state").mkdir(parents=True)
    (half / "incomplete").touch()
    (half / "state" / "part").write_bytes(b"\0" * 100)
    result = run(train, tmp_path)
    assert re.search(r"step 8 from .*; step 10 is damaged: ", result.out)
    assert (saved / "10.aside").exists()
    assert digests(tmp_path, 24) == digests(whole, 24)
    assert rows(tmp_path) == rows(whole)


def test_damaged_metrics_are_said_set_aside_and_go_on_where_they_are_good(
    train, whole, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(signals.StopRequest, "reached", lambda self, step: step == 11)
    run(train, tmp_path, status=75)
    monkeypatch.undo()
    file = tmp_path / "metrics.jsonl"
    before = rows(tmp_path)
    assert max(before) == 11
    # A digit of the last row before step 8, which the checkpoint of step 4 does not confirm.
    lines = file.read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"step": 6' in line)
    at = lines[number].index(b'"loss": ') + 10
    digit = b"1" if lines[number][at : at + 1] != b"1" else b"2"
    lines[number] = lines[number][:at] + digit + lines[number][at + 1 :]
    file.write_bytes(b"".join(lines))
    run(train, tmp_path)
    said = [r.getMessage() for r in caplog.records if "metrics.jsonl" in r.getMessage()]
    assert len(said) == 1 and "the rows after step 4 up to step 10 are lost" in said[0]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(lines)
    assert digests(tmp_path, 24) == digests(whole, 24)
    assert rows(tmp_path) == {s: r for s, r in rows(whole).items() if s <= 4 or s > 10}
    file.unlink()
    caplog.clear()
    run(train, tmp_path)
    assert "metrics.jsonl is missing: the rows up to step 24 are lost" in caplog.text


@pytest.fixture
def small_disk():
    """Mounts a file system with room for about three checkpoints at a new folder."""
    mounted = []

    def mount(folder):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs privileges")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# With all of the run on the disk, chance decides whether a checkpoint or a row of metrics is too much.
@pytest.mark.parametrize(
    ("folder", "error"),
    [
        ("checkpoints", r"could not save .*/checkpoints/\d+: the disk is full.*; step \d+ is good"),
        ("", r"could not save .*: the disk is full|cannot write .*: No space left on device"),
    ],
    ids=["for checkpoints", "for all"],
)
def test_a_full_disk_ends_in_one_error_and_the_run_goes_on_when_there_is_room(
    train, whole, tmp_path, small_disk, folder, error
):
    path = tmp_path / "run"
    if folder:
        path.mkdir()
    small_disk(path / folder)
    bindings = ("checkpoint.Checkpointer.keep_last=None",)
    result = train(*flags(train, path, *bindings))
    assert result.status == 2
    message = result.err[result.err.rindex("\nerror: ") :]
    assert re.search(error, message), message
    good = max(step_dir.complete_steps(epath.Path(path / "checkpoints")))
    assert good >= 4
    subprocess.run(["mount", "-o", "remount,size=64m", str(path / folder)], check=True)
    assert f"step {good} from" in run(train, path, *bindings).out
    assert digests(path, 24) == digests(whole, 24)
    assert rows(path) == rows(whole)


def test_changing_phase_compiles_nothing(train, tmp_path):
    import local_text

    local_text.TRACES.clear()
    phases = "((0, {'licence': 1.0}), (6, {'licence': 0.5, 'code': 0.5}), (12, {'code': 1.0}))"
    run(
        train,
        tmp_path,
        f"local_text.open_stream.phases={phases}",
        "train.train.eval_tasks=None",
        "EVAL_PERIOD=5",
        "TRAIN_STEPS=16",
    )
    assert len(local_text.TRACES) == 2  # the train step and the evaluation
    found = rows(tmp_path)
    sources = {
        step: {name.partition("/")[2] for name in row if name.startswith("source_loss/")}
        for step, row in found.items()
    }
    assert sources[6] == {"licence"}
    assert sources[8] == {"licence", "code"}
    assert sources[14] == sources[16] == {"code"}
    assert {"eval/licence/loss", "eval/code/loss"} <= found[5].keys() & found[16].keys()


def test_a_second_phase_starts_with_the_parameters_of_the_first_and_nothing_else(
    train, whole, tmp_path
):
    run(
        train,
        tmp_path,
        f"INITIAL_CHECKPOINT_PATH={str(whole)!r}",
        "local_text.open_stream.phases=((0, {'code': 1.0}),)",
        "TRAIN_STEPS=2",
        "anomaly.Anomaly.action='rollback'",  # saves the state it starts with
    )
    before, after = digests(whole, 24), digests(tmp_path, 0)
    assert before.keys() == after.keys()
    params = {name for name in before if name.startswith("params/")}
    assert len(params) > 5
    assert {n: after[n] for n in params} == {n: before[n] for n in params}
    moments = {name for name in before if re.match("opt_state/.*(mu|nu)/", name)}
    assert len(moments) == 2 * len(params)
    assert all(after[name] != before[name] for name in moments)
    assert after["step"] != before["step"]
    assert step_dir.read_meta(tmp_path / "checkpoints" / "2")["data_step"] == 2


def test_a_cooldown_goes_on_with_state_step_data_and_a_straight_line_to_its_end(
    train, whole, tmp_path
):
    bindings = (
        f"INITIAL_CHECKPOINT_PATH={str(whole)!r}",
        "initial.InitialCheckpoint.scope='state'",
        "recipe.Recipe.learning_rate=@schedules.cooldown()",
        "schedules.cooldown.before=@schedules.cosine()",
        "schedules.cooldown.start_step=24",
        "schedules.cooldown.steps=8",
        "TRAIN_STEPS=32",
        "anomaly.Anomaly.action='rollback'",
    )
    run(train, tmp_path, *bindings, "train.train.log_period=1")
    assert digests(tmp_path, 24) == digests(whole, 24)
    assert step_dir.read_meta(tmp_path / "checkpoints" / "32")["data_step"] == 32
    rates = [row["learning_rate"] for row in rows(tmp_path).values()]
    begin = float(schedules.cosine(peak=3e-3, total_steps=24, warmup_steps=2)(24))
    np.testing.assert_allclose(rates, begin + (1e-6 - begin) * np.arange(8) / 8, atol=1e-7, rtol=0)


def test_flat_names_of_a_saved_state_are_those_digests_have(whole):
    """Guards the tests above: what they compare is all of the state."""
    names = set(digests(whole, 24))
    for part in ("step", "params/final_norm/scale", "variables/loss_statistics/mean"):
        assert part in names
    assert flatten({"params": {"final_norm": {"scale": 0}}}).keys() <= names
