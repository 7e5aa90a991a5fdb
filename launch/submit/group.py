"""Runs the processes of one run on this machine, and starts them again after status 75, up to a limit.

`espalier submit` uses it for its local configurations, and the hosts of a TPU pod for one process each.

  python -m espalier.launch.submit.group --processes=2 --restarts=3 --log=/tmp/run/log.txt -- espalier train --gin_file=...
"""

if __name__ == "__main__":
    from espalier.launch.submit import group

    raise SystemExit(group.main())

import contextlib
import dataclasses
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Annotated, ClassVar

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File, Folder
from espalier.launch.processes import supervisor
from espalier.launch.submit.base import SubmitError
from espalier.launch.submit.launch_config import Launch

if TYPE_CHECKING:
    from espalier.launch.submit.local import LocalSubmitter

_FLAGS = ("processes", "restarts", "log", "folder", "secret")
# Seconds for which a process may outlive one that has failed: it sees the loss after --heartbeat_timeout (100 s), and says so.
_PEER_SECONDS = 150.0
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Launch):
    """This machine: a run in one process for all its devices, or in several.

    Attributes:
      processes_here: processes of a run. One process uses all devices; several need a number of devices for each, for
        example by CUDA_VISIBLE_DEVICES or on CPU.
      restarts: times that a run is started again after status 75, when a process of it was lost.
      devices_here: devices of the machine, to check the mesh before the start; 0 if unknown.
      logs: folder of the logs; empty for MODEL_DIR/logs.
    """

    BACKEND: ClassVar[str] = "local"
    FOREGROUND: ClassVar[bool] = True

    processes_here: int = 1
    restarts: int = 3
    devices_here: int = 0
    logs: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "processes_here")
        self.at_least(0, "restarts", "devices_here")
        if not os.path.isdir(self.directory):
            raise SubmitError(f"folder = {self.folder!r}: there is no such folder on this machine.")

    @property
    def directory(self) -> str:
        return os.path.abspath(super().directory)

    @property
    def processes(self) -> int:
        return self.processes_here

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        return ((self.devices_here, "devices"),) if self.devices_here else ()

    @property
    def join_flags(self) -> tuple[str, ...]:
        return ()  # each start has a new address

    def group_command(self, command: Sequence[str], log: str) -> tuple[str, ...]:
        """Returns the command that runs a command in all processes."""
        flags = [f"--processes={self.processes}", f"--restarts={self.restarts}", f"--log={log}"]
        if self.folder:
            flags.append(f"--folder={self.directory}")
        return (sys.executable, *self.in_group(command, *flags))

    def submitter(self) -> "LocalSubmitter":
        from espalier.launch.submit.local import LocalSubmitter

        return LocalSubmitter()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    own, command = words, []
    if "--" in words:
        place = words.index("--")
        own, command = words[:place], words[place + 1 :]
    parser = cli.make_parser(__doc__ or "", "python -m espalier.launch.submit.group")
    setting_flags.add(parser, run, names=_FLAGS)
    flags = parser.parse_args(own)
    settings = setting_flags.given(flags, run, _FLAGS)
    if not command or settings.get("processes", 1) < 1 or settings.get("restarts", 0) < 0:
        parser.error("give at least one process, no negative --restarts, and the command after --")
    return cli.status_of(lambda: run(command, **settings))


def _secret(entry: str) -> tuple[str, str]:
    name, _, path = entry.partition("=")
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            return name, file.read().strip()
    except OSError as error:
        raise SubmitError(
            f"secrets: the file {path!r} of {name} cannot be read: {error.strerror}."
        ) from None


def run(
    command: Sequence[str],
    *,
    processes: int = 1,
    restarts: int = 0,
    log: File | None = None,
    folder: Folder | None = None,
    secret: Sequence[Annotated[str, "NAME=FILE"]] = (),
) -> int:
    """Runs a command in several processes that join each other; returns the exit status that decides.

    An error (1 to 127 except 75) decides over 75, and 75 over other statuses. A process that hangs after another one has failed is
    killed, and counts as 75. A signal to this process goes to all of them, and then nothing is started again.

    Args:
      command: the command.
      processes: processes.
      restarts: starts after status 75.
      log: FILE.task1 and so on have the output of further processes.
      folder: working directory of the processes (this one's).
      secret: a variable of the processes whose value is in a file; repeatable.

    Raises:
      SubmitError: the file of a secret cannot be read.
    """
    environment = {**os.environ, **dict(map(_secret, secret))}
    stopping: list[int] = []
    for attempt in range(restarts + 1):
        flags = _join_flags(processes)
        with contextlib.ExitStack() as stack:
            children = [
                subprocess.Popen(
                    [*command, *flags, *([f"--process_index={i}"] if flags else [])],
                    stdout=(output := _log(stack, log, i)),
                    stderr=subprocess.STDOUT if output is not None else None,
                    env=environment,
                    cwd=folder,
                    start_new_session=True,  # a signal to this process's group comes once, from here
                    preexec_fn=supervisor.die_with_parent,
                )
                for i in range(processes)
            ]
            with supervisor.forwarded(children) as signals:
                statuses = _statuses(children, signals)
            stopping += signals
        lost = cli.INTERRUPTED
        status = max(statuses, key=lambda one: (0 < one < 128 and one != lost, one == lost, one))
        if status != cli.INTERRUPTED or stopping or attempt == restarts:
            break
        print(f"status 75: start {attempt + 1} of {restarts} after the first.", flush=True)
    if status == cli.INTERRUPTED and restarts and not stopping:
        print(f"error: status 75 after {restarts} restarts, the limit (restarts).", file=sys.stderr)
    return status


def _statuses(children: Sequence[subprocess.Popen], signals: Sequence[int]) -> list[int]:
    """Returns the exit statuses of processes; 75 for those that are killed because they outlive a failed one.

    After a signal to this process nothing is killed: one that is still running may be saving.
    """
    until = math.inf
    while running := [child for child in children if child.poll() is None]:
        if any(child.returncode for child in children):
            until = min(until, time.monotonic() + _PEER_SECONDS)
        if time.monotonic() > until and not signals:
            break
        time.sleep(_POLL_SECONDS)
    for child in running:
        child.kill()
        child.wait()
    return [
        cli.INTERRUPTED if child in running else supervisor.shell_status(child.returncode)
        for child in children
    ]


def _join_flags(processes: int) -> list[str]:
    if processes == 1:
        return []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [f"--coordinator_address=localhost:{port}", f"--process_count={processes}"]


def _log(stack: contextlib.ExitStack, log: str | None, index: int) -> IO[bytes] | None:
    """Returns the log of a process; None for this process's own output."""
    if log is None or index == 0:
        return None
    return stack.enter_context(open(f"{log}.task{index}", "ab"))
