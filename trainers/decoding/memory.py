"""Refuses a generation whose caches cannot be in memory, before they are allocated."""

import os
import pathlib
from typing import Any

import jax

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


class TooLargeError(ValueError):
    """The caches of a generation need more memory than there is."""


def check(state: Any, *, max_new_tokens: int, rows: int, devices: int) -> None:
    """Raises TooLargeError unless the arrays of a state can be in the memory of the devices.

    Args:
      state: shapes and dtypes of all arrays that a generation holds besides the parameters.
      max_new_tokens, rows: the settings that decide on its size, for the error.
      devices: number of devices that the rows are split over.
    """
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    limit = _limit(devices)
    if needed > limit:
        raise TooLargeError(
            f"max_new_tokens = {max_new_tokens:,} for {rows:,} rows at a time needs {needed / 1e9:,.1f} GB for keys, "
            f"values and tokens, and there are {limit / 1e9:,.1f} GB: lower max_new_tokens, batch_size or the "
            "number of samples, or choose a cache policy with a capacity."
        )


def _limit(devices: int) -> float:
    """Returns the bytes of the devices' memory, or, for devices that do not tell, of the machine's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] * devices
    limit = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    text = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return min(limit, float(text)) if text.isdecimal() else limit
