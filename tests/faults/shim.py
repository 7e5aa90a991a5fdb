"""Builds and controls shim.c, a library that makes faults of file systems and clocks in this process."""

import ctypes
import os
import pathlib
import shutil
import subprocess

from tests.faults.table import Bench, NotTried

COUNT, KILL, KILL_HALF, FAIL_FROM, FAIL_ONCE, SLOW, FAIL_READS = range(7)  # as in shim.c
VARIABLE = "ESPALIER_FAULT_SHIM"


def build(folder: pathlib.Path) -> pathlib.Path | None:
    """Compiles the library; returns its path, None without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    source, target = pathlib.Path(__file__).with_suffix(".c"), folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(target), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, check=False)
    return target if done.returncode == 0 else None


def loaded() -> ctypes.CDLL | None:
    """Returns the library if it was loaded before this process's other libraries."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "faults_files"):
        return None
    text, number, real = ctypes.c_char_p, ctypes.c_int, ctypes.c_double
    library.faults_files.argtypes = [text, number, ctypes.c_long, number, ctypes.c_long]
    library.faults_clock.argtypes = [real, real]
    library.faults_count.restype = ctypes.c_long
    return library


def _library(bench: Bench) -> ctypes.CDLL:
    if bench.shim is None:
        raise NotTried("no C compiler")
    return bench.shim


def files(
    bench: Bench,
    folder: str | os.PathLike,
    mode: int,
    at: int = 0,
    *,
    error: int = 0,
    milliseconds: int = 0,
) -> None:
    """Makes file operations below `folder` fail, from operation `at` on, in this process.

    Raises:
      NotTried: the library could not be compiled.
    """
    _library(bench).faults_files(os.fspath(folder).encode(), mode, at, error, milliseconds * 1000)


def clock(bench: Bench, *, start: float = 0.0, jump: float = 0.0) -> None:
    """Sets this process's clock to `start` seconds after 1970, or lets it jump by `jump` seconds at each reading."""
    _library(bench).faults_clock(start, jump)
