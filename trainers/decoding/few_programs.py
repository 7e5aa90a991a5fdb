"""Chooses how many programs read rows of unequal length.

One program for every length needs little padding, but a fresh process traces, lowers, and compiles or loads each of them.
So the cost of a choice is counted in tokens: all tokens that are read, padding included, and for each new program the
number of tokens that the device would read in the time that the program takes to be ready. A small job gets one or two
programs, a large one as many as pay for themselves.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from espalier.model.kernels.platform import target_platform

# FLOPs of a device in the time that tracing, lowering and loading one layer takes on its host, about 0.1 s. Measured with two
# cores of a CPU, where it is 0.11 s and 1.7e11 FLOP/s; for an accelerator calculated with 1e14 FLOP/s.
_FLOPS_OF_A_LAYER_ON_CPU = 2e10
_FLOPS_OF_A_LAYER_ELSEWHERE = 1e13

_T = TypeVar("_T")


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
