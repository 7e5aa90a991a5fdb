"""The time of a run over all its starts, under clocks of our own."""

import dataclasses
import json
import threading
import time

import pytest

from espalier.trainers.telemetry import lifetime
from espalier.trainers.telemetry.goodput import Goodput
from espalier.trainers.telemetry.lifetime import DamagedLifetimeError, Lifetime, Start
from tests.trainers.telemetry.goodput_test import Clock


def starts():
    """A run that was killed, stopped by a signal, and then done."""
    first = Start(
        began=1000.0,
        alive=1100.0,
        from_step=0,
        step=50,
        first_step_at=1020.0,
        seconds={"init": 12.0, "compile": 8.0, "step": 70.0, "evaluation": 6.0, "checkpoint": 4.0},
        saves=[[20, 28.0], [40, 56.0]],
    )
    second = Start(
        began=1130.0,
        alive=1180.0,
        from_step=40,
        step=60,
        first_step_at=1148.0,
        ended="interrupted",
        seconds={"init": 10.0, "restore": 5.0, "step": 30.0, "checkpoint": 5.0},
    )
    third = dataclasses.replace(
        second, began=1190.0, alive=1240.0, from_step=60, step=80, first_step_at=1207.0
    )
    third.ended = "done"
    return [first, second, third]


def test_every_second_of_a_life_counts_once():
    life = starts()
    life[0].lose(40)
    assert (life[0].lost_steps, life[0].lost_seconds) == (10, 14.0)  # since the save of step 40
    assert lifetime.gaps(life) == [0.0, 30.0, 10.0]
    assert lifetime.waits(life) == [None, 48.0, 27.0]
    parts = lifetime.split(life)
    assert parts["step"] == 70 + 30 + 30 - 14 and parts["lost"] == 14 and parts["gaps"] == 40
    assert sum(parts.values()) == 1240 - 1000
    assert lifetime.line(life) == (
        "48% of 4 min in steps that count, 3 starts; 6% lost steps (at least 10), 21% start-up, 2% evaluation, 6% saving, "
        "17% between processes; 27 s from the last sign of life to the next step"
    )


def test_a_run_that_was_done_was_not_waiting():
    life = starts()
    life.append(Start(began=99999.0, alive=100010.0, from_step=80, step=80, seconds={"init": 11.0}))
    assert lifetime.gaps(life)[-1] == 0 and lifetime.waits(life)[-1] is None


def test_starts_that_failed_before_the_first_step_of_a_run_do_not_count():
    life = starts()
    wrong = Start(began=10.0, alive=30.0, ended="failed", seconds={"init": 20.0})
    assert lifetime.line([wrong, wrong, *life]) == lifetime.line(life)
    # At the start that goes on there is no step yet.
    now = Start(began=1000.0, alive=1001.0, seconds={"init": 1.0})
    assert lifetime.counted([wrong, now]) == [now]
    assert lifetime.counted([wrong, wrong]) == [wrong]
    # Later failures cost the run time.
    late = Start(began=1100.0, alive=1120.0, ended="failed", seconds={"init": 20.0})
    assert lifetime.counted([life[0], late, *life[1:]]) == [life[0], late, *life[1:]]


def test_a_process_that_is_dead_is_not_running():
    life = starts()
    assert [lifetime.ending(life, i, 2000.0) for i in range(3)] == ["killed", "interrupted", "done"]
    alone = life[:1]
    assert lifetime.ending(alone, 0, alone[0].alive + 30) == "running"
    assert lifetime.ending(alone, 0, alone[0].alive + 61) == "killed"


@pytest.mark.parametrize(
    ("step", "lost", "seconds"),
    [
        (50, 0, 0.0),
        (20, 30, 42.0),
        (30, 20, 28.0),  # no save is known: by the number of steps
        (0, 50, 70.0),
    ],
)
def test_lost_steps_are_those_after_the_checkpoint(step, lost, seconds):
    start = starts()[0]
    start.lose(step)
    assert (start.lost_steps, start.lost_seconds) == (lost, pytest.approx(seconds))


def test_a_row_of_metrics_after_the_last_sign_of_life_counts():
    start = starts()[0]
    start.lose(40, recorded=75)
    assert (start.step, start.lost_steps, start.lost_seconds) == (75, 35, 14.0)
    assert lifetime.lost_steps([start]) == "at least 35"
    start.ended = "interrupted"  # it has written its end
    assert lifetime.lost_steps([start]) == "35"


def test_a_start_is_recorded_while_it_runs_and_the_next_one_knows_what_was_lost(tmp_path):
    path, clock = tmp_path / lifetime.FILE, Clock()
    goodput = Goodput(clock=clock)
    clock.now += 3

    def write(text):  # the test reads while the thread writes
        temporary = tmp_path / "temporary"
        temporary.write_text(text)
        temporary.replace(path)

    life = Lifetime(str(path), write, goodput, pause=0.01)
    # As of a process that is killed: nothing is written at its end.
    life._thread.start()
    life.goes_on_from(0, of_run=False)
    with goodput.measure("step"):
        clock.now += 10
    life.reached(1)
    life.saved(1)
    with goodput.measure("step"):
        clock.now += 7
    life.reached(2)
    until = time.monotonic() + 30

    def is_recorded():
        return path.exists() and lifetime.read(path)[0].seconds.get("step") == 17.0

    while time.monotonic() < until and not is_recorded():
        time.sleep(0.01)
    killed = lifetime.read(path)[0]
    life._done = True
    life._thread.join()
    assert (killed.step, killed.ended, killed.seconds["init"]) == (2, "running", 3.0)
    assert killed.first_step_at is not None and killed.saves == [[1, 10.0]]

    with Lifetime(str(path), path.write_text, Goodput()) as life:
        life.goes_on_from(1, of_run=True)
        life.reached(2)
        line = life.ends(interrupted=True)
    before, now = lifetime.read(path)
    assert (before.lost_steps, before.lost_seconds, before.ended) == (1, 7.0, "running")
    assert (now.from_step, now.step, now.ended) == (1, 2, "interrupted")
    assert ", 2 starts; " in line and "lost steps (at least 1)" in line

    with pytest.raises(KeyError), Lifetime(str(path), path.write_text, Goodput()):
        raise KeyError
    assert [start.ended for start in lifetime.read(path)] == ["running", "interrupted", "failed"]


def test_training_does_not_wait_for_a_slow_store(tmp_path):
    writing, written = threading.Event(), threading.Event()

    def write(text):
        writing.set()
        assert written.wait(30)

    with Lifetime(str(tmp_path / lifetime.FILE), write, Goodput()) as life:
        assert writing.wait(30)
        life.goes_on_from(0, of_run=False)
        life.reached(1)
        life.saved(1)
        assert not written.is_set()
        written.set()
    assert life.now.saves[0][0] == 1


def test_a_start_that_finds_no_checkpoint_has_lost_all(tmp_path):
    path = tmp_path / lifetime.FILE
    for _ in range(2):
        with Lifetime(str(path), path.write_text, Goodput()) as life:
            life.goes_on_from(0, of_run=False)
            for step in range(1, 4):
                life.reached(step)
    assert [start.lost_steps for start in lifetime.read(path)] == [3, 0]


@pytest.mark.parametrize("damage", ["digit", "cut", "kind", "other"])
def test_a_damaged_record_is_named_set_aside_and_begun_anew(tmp_path, damage, caplog):
    path = tmp_path / lifetime.FILE
    with Lifetime(str(path), path.write_text, Goodput()) as life:
        life.goes_on_from(0, of_run=False)
        life.reached(3)
    text = path.read_text()
    body = json.loads(text)
    body["starts"][0]["step"] = "3"
    path.write_text(
        {
            "digit": text.replace('"step": 3', '"step": 4'),
            "cut": text[: len(text) // 2],
            "kind": json.dumps({**body, "checksum": lifetime._checksum(body["starts"])}),
            "other": "[1]",
        }[damage]
    )
    with pytest.raises(DamagedLifetimeError, match="lifetime.json is damaged"):
        lifetime.read(path)
    with Lifetime(str(path), path.write_text, Goodput()):
        pass
    assert len(lifetime.read(path)) == 1
    [message] = [r.getMessage() for r in caplog.records]
    assert "lifetime.json is damaged" in message and "lifetime.json.damaged" in message
    assert (tmp_path / "lifetime.json.damaged").exists()


def test_a_disk_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    def full(text):
        raise OSError(28, "No space left on device")

    with Lifetime(str(tmp_path / lifetime.FILE), full, Goodput()) as life:
        life.reached(1)
        life.ends(interrupted=False)
    assert len(caplog.records) == 1
    assert "lifetime.json cannot be written" in caplog.text
