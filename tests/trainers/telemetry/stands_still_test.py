"""Stacks are written when a run stands still, and only then."""

import pathlib
import subprocess
import sys

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
