"""The processes of one run: each joins the others, watches whether they live, and ends with a reason when one is lost.

A process that has lost another can neither go on nor save. It ends with status 75 (start all processes again), or with
the status of the other process if that ended with an error (starting again would not help).

JAX aborts a process whose coordinator, process 0, is gone; that is what launch/processes/supervisor.py is for.

Under SLURM, JAX gives process i of a host its GPU i alone. With one process for all GPUs of a host, the others would be idle without a
sign; with --gpus-per-task, where a process sees only its own GPUs, GPU i would be missing or the others idle.
"""

import contextlib
import glob
import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from espalier.common import stages

START_AGAIN = os.EX_TEMPFAIL  # 75
# A file in which a process leaves {"run": its directory, "status": its exit status} for its supervisor.
STATUS_FILE = "ESPALIER_STATUS_FILE"
_KEYS = "espalier"  # prefix of the keys in the coordinator's store
_FOREVER_MS = 24 * 3600 * 1000


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
    per_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # '2' or 'a100:2'
    if visible < tasks or per_task == str(visible):  # each process sees its own only
        return list(range(visible)) or None
    if visible == tasks:
        return None
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


class JoinError(RuntimeError):
    """The processes of a run did not come together."""


class NoClusterError(ValueError):
    """JAX cannot find the other processes by itself."""


def store() -> Any:
    """Returns the client of the coordinator: its store of keys, barriers and the list of live processes."""
    from jax._src import distributed  # it has no public name

    return distributed.global_state.client


class Peers:
    """The other processes of this process's run.

    Args:
      address: of the coordinator, for messages.
      timeout: seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, address: str, timeout: int):
        import jax

        self._client = store()
        self._address, self._timeout = address, timeout
        self._index, self._count = jax.process_index(), jax.process_count()
        self._done = threading.Event()
        self._client.key_value_set(self._key("host", self._index), platform.node())
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def _key(self, kind: str, index: int) -> str:
        return f"{_KEYS}/{kind}/{index}"

    def _watch(self) -> None:
        """Ends this process when another is lost."""
        pause = min(2.0, self._timeout / 4)
        while not self._done.wait(pause):
            try:
                # All live processes meet in this call, so it returns at most `timeout` seconds after one is lost.
                live = self._client.get_live_nodes(list(range(self._count)))
            except Exception:  # noqa: BLE001 (the coordinator is gone: JAX aborts this process)
                return
            gone = sorted(set(range(self._count)) - set(live))
            lost = [index for index in gone if self._stored("left", index) is None]
            if lost and not self._done.is_set():
                self._end(lost[0], pause)

    def _end(self, lost: int, pause: float) -> NoReturn:
        status, reason = self._reason_of(lost)
        print(f"\nerror: {reason} {advice(_read_status().get('run'), status)}", file=sys.stderr)
        _write_status(status=status)
        sys.stdout.flush()
        sys.stderr.flush()
        if self._index == 0:
            time.sleep(2 * pause)  # the others learn of the loss from this process
        os._exit(status)  # threads of JAX wait for the lost process

    def _reason_of(self, lost: int) -> tuple[int, str]:
        """Returns the status to end with, and a sentence about a lost process."""
        host = self._stored("host", lost)
        name = f"process {lost} of {self._count}{f' on {host}' if host else ''}"
        if ended := self._stored("ended", lost):
            status, message = json.loads(ended)
            return status, f"{name} has ended with status {status}: {message}"
        return START_AGAIN, (
            f"{name} is lost: it has ended, hangs, or cannot be reached, and gave no sign of life for {self._timeout} s."
        )

    def _stored(self, kind: str, index: int) -> str | None:
        with contextlib.suppress(Exception):  # the key is not there
            return self._client.key_value_try_get(self._key(kind, index))
        return None

    def leave(self) -> None:
        """Waits for the others at the end of the work, and leaves; the coordinator leaves last."""
        self._client.wait_at_barrier(
            f"{_KEYS}/end", _FOREVER_MS
        )  # `_watch` ends it if a process is lost
        self._go()

    def _go(self) -> None:
        """Leaves, after a barrier that all have passed; the coordinator leaves last."""
        import jax

        self._client.key_value_set(self._key("left", self._index), "")
        self._done.set()
        self._thread.join(self._timeout)
        # The call returns when all others have left, are lost, or watch in it and have yet to learn that all are here.
        while self._index == 0 and len(self._client.get_live_nodes(list(range(self._count)))) > 1:
            pass
        jax.distributed.shutdown()

    def fail(self, error: BaseException, status: int) -> None:
        """Tells the others why this process ends, or ends it with the reason if another is lost.

        Args:
          error: the error.
          status: exit status of this process; 1 for an error that may come from the loss of another process.
        """
        if status == 1 and isinstance(error, RuntimeError | ValueError | OSError):
            self._thread.join(self._timeout + 10)  # `_watch` ends this process if it finds a loss
        message = str(error).strip().partition("\n")[0][:500] or type(error).__name__
        with contextlib.suppress(Exception):  # the coordinator may be gone
            self._client.key_value_set(
                self._key("ended", self._index), json.dumps([status, message])
            )
            self._client.wait_at_barrier(f"{_KEYS}/failed", 5000)  # all may have the same error
            self._go()  # else JAX aborts those that leave after the coordinator
        self._done.set()


@contextlib.contextmanager
def joined(
    address: str | None,
    count: int | None,
    index: int | None,
    *,
    initialization_timeout: int,
    heartbeat_timeout: int,
    status_of: Callable[[BaseException], int],
) -> Iterator[None]:
    """Context manager: connects the processes of one run; does nothing for a single process.

    Args:
      address: HOST:PORT of process 0, or 'auto' to let jax detect everything from the cluster (TPU pods, SLURM,
        Open MPI); None for a single process.
      count: number of processes.
      index: index of this process, from 0.
      initialization_timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
      status_of: exit status of this process after an error.

    Raises:
      JoinError: not all processes came in time.
      NoClusterError: 'auto' outside of a cluster.
    """
    if address is None:
        yield
        return
    import jax

    # Without this, JAX aborts all processes when one is lost, with no word on which.
    jax.config.update("jax_enable_recoverability", True)
    arguments: tuple[Any, Any, Any, Any] = (address, count, index, None)
    if address == "auto":
        arguments = (None, None, None, own_gpus())
    late = (
        f"the processes of this run did not come together at {address} within {initialization_timeout} s. Start "
        f"{count or 'all'} processes with the same --coordinator_address, and --process_index from 0; "
        "--initialization_timeout waits longer."
    )
    _write_status(joining=late)  # JAX may abort this process
    try:
        with stages.stage("waiting for the other processes"):
            jax.distributed.initialize(
                *arguments,
                initialization_timeout=initialization_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
    except Exception as error:
        # Errors of the connection have a class of their own; the search for a cluster raises many others.
        searching = address == "auto" and not isinstance(error, jax.errors.JaxRuntimeError)
        if isinstance(error, RuntimeError) and not searching:
            raise JoinError(late) from error
        if not searching:
            raise
        _write_status(joining=None)
        raise NoClusterError(_no_cluster(error)) from error
    _write_status(joining=None)
    peers = Peers(address, heartbeat_timeout)
    try:
        yield
    except BaseException as error:
        peers.fail(error, status_of(error))
        raise
    peers.leave()


def _no_cluster(error: Exception) -> str:
    """Returns a message for an error of JAX's search for a cluster."""
    where = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_NODELIST" not in os.environ
    remedy = "Inside a SLURM job, start the processes with srun. " if where else ""
    return (
        f"--coordinator_address=auto: jax finds no cluster that it knows (TPU pod, SLURM, Open MPI) from here: "
        f"{str(error).strip() or type(error).__name__} {remedy}Give HOST:PORT of process 0 with --process_count and "
        "--process_index, or remove the flag for one process."
    )


def note_run(path: str) -> None:
    """Notes the directory of this process's run, for messages about lost processes."""
    _write_status(run=path)


def advice(run: str | None, status: int) -> str:
    """Returns sentences on the newest checkpoint of a run and on what to do after a loss."""
    if status != START_AGAIN:
        return "Starting again would end in the same way: mend the cause first."
    return f"{_newest(run)}To go on, start all processes again with the same command."


def _newest(run: str | None) -> str:
    from espalier.trainers.checkpoints import step_dir

    if run is not None:
        with contextlib.suppress(Exception):  # no checkpoint, or none that can be read
            for step in step_dir.candidates(run):
                step_dir.read_manifest(step)
                return f"The newest good checkpoint is {step}. "
        return f"{run} has no checkpoint yet. "
    return ""


def _read_status() -> dict[str, Any]:
    with contextlib.suppress(KeyError, OSError, ValueError), open(os.environ[STATUS_FILE]) as file:
        return json.load(file)
    return {}


def _write_status(**facts: Any) -> None:
    if path := os.environ.get(STATUS_FILE):
        content = json.dumps({**_read_status(), **facts})
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
