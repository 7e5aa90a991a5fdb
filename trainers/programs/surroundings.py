"""What a compiled program depends on besides its function and arguments: source, versions, devices, flags, mesh."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
from typing import Any

import flax.linen as nn
import jax

from espalier.trainers.programs import description, sources

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")
# Variables that compilers and their libraries read.
_VARIABLES = ("XLA_", "LIBTPU_", "NVIDIA_", "TF_XLA", "TF_CUDNN", "CUBLAS")
# They say where and what jax stores, logs or shows, or apply before a program is compiled.
_NO_FLAGS = (
    "jax_compilation_cache",
    "jax_enable_compilation_cache",
    "jax_persistent_cache",
    "jax_log",
    "jax_logging",
    "jax_dump",
    "jax_traceback",
    "jax_transfer_guard",
    "jax_explain_cache_misses",
    "jax_check_tracer_leaks",
    "jax_platforms",
)


def of_process() -> dict[str, Any]:
    """Returns what all programs of this process depend on, in JSON types."""
    return {
        "source": sources.own_digest(),
        "other_source": sources.other_digest(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "installed": hashlib.sha256("\n".join(sources.installed()).encode()).hexdigest(),
        "python": sys.version,
        "devices": _devices(),
        "processor": _processor(),
        "variables": {n: v for n, v in sorted(os.environ.items()) if n.startswith(_VARIABLES)},
    }


def of_call() -> dict[str, Any]:
    """Returns what a program depends on where it is called: jax's flags, the mesh and the rules of logical axes."""
    flags = {n: v for n, v in sorted(jax.config.values.items()) if not n.startswith(_NO_FLAGS)}
    return {
        # An attribute also has the value that a context manager sets; some flags have no attribute.
        "flags": {name: repr(getattr(jax.config, name, value)) for name, value in flags.items()},
        "mesh": description.digest(jax.sharding.get_mesh()),
        "rules": description.digest(tuple(nn.get_logical_axis_rules())),
    }


def _devices() -> list[Any]:
    client = jax.devices()[0].client
    devices = [[device.id, device.platform, device.device_kind] for device in jax.devices()]
    return [client.platform, client.platform_version, devices]


@functools.cache
def _processor() -> str:
    """Returns a digest of the processor's instructions, which programs for CPUs use, and of its threads."""
    lines: set[str] = set()
    cpus = pathlib.Path("/proc/cpuinfo")
    if cpus.exists():
        kinds = ("flags", "Features", "model name")
        text = cpus.read_text("utf-8", "replace").splitlines()
        lines = {line for line in text if line.startswith(kinds)}
    threads = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    facts = [platform.machine(), platform.processor(), str(threads), *sorted(lines)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
