"""The pool: results in order, the error of one process, and processes that end with their parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from espalier.data.cache import pool
from tests.data.cache import piece_reader
from tests.data.cache.build_test import ROOT, Counter, children


def run(function, items, workers):
    bar = Counter()
    with pool.limited(workers):
        results = pool.run(function, items, what=str, bar=bar, unit="squares")
    assert bar.note.endswith(f" of {len(items)} squares")
    return results, bar.n


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_are_in_order_and_counts_are_summed(workers):
    assert run(piece_reader.square, [1, 2, 3, 4], workers) == ([1, 4, 9, 16], 10)
    with pytest.raises(ValueError) as error:
        run(piece_reader.square, [1, 5, 7, 5], workers)
    assert str(error.value) == "five"
    if workers > 1:  # where it was raised is not lost
        assert "in square" in error.value.__notes__[0]


def test_processes_are_others_and_import_little():
    own = {os.getpid()}
    assert set(run(piece_reader.process, [1, 2], 1)[0]) == own
    assert set(run(piece_reader.process, [1], 3)[0]) == own
    assert len({*run(piece_reader.process, [1, 2], 2)[0], *own}) == 3
    assert run(piece_reader.imported, [1, 2], 2)[0] == [[], []]


def test_what_others_cannot_load_runs_here(capfd):
    assert run(lambda item, report: item, [1, 2], 2)[0] == [1, 2]
    assert "in one process" in capfd.readouterr().err
    with pytest.raises(ValueError, match="workers is 0"):
        run(piece_reader.square, [1], 0)


# A shell ignores SIGINT in what it starts in the background, and children inherit that.
PROGRAM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from espalier.data.cache import pool
from tests.data.cache import piece_reader
from tests.data.cache.build_test import Counter
with pool.limited(2):
    pool.run(piece_reader.sleep, [60, 60], what=str, bar=Counter())
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(sent):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT))], stderr=subprocess.DEVNULL
    )
    while len(workers := children(process.pid)) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sent)
    assert process.wait(20) != 0
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
