"""What a run shows: lines without a terminal, a bar on one, and held-out losses on both; stacks only when it stands still."""

import io
import pathlib
import subprocess
import sys

import pytest

from espalier.trainers.telemetry import progress

EVALUATION = {
    "eval/a/loss": 2.0,
    "eval/a/tokens": 7.0,
    "eval/a/bits_per_byte": 1.5,
    "eval/b/loss": 3.0,
    "eval/b/tokens": 7.0,
    "indicators/loss": 9.0,
}


ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = """
import sys, time
from espalier.trainers.telemetry.progress import watching

def stand_still():
    time.sleep(0.7)

with watching(0.3) as progressed:
    for _ in range(8):
        time.sleep(0.1)
        progressed()
    print("progress", file=sys.stderr, flush=True)
    stand_still()
    print("end", file=sys.stderr, flush=True)
time.sleep(0.4)
with watching(None) as progressed:
    progressed()
    time.sleep(0.4)
"""


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


def test_stacks_are_written_while_nothing_happens():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    before, _, after = result.stderr.partition("progress\n")
    during, _, later = after.partition("end\n")
    assert before == later == ""
    assert during.startswith("Timeout (0:00:00.300000)!")
    assert "in stand_still" in during
