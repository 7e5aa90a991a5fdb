"""A lock in an object store: of several processes on any hosts, one holds an address.

The lock is an object, `<address>/.lock.<number>`, which is created only if it is not there. Its holder writes it again every
few seconds. A lock that does not change for a while is of a process that was killed: the next one creates the following
number. A holder that finds a higher number, or its own object gone, has lost the lock (it was cut off for longer than that)
and must not write.
Clocks of hosts are not compared: whoever waits measures with its own.
"""

import json
import logging
import os
import platform
import re
import threading
import time
import uuid

from espalier.common.storage import paths

BEAT_SECONDS = 5.0
STALE_SECONDS = 25.0
_log = logging.getLogger(__name__)


class HeldError(BlockingIOError):
    """Another process holds the lock; the message is its name."""


class LostLockError(paths.StoreError):
    """Another process has taken the lock of this one."""


class StoreLock:
    """A lock that this process holds from its making until `close`."""

    def __init__(
        self,
        address: str,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ):
        """Takes the lock of an address; waits up to `stale_seconds` to see whether the holder of a lock is alive.

        Raises:
          HeldError: another process holds it.
          StoreError: the store refuses, or has no such bucket.
        """
        self._address = address
        self._beat_seconds = beat_seconds
        self._content = {
            "holder": f"process {os.getpid()} on {platform.node()}",
            "pid": os.getpid(),
            "boot": _boot(),
        }
        self._content["token"] = uuid.uuid4().hex
        self._beats = 0
        self._lost: str | None = None
        self._closed = threading.Event()
        stale = self._wait_for_stale(stale_seconds)
        self._number = max(stale, default=0) + 1
        if not paths.create(self._name(self._number), self._next()):
            raise HeldError(_holder(self._read(self._number)))
        others = set(self._numbers()) - stale - {self._number}
        if others:  # created at the same moment, after another number was deleted
            paths.delete(self._name(self._number))
            raise HeldError(_holder(self._read(max(others))))
        paths.delete(*map(self._name, sorted(stale)))
        self._thread = threading.Thread(target=self._beat, name="store lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LostLockError if another process has taken the lock."""
        if self._lost is not None:
            raise LostLockError(
                f"{self._address}: {self._lost} has taken this run, because this process could not reach the store for more "
                f"than {STALE_SECONDS:.0f} s. Only one of them may go on; this one ends."
            )

    def close(self) -> None:
        """Gives the lock back."""
        self._closed.set()
        self._thread.join()
        try:
            if self._lost is None and self._is_held():
                paths.delete(self._name(self._number))
        except paths.StoreError as error:
            _log.warning("%s The lock counts as left after %.0f s.", error, STALE_SECONDS)

    def _name(self, number: int) -> str:
        return paths.join(self._address, f".lock.{number}")

    def _numbers(self) -> list[int]:
        names = paths.names(self._address)
        return [int(match[1]) for name in names if (match := re.fullmatch(r"\.lock\.(\d+)", name))]

    def _read(self, number: int) -> dict:
        try:
            content = json.loads(paths.read(self._name(number)))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _next(self) -> bytes:
        self._beats += 1
        return json.dumps({**self._content, "beats": self._beats}).encode()

    def _wait_for_stale(self, seconds: float) -> set[int]:
        """Returns the numbers of locks whose holders are dead; raises HeldError for one that is alive."""
        numbers = self._numbers()
        before = {number: self._read(number) for number in numbers}
        waiting = {
            number for number, content in before.items() if content and not _is_dead(content)
        }
        until = time.monotonic() + seconds
        while waiting:
            for number in sorted(waiting):
                now = self._read(number)
                if not now:  # given back
                    waiting.discard(number)
                elif now != before[number]:
                    raise HeldError(_holder(now))
            if time.monotonic() > until:
                break
            time.sleep(min(1.0, self._beat_seconds))
        return set(numbers)

    def _is_held(self) -> bool:
        """Returns whether no other process has taken the lock, also one that has given it back since; notes the holder."""
        last = self._read(max([self._number, *self._numbers()]))
        if last.get("token") != self._content["token"]:
            self._lost = _holder(last)
        return self._lost is None

    def _beat(self) -> None:
        while not self._closed.wait(self._beat_seconds):
            try:
                if not self._is_held():
                    return
                paths.write(self._name(self._number), self._next())
            except (
                Exception
            ) as error:  # the next beat tries again; others may take the lock meanwhile
                _log.warning("the lock of %s cannot be renewed now: %s", self._address, error)


def _holder(content: dict) -> str:
    return str(content.get("holder") or "another process")


def _boot() -> str:
    """Returns what tells this start of this machine from others; empty where that is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_dead(content: dict) -> bool:
    """Returns whether a lock is of a process of this machine that has ended."""
    pid = content.get("pid")
    if not _boot() or content.get("boot") != _boot() or type(pid) is not int:
        return False
    if (
        content.get("holder") != f"process {pid} on {platform.node()}"
    ):  # a container has its own processes
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
