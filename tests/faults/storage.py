"""Rows about file systems and clocks: full, failing, slow and read-only storage, paths in the way, wrong times."""

import contextlib
import errno
import functools
import os
import pathlib
import resource
import signal
import subprocess
from collections.abc import Iterator

from tests.faults import program, shim
from tests.faults.table import Bench, Case, NotTried, Row, Unclear


def _storage(seed: int) -> Iterator[Case]:
    for number in range(5):
        for name, mode, code in (
            ("no space from a write on", shim.FAIL_FROM, errno.ENOSPC),
            ("EIO from a write on", shim.FAIL_FROM, errno.EIO),
            ("EIO at one write", shim.FAIL_ONCE, errno.EIO),
        ):
            key = f"{name}, {number}"
            act = functools.partial(_failing, mode, code, f"{seed} {key}")
            yield Case(key, act, 2400, own_process=True)
    for number in range(3):
        key = f"EIO at a read while a run goes on, {number}"
        act = functools.partial(_failing_reads, f"{seed} {key}")
        yield Case(key, act, 2400, own_process=True)
    yield Case("every operation takes 20 ms", _slow, 2400, own_process=True)
    for size in (300, 900, 1500):
        act = functools.partial(_small_disk, size)
        yield Case(f"a disk of {size} kB", act, 2400, own_process=True)
    yield Case("files of at most 20 kB", _small_files, 2400, own_process=True)
    yield Case("a read-only disk", _read_only, 2400, own_process=True)
    for name in _OBSTACLES:
        yield Case(f"MODEL_DIR is {name}", functools.partial(_obstacle, name), own_process=True)


def _goes_on(bench: Bench, run: pathlib.Path, failed: program.Process) -> None:
    """Checks that a run which met a fault ended clearly or well, and ends bit-equal without the fault."""
    if failed.wait() != 0:
        failed.refused()
    program.train(bench, run).succeeded()
    program.ends_like(bench, run)


def _failing(mode: int, code: int, key: str, bench: Bench) -> None:
    run, at = bench.folder / "run", bench.random(key).randrange(20, 300)
    process = program.train(bench, run, before=lambda: shim.files(bench, run, mode, at, error=code))
    _goes_on(bench, run, process)


def _failing_reads(key: str, bench: Bench) -> None:
    run, at = program.half_way(bench), bench.random(key).randrange(0, 60)
    folder = run / "checkpoints"
    process = program.train(
        bench, run, before=lambda: shim.files(bench, folder, shim.FAIL_READS, at, error=errno.EIO)
    )
    _goes_on(bench, run, process)


def _slow(bench: Bench) -> None:
    run = bench.folder / "run"
    program.train(
        bench, run, before=lambda: shim.files(bench, run, shim.SLOW, milliseconds=20)
    ).succeeded()
    program.ends_like(bench, run)


@contextlib.contextmanager
def _disk(folder: pathlib.Path, kilobytes: int) -> Iterator[None]:
    """Mounts a small file system at a folder.

    Raises:
      NotTried: the process may not mount.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        raise NotTried("mounting a small file system needs privileges")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _small_disk(kilobytes: int, bench: Bench) -> None:
    run = bench.folder / "run"
    bindings = ("checkpoint.Checkpointer.keep_last=None",)
    with _disk(run, kilobytes):
        process = program.train(bench, run, *bindings)
        if process.wait() != 0:
            process.refused()
        grow = ["mount", "-o", "remount,size=64m", str(run)]
        subprocess.run(grow, check=True)
        program.train(bench, run, *bindings).succeeded()
        program.ends_like(bench, run)


def _small_files(bench: Bench) -> None:
    run = bench.folder / "run"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    _goes_on(bench, run, program.train(bench, run, before=limit))


def _read_only(bench: Bench) -> None:
    disk = bench.folder / "disk"
    with _disk(disk, 64_000):
        source = program.base(bench, "half", "TRAIN_STEPS=8")
        subprocess.run(["cp", "-r", str(source), str(disk / "run")], check=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        program.train(bench, disk / "run").refused(str(disk / "run"))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        program.train(bench, disk / "run").succeeded()
        program.ends_like(bench, disk / "run")


def _file(path: pathlib.Path) -> str:
    path.write_text("x")
    return str(path)


def _loop(path: pathlib.Path) -> str:
    path.symlink_to(path.name)
    return str(path)


def _with(name: str, path: pathlib.Path) -> str:
    """Makes a directory in which a folder is a file, or a file a folder."""
    path.mkdir()
    (path / name).mkdir() if "." in name else (path / name).write_text("x")
    return str(path)


_OBSTACLES = {
    "a file": _file,
    "below a file": lambda path: _file(path) + "/run",
    "a link to itself": _loop,
    "a name of 300 characters": lambda path: f"{path}{'x' * 300}",
    "/dev/null": lambda path: "/dev/null",
    "below /proc": lambda path: "/proc/run",
    "the empty name": lambda path: "",
    "a folder where checkpoints is a file": functools.partial(_with, "checkpoints"),
    "a folder where config.gin is a folder": functools.partial(_with, "config.gin"),
    "a folder where metrics.jsonl is a folder": functools.partial(_with, "metrics.jsonl"),
    "a folder where .lock is a folder": functools.partial(_with, ".lock"),
}


def _obstacle(name: str, bench: Bench) -> None:
    run = _OBSTACLES[name](bench.folder / "x")
    message = program.start(bench, "train", program.train_flags(bench, run)).refused()
    if run and run[:50] not in message and "MODEL_DIR" not in message:
        raise Unclear(f"the error does not name the path: {message[:300]}")


def _clocks(seed: int) -> Iterator[Case]:
    del seed
    for name, options in {
        "1970": {"start": 1000.0},
        "2102": {"start": 4.17e9},
        "jumps of 25 hours": {"jump": 90_000.0},
        "jumps of 1 second": {"jump": 1.0},
    }.items():
        yield Case(name, functools.partial(_clock, options), 2400, own_process=True)


def _clock(options: dict[str, float], bench: Bench) -> None:
    run = bench.folder / "run"
    process = program.train(bench, run, before=lambda: shim.clock(bench, **options))
    _goes_on(bench, run, process)


ROWS = (
    Row(
        5,
        "full, failing, slow and read-only storage; paths in the way",
        "one clear error or no harm; the run ends bit-equal when the fault is gone",
        _storage,
        sample=2,
    ),
    Row(
        26,
        "a clock that is wrong or jumps",
        "the run ends bit-equal, or with one clear error and then bit-equal",
        _clocks,
        sample=0,
    ),
)
