"""Settings and batch scripts for SLURM, with every word from outside quoted.

Only checked settings stand in #SBATCH lines. Paths, names and words of commands stand in
the body, quoted for bash. The body also opens the log: sbatch would replace % signs in its name.
"""

import dataclasses
import math
import os
import re
import shlex
from collections.abc import Sequence
from typing import ClassVar

from espalier.launch.submit.base import Job, SubmitError
from espalier.launch.submit.launch_config import Launch, texts

# Options that change the number of processes, which would each be a run of their own in one folder.
_OF_PROCESSES = {"array", "nodes", "N", "ntasks", "n", "ntasks-per-node"}
# Added to a measured need of memory.
_HEADROOM = 1.25
# Every process has a log; process 0 writes that of the job.
_TASK = (
    'log=$1; shift; [ "$SLURM_PROCID" = 0 ] || log=$log.task$SLURM_PROCID; exec "$@" >>"$log" 2>&1'
)

_END = (
    "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
    "id=${id:-$SLURM_JOB_ID}",
    "# Without a log, the first place that can be written gets the reason.",
    "lost() {",
    '  for place in "$SLURM_SUBMIT_DIR" "$HOME" /tmp; do',
    '    { echo "error: job $id on $(hostname): $1" >>"$place/slurm-$id.out"; } 2>/dev/null && break',
    "  done",
    "  end 2 2>/dev/null",
    "}",
    "end() {",
    '  printf \'{"id": "%s", "status": %d, "seconds": %d}\\n\' "$id" "$1" "$SECONDS" >"$log.ended.new"',
    '  mv -- "$log.ended.new" "$log.ended"',
    '  exit "$1"',
    "}",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Launch):
    """SLURM: what a job asks for, as the options of sbatch with these names.

    Attributes:
      partition, account, qos, constraint: as sbatch's; empty for the cluster's defaults.
      nodes: hosts of a run.
      tasks_per_node: processes on each host. One process for each GPU, or one for all.
      gpus_per_node: GPUs of each host; 0 for none.
      cpus_per_task: cores of each process; 0 for the default.
      memory: of each host, such as '64G', or '0' for all that it has; empty for the cluster's default, often a few GB for
        each core, or for the need of a sweep's run if it is known.
      time_limit: such as '24:00:00' or '2-00:00:00'; empty for the partition's.
      signal_seconds: seconds before the time limit at which a run saves and ends with status 75.
      requeues: times that a job is queued again after status 75 or a preemption.
      at_once: jobs of an array that run at once; 0 for no limit. An array that is queued already keeps its own.
      sbatch_flags: further options, each '--name' or '--name=value'.
      srun_flags: further options of srun, such as '--container-image=IMAGE'.
      logs: folder of the logs; empty for MODEL_DIR/logs.
      poll_seconds: seconds between questions to the scheduler.
    """

    BACKEND: ClassVar[str] = "slurm"
    SWEEPS: ClassVar[bool] = True

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    memory: str = ""
    time_limit: str = ""
    signal_seconds: int = 300
    requeues: int = 100
    at_once: int = 0
    sbatch_flags: tuple[str, ...] = ()
    srun_flags: tuple[str, ...] = ()
    logs: str = ""
    poll_seconds: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "nodes", "tasks_per_node", "signal_seconds")
        self.at_least(0, "gpus_per_node", "cpus_per_task", "requeues", "at_once")
        # These stand in #SBATCH lines, which sbatch reads with rules of its own.
        self.matching(r"[\w.,:/+-]+", "partition", "account", "qos", like="gpu")
        self.matching(r"[\w.,:/+&|*()\[\]=!-]+", "constraint", like="a100&ib")
        self.matching(r"\d+[KMGT]?", "memory", like="64G")
        self.matching(r"[\d:-]+", "time_limit", like="24:00:00")
        self.matching(r"--[a-z][a-z-]*(=[\w.,:/+@%*()\[\]=-]+)?", "sbatch_flags", like="--nice=5")
        self.matching(r"--?[a-z][a-z-]*(=[^\0\n]*)?", "srun_flags", like="--cpu-bind=cores")
        for key in ("sbatch_flags", "srun_flags"):
            names = {flag.lstrip("-").partition("=")[0] for flag in getattr(self, key)}
            if taken := sorted(names & _OF_PROCESSES):
                raise SubmitError(
                    f"{key}: {taken[0]} would start other processes than the run knows of: set nodes and tasks_per_node."
                )
        if self.gpus_per_node and self.tasks_per_node not in (1, self.gpus_per_node):
            raise SubmitError(
                f"tasks_per_node = {self.tasks_per_node}: with gpus_per_node = {self.gpus_per_node}, give 1 (one process "
                f"for all GPUs of a host) or {self.gpus_per_node} (one for each)."
            )

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        return ((self.nodes, "nodes"), (self.gpus_per_node, "GPUs")) if self.gpus_per_node else ()


def render(settings: Settings, jobs: Sequence[Job]) -> str:
    """Returns the script of one job, or of an array with a task for each of several jobs."""
    folder = shlex.quote(settings.directory)
    lines = ["#!/bin/bash", *_directives(settings, jobs), ""]
    lines += [
        "# SIGTERM is for the processes, which save; this shell waits for them.",
        "trap : TERM",
        *_variables(settings),
        *_choice(jobs),
        *_END,
        f'word=$(cd {folder} 2>&1 && mkdir -p -- "$(dirname -- "$log")" 2>&1 && {{ : >>"$log"; }} 2>&1) || lost "$word"',
        f"cd {folder}",
        'exec >>"$log" 2>&1',
        'SECONDS=$(cat -- "$log.seconds" 2>/dev/null)  # of earlier starts of this job',
        *_secrets(settings),
        f'srun {_srun_words(settings)}bash -c {shlex.quote(_TASK)} bash "$log" "${{words[@]}}"',
        "status=$?",
        "",
        "# 75: start again, as after 143, a SIGTERM before the run could handle it. Other statuses need a person.",
        'if [[ $status = 75 || $status = 143 ]] && [ ! -e "$log.cancelled" ]; then',
        "  # After `scancel`, or a preemption without grace, after which SLURM itself queues the job again.",
        '  [ "$(squeue -h -j "$id" -o %T)" != COMPLETING ] || { echo "cancelled or preempted by SLURM"; exit 75; }',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {settings.requeues} ]; then',
        '    echo "$SECONDS" >"$log.seconds"; scontrol requeue "$id" && exit 75',
        "  else",
        f'    echo "error: status $status after {settings.requeues} requeues, the limit (requeues): submit again to go on."',
        "  fi",
        "fi",
        'end "$status"',
    ]
    return "\n".join(lines) + "\n"


def _directives(settings: Settings, jobs: Sequence[Job]) -> list[str]:
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


def _variables(settings: Settings) -> list[str]:
    return [f"export {n}={shlex.quote(value)}" for n, value in settings.variables.items()]


def _secrets(settings: Settings) -> list[str]:
    """Returns lines that read secrets from files, which only the job's host needs to have."""
    return [
        f"{name}=$(cat -- {shlex.quote(os.path.expanduser(path))}) && export {name} || end 2"
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


def _srun_words(settings: Settings) -> str:
    words = ["--kill-on-bad-exit=0"]
    if settings.cpus_per_task:  # srun does not take it from sbatch
        words.append(f"--cpus-per-task={settings.cpus_per_task}")
    words += settings.srun_flags
    return "".join(f"{shlex.quote(word)} " for word in words)
