"""Batch scripts for SLURM, with every word from outside quoted.

Only settings that launch/cluster/slurm.py has checked stand in #SBATCH lines. Paths, names and words of commands stand in
the body, quoted for bash. The body also opens the log: sbatch would replace % signs in its name.
"""

import math
import os
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.cluster.base import Job
from launch.cluster.launch_config import texts

if TYPE_CHECKING:
    from launch.cluster.slurm import Settings

# Added to a measured need of memory.
_HEADROOM = 1.25
# Every process has a log; process 0 writes that of the job.
_TASK = (
    'log=$1; shift; [ "$SLURM_PROCID" = 0 ] || log=$log.task$SLURM_PROCID; exec "$@" >>"$log" 2>&1'
)

_END = (
    "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
    "id=${id:-$SLURM_JOB_ID}",
    "end() {",
    '  printf \'{"id": "%s", "status": %d, "seconds": %d}\\n\' "$id" "$1" "$SECONDS" >"$log.ended.new"',
    '  mv -- "$log.ended.new" "$log.ended"',
    '  exit "$1"',
    "}",
)


def render(settings: "Settings", jobs: Sequence[Job]) -> str:
    """Returns the script of one job, or of an array with a task for each of several jobs."""
    lines = ["#!/bin/bash", *_directives(settings, jobs), ""]
    lines += [
        "# SIGTERM is for the processes, which save; this shell waits for them.",
        "trap : TERM",
        *_variables(settings),
        *_choice(jobs),
        *_END,
        f'cd {shlex.quote(settings.directory)} && mkdir -p "$(dirname "$log")" || end 2',
        'exec >>"$log" 2>&1',
        *_secrets(settings),
        f'srun {_srun_words(settings)}bash -c {shlex.quote(_TASK)} bash "$log" "${{words[@]}}"',
        "status=$?",
        "",
        "# 75: start again. Other statuses need a person.",
        'if [ "$status" = 75 ] && [ ! -e "$log.cancelled" ]; then',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {settings.requeues} ]; then',
        '    scontrol requeue "$id" && exit 75',
        "  else",
        f'    echo "error: status 75 after {settings.requeues} requeues, the limit (requeues): submit again to go on."',
        "  fi",
        "fi",
        'end "$status"',
    ]
    return "\n".join(lines) + "\n"


def _directives(settings: "Settings", jobs: Sequence[Job]) -> list[str]:
    name = re.sub(r"[^\w.-]+", "-", jobs[0].name, flags=re.ASCII).strip("-")[:64] or "espalier"
    options = {
        "job-name": name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "nodes": settings.nodes,
        "ntasks-per-node": settings.tasks_per_node,
        "gpus-per-node": settings.gpus_per_node or "",
        "cpus-per-task": settings.cpus_per_task or "",
        "mem": settings.memory or _memory(jobs),
        "time": settings.time_limit,
        "signal": f"TERM@{settings.signal_seconds}",
        "output": "/dev/null",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    lines += ["#SBATCH --requeue"]
    if len(jobs) > 1:
        limit = f"%{settings.at_once}" if settings.at_once else ""
        lines.append(f"#SBATCH --array=0-{len(jobs) - 1}{limit}")
    return [*lines, *(f"#SBATCH {flag}" for flag in settings.sbatch_flags)]


def _memory(jobs: Sequence[Job]) -> str:
    needs = [job.memory_gb for job in jobs]
    if None in needs:
        return ""
    return f"{math.ceil(max(filter(None, needs), default=0.0) * _HEADROOM * 1e9 / 2**20)}M"


def _variables(settings: "Settings") -> list[str]:
    return [f"export {n}={shlex.quote(value)}" for n, value in settings.variables.items()]


def _secrets(settings: "Settings") -> list[str]:
    """Returns lines that read secrets from files, which only the job's host needs to have."""
    return [
        f"{name}=$(cat -- {shlex.quote(path)}) && export {name} || end 2"
        for name, path in settings.secret_places.items()
    ]


def _choice(jobs: Sequence[Job]) -> list[str]:
    """Returns lines that set `log` and `words` of the job, or of the array's task."""
    if len(jobs) == 1:
        return _assignments(jobs[0])
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, job in enumerate(jobs):
        lines += [f"{index})", *(f"  {line}" for line in _assignments(job)), "  ;;"]
    return [*lines, "esac"]


def _assignments(job: Job) -> list[str]:
    own = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    words = " ".join(map(shlex.quote, texts(job.command)))
    return [*own, f"log={shlex.quote(os.path.abspath(*texts([job.log])))}", f"words=({words})"]


def _srun_words(settings: "Settings") -> str:
    words = ["--kill-on-bad-exit=0", *settings.srun_flags]
    return "".join(f"{shlex.quote(word)} " for word in words)
