"""Every second counts once, under a clock of our own."""

import subprocess
import sys
import time

import pytest

from espalier.trainers.telemetry import goodput


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_every_second_counts_in_one_part():
    clock = Clock()
    split = goodput.Goodput(started=90.0, clock=clock)  # 10 s before this
    clock.now += 2  # still starting
    with split.measure("compile"):
        clock.now += 5
    clock.now += 1  # between the parts
    for _ in range(2):
        with split.measure("step"):
            clock.now += 10
            with split.measure("data_wait"):
                clock.now += 3
            clock.now += 1
    with pytest.raises(KeyError), split.measure("checkpoint"):
        clock.now += 4
        raise KeyError
    clock.now += 2
    values = split.metrics(prefix="")
    assert values.pop("goodput") == pytest.approx(22 / 52)
    expected = dict(
        init=12, data=0, restore=0, compile=5, data_wait=6, generation=0, step=22, checkpoint=4
    )
    expected |= dict(evaluation=0, other=3)
    assert values == expected
    assert sum(values.values()) == clock.now - 90.0


def test_init_may_be_measured_in_pieces():
    clock = Clock()
    split = goodput.Goodput(clock=clock)
    with split.measure("data"):
        clock.now += 1
    clock.now += 1
    with split.measure("restore"):
        clock.now += 4
        assert split.so_far()["restore"] == 4 and split.seconds["restore"] == 0
    clock.now += 1
    values = split.metrics("")
    assert (values["init"], values["data"], values["restore"], values["other"]) == (2, 1, 4, 0)


def test_unknown_part():
    with (
        pytest.raises(ValueError, match="Unknown part 'steps'"),
        goodput.Goodput().measure("steps"),
    ):
        pass


def test_process_start_is_before_the_interpreter_ran_this():
    code = (
        "import time; before = time.monotonic(); from espalier.trainers.telemetry import goodput; time.sleep(0.2);"
        "print(before - goodput.process_start())"
    )
    started = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lived = time.monotonic() - started
    # Before our first line, by the interpreter's own start; the system's clock ticks 100 times a second.
    assert -0.02 <= float(out.stdout) <= lived
