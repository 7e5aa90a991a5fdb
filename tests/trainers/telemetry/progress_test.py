"""What a run shows: lines without a terminal, a bar on one, and held-out losses on both."""

import io
import sys

import pytest

from trainers.telemetry import progress

EVALUATION = {
    "eval/a/loss": 2.0,
    "eval/a/tokens": 7.0,
    "eval/a/bits_per_byte": 1.5,
    "eval/b/loss": 3.0,
    "eval/b/tokens": 7.0,
    "indicators/loss": 9.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps(shown=True):
    one = progress.Progress(first_step=0, total_steps=2000, unit="tokens", shown=shown)
    one.update(1, None, 0.0)
    one.row(1, 4.0, 0.0)
    one.evaluated(1, {"indicators/loss": 9.0})
    one.evaluated(1, EVALUATION)
    one.update(1000, 4.0, 5000.0)
    one.row(1000, 3.5, 5000.0)
    one.close()


def test_lines_without_a_terminal(monkeypatch, capsys):
    clock = iter((10.0, 10.0 + 999 * 0.5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    steps()
    out, err = capsys.readouterr()
    assert not err and out.splitlines() == [
        "step 1 of 2,000  loss 4.000",
        "held out at step 1: mean 2.500, a 2.000 (1.500 bits per byte), b 3.000 nats per token",
        "step 1,000 of 2,000  loss 3.500  held out 2.500  5,000 tokens/s  ETA 8 min",
    ]
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    steps(shown=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["0", "120"])
def test_a_terminal_has_a_bar_also_where_its_width_is_unknown(monkeypatch, columns):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("COLUMNS", columns)
    steps()
    assert "1000/2000" in err.getvalue() and "loss=4.000" in err.getvalue()
    assert "held out at step 1" in out.getvalue() and "ETA" not in out.getvalue()


def test_units_of_losses():
    for unit, text in (("images", "a 2.000 nats per image"), ("pairs", "a 2.000 per pair")):
        assert progress.held_out_text({"eval/a/loss": 2.0, f"eval/a/{unit}": 4.0}) == text
    assert progress.held_out_text({"loss": 2.0}) == ""


def test_counted_work_is_a_line_at_its_start_every_ten_seconds_and_at_its_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Counted("scores", "documents", total=2000, done=500, shown=True) as one:
        for _ in range(3):
            now[0] += 4.0  # the first update compiles and says nothing of the rate
            one.update(100)
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == [
        "scores: 500 of 2,000 documents",
        "scores: 800 of 2,000 documents, ETA 48 s",
        "scores: 800 of 2,000 documents in 12 s",
    ]
    with progress.Counted("scores", "documents", total=None, shown=True):
        pass
    with progress.Counted("scores", "documents", total=9, shown=False) as one:
        now[0] += 99.0
        one.update(9)
    assert capsys.readouterr().err.splitlines() == [
        "scores: 0 documents",
        "scores: 0 documents in 0 s",
    ]
    with pytest.raises(KeyboardInterrupt), progress.Counted("x", "documents", total=9, shown=True):
        raise KeyboardInterrupt  # unfinished work has no line of its end
    assert capsys.readouterr().err.splitlines() == ["x: 0 of 9 documents"]


def test_counted_work_is_a_bar_on_a_terminal(monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    with progress.Counted("scores", "documents", total=9, shown=True) as one:
        one.update(9)
    assert "9/9" in err.getvalue() and "of 9" not in err.getvalue()
