"""The process environment, the same for all commands, which is set before jax starts; and the record of a process."""

import contextlib
import datetime
import glob
import importlib.util
import os
import platform
import socket
import subprocess
import sys
from typing import Any

# The folder of launch/ and t5x_configs/: the checkout, in which espalier/ links to them, or the installed package.
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# The folder from which the package is imported.
IMPORTED_FROM = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# What could be imported under these names is in the package `espalier` now.
EARLIER_PACKAGES = ("model", "trainers", "data", "launch")

HUGE_PAGES = "glibc.malloc.hugetlb"
# On CPU, level 3 takes a sixth more compile time than level 2, and its programs are not faster.
_OPTIMISATION = "xla_backend_optimization_level"
# Devices of NVIDIA, also in Windows' Linux, of AMD, and TPUs. A container may have other chips of its host than the first.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# What is recorded of a process: versions of packages, and variables by the beginnings of their names.
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "gin-config",
             "seqio", "tensorflow", "espalier-lm")  # fmt: skip
_RECORDED = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "NVIDIA_VISIBLE", "TF_",
             "GLIBC_TUNABLES", "ESPALIER_", "OMP_NUM", "SLURM_JOB_ID", "SLURM_NNODES")  # fmt: skip
_before: dict[str, str | None] = {}  # former values of the variables that `prepare` has set


def cache_dir() -> str:
    """Returns the folder of all caches: $ESPALIER_CACHE or ~/.cache/espalier; for an address, the latter: of programs."""
    cache = os.environ.get("ESPALIER_CACHE") or ""
    return os.path.expanduser("~/.cache/espalier" if not cache or "://" in cache else cache)


def prepare() -> None:
    """Sets the variables that jax and TensorFlow read on import, unless the user has set them."""
    if "ESPALIER_PROGRAMS" in os.environ:
        print(
            "warning: ESPALIER_PROGRAMS has no effect: stored programs no longer exist. Unset it; the folder "
            "programs/ beside jax's compiled programs (JAX_COMPILATION_CACHE_DIR) may be deleted.",
            file=sys.stderr,
        )
    before = dict(os.environ)
    cpu_only = _cpu_only()
    if cpu_only and importlib.util.find_spec("libtpu") is not None:
        os.environ.setdefault(
            "JAX_PLATFORMS", "cpu"
        )  # libtpu complains at length of a host without chips
    defaults = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache_dir(), "xla"),
        # Compiling small programs takes most of the start-up time, so cache these too.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if _OPTIMISATION not in flags and cpu_only:
        os.environ["XLA_FLAGS"] = f"{flags} --{_OPTIMISATION}=2".strip()
    for name, value in os.environ.items():
        if value != before.get(name):
            _before.setdefault(name, before.get(name))


def of_user() -> dict[str, str]:
    """Returns the environment without what `prepare` has set for this machine, for jobs on others."""
    variables: dict[str, str | None] = {**os.environ, **_before}
    return {name: value for name, value in variables.items() if value is not None}


def restart_with_huge_pages() -> None:
    """Restarts this process once with malloc on huge pages, if that helps.

    XLA allocates the temporaries of a step at each call; with 4 KiB pages the page faults take a fifth of a training
    step on CPU. glibc reads the setting only when a process starts. ESPALIER_HUGE_PAGES=0 turns this off.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES in tunables or not _huge_pages_help():
        return
    env = dict(os.environ, GLIBC_TUNABLES=":".join(filter(None, [tunables, f"{HUGE_PAGES}=1"])))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def _huge_pages_help() -> bool:
    if os.environ.get("ESPALIER_HUGE_PAGES") == "0" or sys.platform != "linux":
        return False
    library, version = platform.libc_ver()
    has_setting = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    return has_setting and _cpu_only() and _thp_available()


def _cpu_only() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or (not platforms and not any(map(glob.glob, _ACCELERATORS)))


def _thp_available() -> bool:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return "[never]" not in file.read()
    except OSError:
        return False


def describe() -> dict[str, Any]:
    """Returns code, command, versions and machine of this process."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit(),
        "command": sys.orig_argv,
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_RECORDED)},
        "cache": cache_dir(),
        "host": {
            "name": socket.gethostname(),
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        },
    }


def commit() -> dict[str, Any]:
    """Returns the commit of Espalier's repository and whether files differ from it; None if ROOT is not its root.

    A package that is installed in a folder of another repository is outside of git.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root, _, commit = _git("rev-parse", "--show-toplevel", "HEAD").rpartition("\n")
        if os.path.realpath(root) == ROOT:
            return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    return {"commit": None, "dirty": None}


def in_history(name: str) -> bool:
    """Returns whether the commit of Espalier's repository is, or descends from, another one; True outside of git."""
    if commit()["commit"] is None:
        return True
    try:
        _git("merge-base", "--is-ancestor", name, "HEAD")
    except (
        subprocess.CalledProcessError
    ):  # no ancestor, or unknown after a rebase or in a shallow clone
        return False
    return True


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def _version(package: str) -> str | None:
    from importlib import metadata  # takes longer to import than all else here

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
