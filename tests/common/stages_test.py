"""Signs of life, under a clock of our own."""

import io
import sys
import threading
import types

import pytest
import tqdm

from espalier.common import stages


class Clock:
    """A clock that only waiting moves, and what happens meanwhile: {time: function}."""

    def __init__(self, events, end):
        self.now, self._events, self._end = 100.0, dict(sorted(events.items())), 100.0 + end

    def wait(self, seconds):
        """As of an event that is set at the end."""
        until = self.now + seconds
        while self._events and 100 + next(iter(self._events)) <= min(until, self._end):
            at = next(iter(self._events))
            self.now = 100.0 + at
            self._events.pop(at)()
            until = max(until, self.now)
        self.now = until
        return until > self._end


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs the speaker until a time; returns the lines on standard error."""

    def run(events, end):
        clock = Clock(events, end)
        monkeypatch.setattr(stages, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
        with stages._noted(sys.stdout), stages._noted(sys.stderr):
            stages._speak(clock)
        return capsys.readouterr().err.splitlines()

    return run


def test_the_newest_stage_is_said_after_every_ten_seconds_of_silence(said):
    inner = stages.stage(lambda: "compiling")

    with stages.stage("reading"):
        lines = said({5: inner.__enter__, 32: lambda: inner.__exit__(None, None, None)}, 75)
    # `reading` began on another clock; what counts here is the order and the inner stage's time.
    assert lines[:3] == ["compiling, 5 s", "compiling, 15 s", "compiling, 25 s"]
    assert [line.split(",")[0] for line in lines[3:]] == ["reading"] * 4


def test_elapsed_time_has_minutes(said):
    slow = stages.stage("slow")
    with stages.stage("all"):
        lines = said({0: slow.__enter__}, 95)
    slow.__exit__(None, None, None)
    assert lines[4:7] == ["slow, 50 s", "slow, 1 min 0 s", "slow, 1 min 10 s"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_whatever_is_printed_postpones_it(said, stream):
    def show():
        print("row", file=getattr(sys, stream))

    with stages.stage("training"):
        lines = said({at: show for at in (4, 13, 22, 31)}, 49)
    assert [line.split(",")[0] for line in lines if line != "row"] == ["training"]


def test_it_ends_the_line_of_an_answer_that_is_being_streamed(said, capsys):
    def show():
        print("The", end="", flush=True)

    with stages.stage("compiling"):
        lines = said({1: show}, 25)
    assert lines[0] == "" and [line.split(",")[0] for line in lines[1:]] == ["compiling"] * 2


def test_nothing_is_said_where_silence_is_right(said):
    with stages.stage("serving"), stages.quiet():
        assert said({}, 300) == []


def test_what_a_stage_raises_ends_nothing(said):
    def broken():
        raise KeyError

    fails = stages.stage(broken)
    with stages.stage("all"):
        lines = said({1: fails.__enter__, 15: lambda: fails.__exit__(None, None, None)}, 25)
    assert len(lines) == 1


def test_a_bar_on_the_screen_stays_whole(said):
    screen = io.StringIO()
    screen.isatty = lambda: True
    bar = tqdm.tqdm(total=3, file=sys.stderr, ncols=40, mininterval=0)
    with stages.stage("waiting"):
        lines = said({1: bar.update}, 12)
    bar.close()
    assert [line for line in lines if line.strip("\r ").startswith("waiting, ")]


def test_a_command_starts_with_a_header_and_leaves_nothing_behind(capsys, monkeypatch):
    monkeypatch.setattr(stages, "PERIOD", 0.01)
    threads, before = threading.active_count(), list(stages._stages)
    heard = threading.Event()

    def text():
        heard.set()
        return "slow"

    with stages.shown("espalier x"), stages.shown("espalier inner"), stages.stage(text):
        assert heard.wait(60)
    assert threading.active_count() == threads
    assert stages._stages == before
    assert "write" not in vars(sys.stdout) and "write" not in vars(sys.stderr)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("espalier x: starting\n") and "inner" not in err
    with stages.shown("espalier x", header=False):
        print("result")
    assert capsys.readouterr().out == "result\n"


def test_one_stream_for_both_outputs(monkeypatch):
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    with stages.shown("x"):
        print("a")
    print("b")
    assert both.getvalue() == "x: starting\na\nb\n" and "write" not in vars(both)
