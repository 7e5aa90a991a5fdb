"""Compares both sides of a benchmark: starts them as processes, alternates them, and calculates ratios with intervals.

Absolute times on a shared machine are noisy; the ratio of two consecutive runs is much less so. A side is a process that
prints its reports as lines of JSON: one at its end (`measured`), or one for each request (`Side`).
"""

import contextlib
import ctypes
import functools
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
import psutil

from espalier.common.stages import duration

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONTENDED = 0.3  # cores busy with other programs; above this, wall times are unreliable
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers")
_TELL_SECONDS = 10.0
_PR_SET_CHILD_SUBREAPER = 36  # Linux
K, T = TypeVar("K"), TypeVar("T")
Report = dict[str, Any]


class PeerError(RuntimeError):
    """Raised if a side of a benchmark cannot be run."""


def ours(module: str, *arguments: str | int) -> list[str]:
    """Returns the command of this project's side: `side(*arguments)` of a module in tests/benchmarks."""
    return [sys.executable, "-m", "tests.benchmarks.ours", module, *map(str, arguments)]


def peer(script: str, *arguments: str | int, target: str = "peers") -> list[str]:
    """Returns the command of a script in tests/benchmarks, in the environment that `make TARGET` installs.

    Raises:
      PeerError: the environment is not installed.
    """
    folder = {"peers": ".venv-peers"}.get(target, f".venv-{target.removeprefix('peers-')}")
    python = ROOT / folder / "bin" / "python"
    if not python.exists():
        raise PeerError(f"{python} is missing: run `make {target}` first.")
    path = ROOT / "tests" / "benchmarks" / script
    return [str(python), "-P", str(path), *map(str, arguments)]


def _variables(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    # Both sides start as their users start them: only this project's launchers set malloc's tunables.
    return {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | dict(extra or {})


def measured(command: list[str], *, env: Mapping[str, str] | None = None) -> Report:
    """Runs a command; returns the JSON report in its last line of output, with 'other_load' (cores) and 'process_cpu_s' added.

    Raises:
      PeerError: the process failed.
    """
    output, use = timed(command, env=env)
    report = json.loads(output.strip().splitlines()[-1])
    return {**report, "process_cpu_s": use["process_cpu_s"], "other_load": use["other_load"]}


def timed(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> tuple[str, Report]:
    """Runs a command; returns its output, and {'wall_s', 'process_cpu_s', 'other_load' (cores)}, its children included.

    Raises:
      PeerError: the process failed.
    """
    variables = _variables(env) | {"BENCH_PROCESS_START": repr(time.time())}
    before, busy = time.perf_counter(), _busy_seconds()
    used = _used_by_children()
    with _orphans_adopted():
        process = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        wall = time.perf_counter() - before
    if process.returncode:
        *_, last = process.stderr.strip().splitlines() or [""]
        if last.startswith(("ModuleNotFoundError: ", "ImportError: ")):
            raise PeerError(f"{command[0]} cannot run this benchmark: {last}")
        status = f"ended with status {process.returncode}"  # negative: the signal that ended it
        raise PeerError(f"{' '.join(command)} {status}:\n{process.stderr[-2000:]}")
    cpu = _used_by_children() - used
    other = round(max(0.0, _busy_seconds() - busy - cpu) / wall, 2)
    return process.stdout, {"wall_s": wall, "process_cpu_s": cpu, "other_load": other}


@contextlib.contextmanager
def _orphans_adopted() -> Iterator[None]:
    """Waits on exit for processes whose parent ended before them, such as forkservers: else their time counts nowhere."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    finally:
        for child in psutil.Process().children():
            if child.pid not in before:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float:
    """Returns the CPU seconds of all programs since boot (Linux)."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


class Side:
    """A long-lived process that answers requests: lines of JSON with "op" and its arguments."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def ask(self, op: str, **arguments: Any) -> Report:
        """Sends a request and returns its answer.

        Raises:
          PeerError: the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
        for line in stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise PeerError(f"{' '.join(self._process.args)} ended; its errors are above.")


@contextlib.contextmanager
def side(command: list[str]) -> Iterator[Side]:
    """Starts a side that answers requests, and ends it on exit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=_variables(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Side(process)
    finally:
        process.kill()
        process.wait()


def alternate(
    calls: Mapping[K, Callable[[], T]], rounds: int, *, warm_up: int = 0
) -> dict[K, list[T]]:
    """Calls all functions in every round, in turns forwards and backwards; returns their results by name.

    Results of the first `warm_up` rounds, which are in addition to `rounds`, are dropped. What takes longer than a few seconds
    tells on standard error how far it is.
    """
    results: dict[K, list[T]] = {name: [] for name in calls}
    done, total = 0, (warm_up + rounds) * len(calls)
    began = shown = time.monotonic()
    for i in range(warm_up + rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            result = calls[name]()
            if i >= warm_up:
                results[name].append(result)
            done += 1
            if (now := time.monotonic()) - shown >= _TELL_SECONDS and done < total:
                shown, left = now, (now - began) / done * (total - done)
                text = f"{done} of {total} measurements, {name} last; about {duration(left)} left"
                print(text, file=sys.stderr, flush=True)
    return results


def alternate_processes(
    commands: Mapping[str, list[str]],
    rounds: int,
    *,
    env: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, list[Report]]:
    """Runs all commands in fresh processes in every round; returns their reports by name.

    Args:
      commands: by name.
      rounds: processes of each command.
      env: variables of a command's processes, by its name.
    """
    calls = {
        name: functools.partial(measured, command, env=(env or {}).get(name))
        for name, command in commands.items()
    }
    return alternate(calls, rounds)


def each(reports: Mapping[K, Sequence[Any]], key: str | Callable[[Any], Any]) -> dict[K, list[Any]]:
    """Returns one value of every report, by name."""
    read = key if callable(key) else lambda report: report[key]
    return {name: [read(report) for report in of_one] for name, of_one in reports.items()}


def contended(reports: Mapping[str, Sequence[Report]]) -> bool:
    """Returns whether other programs used more than CONTENDED cores in a run."""
    return any(report["other_load"] > CONTENDED for of_one in reports.values() for report in of_one)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Returns the median of numerator / denominator over pairs, with a 95 % bootstrap interval.

    Of up to five pairs the interval is their range, which has the true median in it with a probability of 1 - 2^(1-n).
    """
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    draws = np.random.default_rng(0).choice(ratios, (10_000, ratios.size))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "median": float(np.median(ratios)),
        "interval_95": [float(low), float(high)],
        "pairs": ratios.size,
    }


def largest_difference(losses: Sequence[float], peer_losses: Sequence[float]) -> float:
    """Returns the largest difference of losses of the same step."""
    return max(abs(a - b) for a, b in zip(losses, peer_losses, strict=True))


def environment() -> Report:
    """Returns facts about the machine and package versions, to interpret the figures."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor()
