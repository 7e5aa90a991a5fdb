"""A process that runs a share of the cases: python -m tests.faults.worker, with its task on standard input.

It imports the project once, and forks processes with limits of time and memory, in which the cases run.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from espalier.launch import cli, environment
from tests.faults import shim
from tests.faults.table import HELD, Bench, Case, NotHeld, NotTried, Row, selected

_GRACE_SECONDS = 5.0
_MEMORY_BYTES = 16 << 30  # address space of a case, so that a hostile file harms no other process


def rows() -> list[Row]:
    """Returns all rows by their numbers."""
    folders = ("tests.faults", "tests.faults.hostile")
    modules = [f"{x}.{name}" for x in folders for name in cli.modules_with(x, r"^ROWS = \(")]
    rows = (row for module in modules for row in importlib.import_module(module).ROWS)
    return sorted(rows, key=lambda row: row.number)


def serve(task: dict[str, Any]) -> None:
    """Runs cases and appends a line of JSON for each to OUT/results.jsonl.

    Args:
      task: 'out', 'seed', 'sample', and 'cases': [row, name] of each case to run.
    """
    os.environ.pop("LD_PRELOAD", None)  # for this process alone
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the process of a case is ended too
    out = pathlib.Path(task["out"])
    _import_the_project()
    wanted = [tuple(key) for key in task["cases"]]
    cases = {
        (row.number, case.name): case
        for row in rows()
        for case in selected(row, task["seed"], sample=task["sample"])
    }
    folder = out / f"work_{task['number']}"
    folder.mkdir(exist_ok=True)
    bench = Bench(out=out, folder=folder, seed=task["seed"], shim=shim.loaded())
    for number, keys in itertools.groupby(wanted, key=lambda key: key[0]):
        for case, result in run_cases([cases[key] for key in keys], bench):
            line = json.dumps({"row": number, "case": case.name, **result}) + "\n"
            with open(out / "results.jsonl", "ab", buffering=0) as file:
                file.write(line.encode())


def _import_the_project() -> None:
    """Imports what cases use, so that forked processes have it."""
    names = (
        "gin",
        "seqio",
        "espalier.launch.train",
        "espalier.launch.convert.__main__",
        "espalier.launch.score",
    )
    names += (
        "espalier.launch.config.gin_config",
        "espalier.launch.load.load_run",
        "espalier.launch.convert.exchange",
    )
    for name in names:
        importlib.import_module(name)


def attempt(case: Case, bench: Bench) -> dict[str, Any]:
    """Runs a case in this process; returns its verdict, a message, and the number of faults tried."""
    try:
        return {"verdict": HELD, "message": "", "tried": case.run(bench) or 1}
    except NotTried as reason:
        return {"verdict": "not tried", "message": str(reason), "tried": 0}
    except NotHeld as problem:
        return {"verdict": problem.verdict, "message": str(problem), "tried": 1}
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"
        return {"verdict": "unclear", "message": text, "tried": 1}


def run_cases(cases: Sequence[Case], bench: Bench) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields the result of each case.

    Cases share a forked process unless they need their own. A case that takes too long or ends its process is unclear,
    and the next one gets a new process. The folders of cases that held are removed.
    """
    rest = list(cases)
    while rest:
        count = 1
        if not rest[0].own_process:
            while count < len(rest) and not rest[count].own_process:
                count += 1
        done = 0
        for case, result in _in_fork(rest[:count], bench):
            done += 1
            yield case, result
        rest = rest[done:]


def _in_fork(cases: Sequence[Case], bench: Bench) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields results from one forked process, until it is killed or dies with a case."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    if not (pid := os.fork()):
        os.close(reading)
        _serve(cases, bench, writing)
    os.close(writing)
    log = _log(bench)
    try:
        with os.fdopen(reading, "rb") as results:
            for case in cases:
                begun = time.monotonic()
                ready = select.select([results], [], [], case.seconds + _GRACE_SECONDS)[0]
                line = results.readline() if ready else b""
                seconds = time.monotonic() - begun
                if line:
                    yield case, json.loads(line)
                    continue
                message = f"no end after {seconds:.0f} s" if not ready else _last_line(log)
                result = {"verdict": "unclear", "message": message, "tried": 1}
                yield case, {**result, "seconds": round(seconds, 2)}
                return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(cases: Sequence[Case], bench: Bench, pipe: int) -> None:
    """Runs cases one after the other, and writes a line of JSON for each; does not return."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in a job of a shell's background
    try:
        file = os.open(_log(bench), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        for number, case in enumerate(cases):
            folder = bench.folder / f"{os.getpid()}_{number}"
            folder.mkdir(parents=True)
            begun = time.monotonic()
            result = attempt(case, dataclasses.replace(bench, folder=folder))
            result["seconds"] = round(time.monotonic() - begun, 2)
            if result["verdict"] in (HELD, "not tried"):
                shutil.rmtree(folder, ignore_errors=True)
            os.write(pipe, json.dumps(result).encode() + b"\n")
    finally:
        os._exit(0)


def _log(bench: Bench) -> pathlib.Path:
    return bench.folder / "case.log"


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    text = next((line for line in reversed(lines) if line.strip()), "")
    return f"its process died: {text[:300]}"


if __name__ == "__main__":
    environment.prepare()
    serve(json.loads(sys.stdin.read()))
