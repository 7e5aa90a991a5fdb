"""Seconds from SIGKILL to the next update of a run of the quickstart's size, with warm caches, and the updates lost.

The run is killed again and again and started at once, as a launcher would. A first start, which is not counted, fills
the caches of tokens and of compiled programs.
"""

import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil

from espalier.trainers.telemetry import lifetime
from espalier.trainers.telemetry.goodput import START_PARTS
from tests.benchmarks import compare

CONFIG = "t5x_configs/experiments/code_mix/quickstart_text.gin"
LOCAL = "t5x_configs/runs/local_checkpoints.gin"
PERIOD = 20  # updates between local saves
SHARED_PERIOD = 100
_EVERY = 70  # updates between kills, at least
_LONGEST = 900.0  # seconds to wait for an update
_T = TypeVar("_T")


def run(*, kills: int = 3) -> dict[str, Any]:
    """Kills a run `kills` times with shared checkpoints alone, and as often with a local tier."""
    with tempfile.TemporaryDirectory() as folder:
        tiers = {"shared": [], "shared_and_local": _local(folder)}
        return {
            "updates_between_saves": {"shared": SHARED_PERIOD, "local": PERIOD},
            **{
                name: _killed(os.path.join(folder, name), kills, more)
                for name, more in tiers.items()
            },
        }


def _local(folder: str) -> list[str]:
    return [
        f"--gin_file={LOCAL}",
        f"--gin.LOCAL_CHECKPOINT_DIR={folder}/disk",
        f"--gin.LOCAL_CHECKPOINT_PERIOD={PERIOD}",
    ]


def _killed(run: str, kills: int, more: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "espalier.launch.train",
        f"--gin_file={CONFIG}",
        f"--gin.MODEL_DIR={run}",
    ]
    # Longer than the quickstart, so that it does not end before the last kill.
    command += [f"--gin.CHECKPOINT_PERIOD={SHARED_PERIOD}", "--gin.TRAIN_STEPS=5000", *more]
    command += ["--gin.EVAL_PERIOD=5000"]
    process = _start(command)
    seconds: list[float] = []
    processor: list[float] = []
    load: list[float] = []
    try:
        _wait_for_update(process, run, 1)
        for kill in range(1, kills + 1):
            _wait_for_step(process, run, kill * _EVERY)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed, load_then = time.time(), os.getloadavg()[0]
            process = _start(command)
            start = _wait_for_update(process, run, kill + 1)
            used = psutil.Process(process.pid).cpu_times()
            processor.append(used.user + used.system)
            assert start.first_step_at is not None
            seconds.append(start.first_step_at - killed)
            load.append(load_then)
    finally:
        process.kill()
        process.wait()
    starts = lifetime.read(os.path.join(run, lifetime.FILE))
    again = starts[1:]
    return {
        "seconds_to_next_update": _spread(seconds),
        "processor_seconds_to_next_update": _spread(processor),
        "start_up_seconds": {
            part: _spread([start.seconds.get(part, 0.0) for start in again]) for part in START_PARTS
        },
        "lost_updates": [start.lost_steps for start in starts[:-1]],
        "load_at_kills": load,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "all": [round(value, 2) for value in values]}


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=compare.ROOT, stdout=subprocess.DEVNULL)


def _wait_for_update(process: subprocess.Popen, run: str, number: int) -> lifetime.Start:
    """Returns the record of a run's start of this number, once it has made an update."""
    path = pathlib.Path(run, lifetime.FILE)

    def made() -> lifetime.Start | None:
        starts = lifetime.read(path) if path.exists() else []
        there = len(starts) == number and starts[-1].first_step_at is not None
        return starts[-1] if there else None

    return _wait(process, made)


def _wait_for_step(process: subprocess.Popen, run: str, step: int) -> None:
    path = pathlib.Path(run, lifetime.FILE)
    _wait(process, lambda: lifetime.read(path)[-1].step >= step or None)


def _wait(process: subprocess.Popen, ready: Callable[[], _T | None]) -> _T:
    until = time.monotonic() + _LONGEST
    while (result := ready()) is None:
        if process.poll() is not None:
            raise compare.PeerError(f"the run ended with status {process.returncode}.")
        if time.monotonic() > until:
            raise compare.PeerError(f"the run made no update in {_LONGEST:.0f} s.")
        time.sleep(0.05)
    return result
