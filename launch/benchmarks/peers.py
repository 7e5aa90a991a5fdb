"""Runs one side of a benchmark in a fresh process and measures the load from other programs."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
CONTENDED = 0.3  # cores busy with other programs; above this, wall times are unreliable


class PeerError(RuntimeError):
    """Raised if a side of a benchmark cannot be run."""


def run(
    side: str, folder: str, *, steps: int, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs one side in a fresh process; returns its report, with 'other_load' (cores) added.

    Args:
      side: 'ours', or a mode of llama_torch.py for the peer.
      folder: folder that case.write or moe_case.write wrote.
      steps: number of training steps.
      env: environment variables to set.

    Raises:
      PeerError: the peer is not installed, or the process failed.
    """
    if side == "ours":
        command = [sys.executable, "-m", "launch.benchmarks.jax.llama_jax", folder, str(steps)]
    else:
        command = peer_command("llama_torch.py", folder, side, str(steps))
    return measured(command, env=env)


def peer_command(script: str, *arguments: str) -> list[str]:
    """Returns the command of a script in launch/benchmarks/torch, in the peers' environment.

    Raises:
      PeerError: the environment is not installed.
    """
    if not PEER_PYTHON.exists():
        raise PeerError(f"{PEER_PYTHON} is missing: run `make peers` first.")
    return [
        str(PEER_PYTHON),
        "-P",
        str(ROOT / "launch" / "benchmarks" / "torch" / script),
        *arguments,
    ]


def measured(command: list[str], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs a command; returns the JSON report in its last line of output, with 'other_load' (cores) added.

    Raises:
      PeerError: the process failed.
    """
    # Both sides start as their users start them: only this project's launchers set malloc's tunables.
    variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    variables.update(env or {})
    variables["BENCH_PROCESS_START"] = repr(time.time())
    before, busy = time.perf_counter(), _busy_seconds()
    used = _used_by_children()
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, errors = process.communicate()
    if process.returncode:
        status = f"ended with status {process.returncode}"  # negative: the signal that ended it
        raise PeerError(f"{' '.join(command)} {status}:\n{errors[-2000:]}")
    wall = time.perf_counter() - before
    other_seconds = (_busy_seconds() - busy) - (_used_by_children() - used)
    report = json.loads(out.strip().splitlines()[-1])
    report["other_load"] = round(max(0.0, other_seconds) / wall, 2)
    return report


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float:
    """Returns the CPU seconds of all programs since boot (Linux)."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
