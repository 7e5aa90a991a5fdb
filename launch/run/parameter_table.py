"""The table of parameters written with every run (parameters.txt)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

_HEADER = ("path", "shape", "dtype", "axes", "sharding", "count")


def parameter_table(params: Any, shardings: Any = None) -> str:
    """Returns a table with a row per parameter, and the totals.

    Args:
      params: nested dict of arrays or ShapeDtypeStructs; flax's boxes around them have the logical axes.
      shardings: a tree of the same structure of NamedSharding, PartitionSpec, or leaves with a `sharding`; or None.
    """
    specs = dict(_leaves(shardings)) if shardings is not None else {}
    rows, total, size = [], 0, 0
    for path, leaf in _leaves(params):
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = []
    for row in rows:
        *left_aligned, count = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*left_aligned, count.strip().rjust(widths[-1])]))
    lines.insert(1, "-" * len(lines[0]))
    lines.append("-" * len(lines[0]))
    lines.append(f"total {total:,} parameters in {len(rows) - 1} arrays, {size / 2**20:,.1f} MiB")
    return "\n".join(lines) + "\n"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, tree


def _axis(name: Any) -> str:
    if isinstance(name, tuple | list):
        return "+".join(map(str, name))
    return "-" if name is None else str(name)


def _spec(sharding: Any) -> str:
    if sharding is None:
        return "-"
    sharding = getattr(sharding, "sharding", sharding)
    spec = getattr(sharding, "spec", sharding)
    split = [_axis(axis) for axis in spec]
    return "(" + ", ".join(split) + ")" if any(s != "-" for s in split) else "replicated"
