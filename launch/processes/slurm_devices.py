"""The GPUs of a process under SLURM.

JAX gives process i of a host its GPU i alone. With one process for all GPUs of a host, the others would be idle without a
sign; with --gpus-per-task, where a process sees only its own GPU, GPU i would be missing.
"""

import glob
import os
import re
from collections.abc import Mapping


def own_gpus() -> list[int] | None:
    """Returns the indices of this process's GPUs among the visible ones; None for JAX's own choice."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        len(list(filter(None, listed.split(","))))
        if listed is not None
        else len(glob.glob("/proc/driver/nvidia/gpus/*"))
    )
    return share(os.environ, visible)


def share(environment: Mapping[str, str], visible: int) -> list[int] | None:
    """Returns this process's part of the visible GPUs; None for JAX's own choice.

    Args:
      environment: the variables that srun sets.
      visible: number of GPUs that this process sees.
    """
    try:
        tasks = _expanded(environment["SLURM_STEP_TASKS_PER_NODE"])[
            int(environment["SLURM_NODEID"])
        ]
        local = int(environment["SLURM_LOCALID"])
    except (KeyError, ValueError, IndexError):
        return None
    if not visible or visible == tasks:
        return None
    if visible < tasks:  # each process sees its own only
        return list(range(visible))
    part = visible // tasks
    return list(range(local * part, (local + 1) * part))


def _expanded(counts: str) -> list[int]:
    """Returns the numbers in SLURM's '2(x3),1'."""
    numbers: list[int] = []
    for entry in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise ValueError(counts)
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers
