"""A row about object stores: SIGKILL at random requests of a run whose directory is in a bucket.

The store is a server on this machine (object_stores.py) in a process of its own. It kills its client when the request comes
that the case has chosen, so that a kill can be between any two objects of a save.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import random
import signal
import threading
from collections.abc import Iterator

from espalier.common.storage import mirror
from tests.faults import kills, object_stores, program
from tests.faults.table import Bench, Case, NotTried, Row, Unclear

_CHAINS, _KILLS = 6, 5  # of each store
_REQUESTS = 80  # a whole run sends about 110 that change an object


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A bucket of a running store.

    Attributes:
      environment: variables that lead clients to the store.
      plan: file that names the client to kill; see Killer.
    """

    address: str
    environment: dict[str, str]
    plan: pathlib.Path


class Killer:
    """The fault of a store that kills a client at one of its requests.

    The file `plan` has the client's process id, the number of the request among those that change an object, and whether
    the store still executes it.
    """

    def __init__(self, plan: pathlib.Path):
        self._plan = plan
        self._lock = threading.Lock()
        self._client, self._requests = 0, 0

    def __call__(self, method: str, path: str) -> int | None:
        if method in ("GET", "HEAD"):
            return None
        try:
            client, at, executed = json.loads(self._plan.read_text())
        except FileNotFoundError:
            return None
        with self._lock:
            self._requests = self._requests + 1 if client == self._client else 1
            self._client = client
            if self._requests != at:
                return None
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(client, signal.SIGKILL)
        return None if executed else 503


@contextlib.contextmanager
def _bucket(bench: Bench, scheme: str) -> Iterator[_Bucket]:
    """Starts a store with an empty bucket.

    Raises:
      NotTried: its package is not installed.
    """
    package = object_stores.PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise NotTried(f"{package} is not installed (pip install -e '.[test_stores]')")
    plan = bench.folder / "plan.json"
    reading, writing = os.pipe()

    def serve() -> None:
        os.close(reading)
        with getattr(object_stores, scheme)() as store:
            store.new_bucket()
            store.fault = Killer(plan)
            os.write(writing, json.dumps([store.address, store.environment]).encode() + b"\n")
            signal.pause()

    server = program.fork(bench, serve)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            line = pipe.readline()
        if not line:
            raise Unclear(f"the store did not start: ...{server.text[-500:]}")
        yield _Bucket(*json.loads(line), plan=plan)
    finally:
        server.signal(signal.SIGKILL)
        server.wait()


def _kills(seed: int) -> Iterator[Case]:
    del seed
    for scheme in object_stores.PACKAGES:
        for number in range(_CHAINS):
            act = functools.partial(_chain, scheme, f"{scheme} {number}")
            name = f"{_KILLS} kills at random requests to {scheme}, chain {number}"
            yield Case(name, act, 2400, own_process=True)


def _chain(scheme: str, name: str, bench: Bench) -> int:
    choice = bench.random(name)
    with _bucket(bench, scheme) as bucket:
        return kills.chain(
            bench,
            _KILLS,
            kill=lambda run: _kill(bench, bucket, run, choice),
            train=lambda run: program.train(
                bench, f"{bucket.address}/{run}", environment=_host(bench, bucket, choice)
            ),
            local=functools.partial(_copy, bench, bucket),
        )


def _host(bench: Bench, bucket: _Bucket, choice: random.Random) -> dict[str, str]:
    """Returns the variables of one of two hosts, whose copies of a run's files are in folders of their own."""
    return {**bucket.environment, mirror.COPIES: str(bench.folder / f"host_{choice.randrange(2)}")}


def _kill(bench: Bench, bucket: _Bucket, run: str, choice: random.Random) -> program.Process:
    """Kills a start at a random one of its requests that change an object."""
    at, executed = choice.randrange(1, _REQUESTS), choice.random() < 0.5

    def plan() -> None:
        partial = bucket.plan.with_suffix(".new")
        partial.write_text(json.dumps([os.getpid(), at, executed]))
        partial.replace(bucket.plan)

    address, host = f"{bucket.address}/{run}", _host(bench, bucket, choice)
    try:
        return kills.killed(program.train(bench, address, before=plan, environment=host))
    finally:
        bucket.plan.unlink(missing_ok=True)  # the next process may get the same id


def _copy(bench: Bench, bucket: _Bucket, run: str) -> pathlib.Path:
    """Returns a new folder of this machine with a run's objects as they are now."""
    target = bench.folder / f"copy_{len(list(bench.folder.glob('copy_*')))}"
    # In a process of its own: a client of a store cannot be used after a fork.
    act = functools.partial(mirror.copy_to, f"{bucket.address}/{run}", str(target))
    program.fork(bench, act, bucket.environment).succeeded()
    return target


ROWS = (
    Row(
        27,
        "SIGKILL at random requests of a run in a bucket (s3://, gs://)",
        "no half-written step is used; another host continues from the last committed one and ends bit-equal, metrics too",
        _kills,
        sample=2,
    ),
)
