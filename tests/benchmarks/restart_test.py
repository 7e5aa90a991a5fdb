"""The benchmark of restarts kills a process at updates, starts it again, and reads what that cost from its record."""

import subprocess
import sys

import pytest

from tests.benchmarks import restart
from tests.benchmarks.compare import ROOT, PeerError

# Makes an update each millisecond and saves every hundred.
PROGRAM = """
import pathlib, sys, time
from espalier.trainers.telemetry.goodput import Goodput
from espalier.trainers.telemetry.lifetime import FILE, Lifetime
run = pathlib.Path([word for word in sys.argv if "MODEL_DIR" in word][0].partition("=")[2])
run.mkdir(exist_ok=True)
goodput = Goodput()

def write(text):
    (run / "new").write_text(text)
    (run / "new").replace(run / FILE)

with Lifetime(str(run / FILE), write, goodput, pause=0.01) as life:
    with goodput.measure("restore"):
        time.sleep(0.05)
    first = life.starts[-2].step // 100 * 100 if len(life.starts) > 1 else 0
    life.goes_on_from(first, of_run=True)
    for step in range(first + 1, 10**6):
        time.sleep(0.001)
        life.reached(step)
        if step % 100 == 0:
            life.saved(step)
"""


def test_kills_are_counted_with_what_they_cost(monkeypatch, tmp_path):
    started = []

    def start(command):
        started.append(command)
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *command], cwd=ROOT)

    monkeypatch.setattr(restart, "_start", start)
    figures = restart.run(kills=2)
    for name in ("shared", "shared_and_local"):
        of_tier = figures[name]
        assert len(of_tier["seconds_to_next_update"]["all"]) == 2
        assert 0.05 < of_tier["seconds_to_next_update"]["median"] < 60
        assert 0 < of_tier["processor_seconds_to_next_update"]["median"] < 60
        assert of_tier["start_up_seconds"]["restore"]["median"] >= 0.05
        assert len(of_tier["lost_updates"]) == 2 and all(n < 100 for n in of_tier["lost_updates"])
        assert any(of_tier["lost_updates"])
    assert len(started) == 6
    local = [any("local_checkpoints.gin" in word for word in words) for words in started]
    assert local == [False] * 3 + [True] * 3


def test_a_run_that_ends_is_an_error(monkeypatch):
    def start(command):
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])

    monkeypatch.setattr(restart, "_start", start)
    with pytest.raises(PeerError, match="the run ended with status 2"):
        restart.run(kills=1)
