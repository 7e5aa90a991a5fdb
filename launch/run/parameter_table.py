"""The table of parameters written with every run (parameters.txt)."""

import math
from typing import Any

from flax.traverse_util import flatten_dict

_HEADER = ("path", "shape", "dtype", "axes", "sharding", "count")


def parameter_table(params: Any, shardings: Any = None) -> str:
    """Returns a table with a row per parameter, and the totals.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs; flax's boxes around them have the logical axes.
      shardings: a tree of the same structure of NamedSharding, PartitionSpec, or leaves with a `sharding`; or None.
    """
    specs = flatten_dict(shardings, sep="/") if shardings is not None else {}
    rows, total, size = [], 0, 0
    for path, leaf in flatten_dict(params, sep="/").items():
        names = getattr(leaf, "names", None)
        array = leaf.value if names is not None else leaf
        count = math.prod(array.shape)
        total, size = total + count, size + count * array.dtype.itemsize
        rows.append(
            (
                path,
                "x".join(map(str, array.shape)) or "scalar",
                str(array.dtype),
                "(" + ", ".join(map(_axis, names)) + ")" if names is not None else "-",
                _spec(specs.get(path)),
                f"{count:,}",
            )
        )
    rows = [_HEADER, *rows]
    *widths, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1].rjust(last)]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("-" * len(lines[0]))
    lines.append(f"total {total:,} parameters in {len(rows) - 1} arrays, {size / 2**20:,.1f} MiB")
    return "\n".join(lines) + "\n"


def _axis(name: Any) -> str:
    if isinstance(name, tuple | list):
        return "+".join(map(str, name))
    return "-" if name is None else str(name)


def _spec(sharding: Any) -> str:
    if sharding is None:
        return "-"
    sharding = getattr(sharding, "sharding", sharding)
    axes = [_axis(axis) for axis in getattr(sharding, "spec", sharding)]
    return "(" + ", ".join(axes) + ")" if any(axis != "-" for axis in axes) else "replicated"
