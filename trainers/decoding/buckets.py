"""Groups rows of unequal length into few shapes, for little padding and few compilations, and chooses how many programs read them.

One program for every length needs little padding, but a fresh process traces, lowers, and compiles or loads each of them.
So the cost of a choice is counted in tokens: all tokens that are read, padding included, and for each new program the
number of tokens that the device would read in the time that the program takes to be ready. A small job gets one or two
programs, a large one as many as pay for themselves.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.kernels.platform import target_platform

SMALLEST = 16
# Enough rows for batches of similar length, and few enough to lose when a process is killed.
BATCHES_SORTED = 64

_T = TypeVar("_T")
# FLOPs of a device in the time that tracing, lowering and loading one layer takes on its host, about 0.1 s. Measured with two
# cores of a CPU, where it is 0.11 s and 1.7e11 FLOP/s; for an accelerator calculated with 1e14 FLOP/s.
_FLOPS_OF_A_LAYER_ON_CPU = 2e10
_FLOPS_OF_A_LAYER_ELSEWHERE = 1e13


def bucket_length(length: int, *, limit: int | None = None) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`, but at most `limit`.

    At most a third of a row of at least 16 tokens is padding, and each doubling of the length adds two shapes.
    """
    bucket = SMALLEST
    while bucket < length:
        # Alternate between powers of two and 1.5 times a power of two.
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket if limit is None else min(bucket, limit)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns batches of row indices with similar lengths, the longest first, so memory errors come early.

    The rows of BATCHES_SORTED batches are sorted at a time, so that the first rows of a long file are
    finished long before the last.
    """
    batches = []
    together = BATCHES_SORTED * batch_size
    for first in range(0, len(lengths), together):
        rows = range(first, min(first + together, len(lengths)))
        order = sorted(rows, key=lambda i: -lengths[i])
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def padded(
    rows: Sequence[Sequence[int]], batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [batch_size, length], padded with zeros, and lengths [batch_size], 1 for absent rows; int32."""
    tokens_BT = np.zeros((batch_size, length), np.int32)
    lengths_B = np.ones(batch_size, np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)], lengths_B[b] = row, len(row)
    return tokens_BT, lengths_B


def stacked(columns: Sequence[Mapping[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
    """Returns the columns of rows as arrays [batch_size, ...], 0 for absent rows."""
    arrays: dict[str, np.ndarray] = {}
    names = columns[0] if columns else {}
    for name, first in names.items():
        arrays[name] = np.zeros((batch_size, *first.shape), first.dtype)
        for b, of_row in enumerate(columns):
            arrays[name][b] = of_row[name]
    return arrays


def in_order(pairs: Iterable[tuple[int, _T]]) -> Iterator[_T]:
    """Yields values in the order of their indices, from 0, each as soon as all earlier ones are there."""
    waiting: dict[int, _T] = {}
    after = 0
    for index, value in pairs:
        waiting[index] = value
        while after in waiting:
            yield waiting.pop(after)
            after += 1


def program_tokens(model: Any, params: Any) -> float:
    """Returns the number of tokens that a model reads in the time that a fresh process needs for one more program.

    Both times grow with the number of layers, so that it is smaller for wider models, not for deeper ones.
    """
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    row = {"decoder_input_tokens": one, "encoder_input_tokens": one}
    on_cpu = target_platform() == "cpu"
    layer = _FLOPS_OF_A_LAYER_ON_CPU if on_cpu else _FLOPS_OF_A_LAYER_ELSEWHERE
    return layer * model.config.num_layers / model.forward_flops(row, {"params": params})


def grouped(
    items: Sequence[_T], join: Callable[[_T, _T], _T], cost: Callable[[_T], float]
) -> list[tuple[_T, list[_T]]]:
    """Groups items: each is a group at first, and the two whose join saves most cost are joined while that costs no more.

    Args:
      join: (item, item) -> the item that represents both. The join of a group's items represents the group.
      cost: cost of the group that an item represents.

    Returns:
      (join of the items, items) of each group.
    """
    groups = {n: (item, [item], cost(item)) for n, item in enumerate(items)}
    numbers = itertools.count(len(items))

    def changed(one: int, other: int) -> tuple[float, int, int]:
        (item, _, first), (other_item, _, second) = groups[one], groups[other]
        return cost(join(item, other_item)) - first - second, one, other

    changes = [changed(*pair) for pair in itertools.combinations(groups, 2)]
    heapq.heapify(changes)
    while changes and changes[0][0] <= 0:
        _, one, other = heapq.heappop(changes)
        if one not in groups or other not in groups:
            continue
        (item, members, _), (other_item, other_members, _) = groups.pop(one), groups.pop(other)
        joined, number = join(item, other_item), next(numbers)
        groups[number] = (joined, members + other_members, cost(joined))
        for rest in list(groups)[:-1]:
            heapq.heappush(changes, changed(rest, number))
    return [(item, members) for item, members, _ in groups.values()]
