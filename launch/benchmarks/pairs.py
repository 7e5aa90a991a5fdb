"""Statistics of comparisons: the median of ratios of alternating runs, with a bootstrap interval.

Absolute times on a shared machine are noisy; the ratio of two consecutive runs is much less so.
"""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers")


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Returns the median of numerator / denominator over pairs, with a 95 % bootstrap interval."""
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    draws = np.random.default_rng(0).choice(ratios, (10_000, ratios.size))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "median": float(np.median(ratios)),
        "interval_95": [float(low), float(high)],
        "pairs": ratios.size,
    }


def environment() -> dict[str, Any]:
    """Returns facts about the machine and package versions, to interpret the figures."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
