"""Divides a list of layers into groups that repeat a few blocks, so that a scan traces each block once.

A model whose layers have one period is one group: with a pattern of P kinds, block p stands for the layers p, p + P, p + 2 P, ...
Other lists have several groups. A dense layer before [sliding, sliding, sliding, full] twice is a group of one block, `block_0`,
and a group of four, `block_1` to `block_4`, each for two layers. A block has the number of its first layer.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# The path of an array of a block: its stack of layers, the block's number, and the path in the block.
BLOCK = re.compile(r"((?:.*/)?layers)/block_(\d+)/(.+)")
# A group costs a loop in the forward and one in the backward pass, about as much to compile as two blocks.
_GROUP_COST = 2
_LONGEST_PERIOD = 48  # of a group among others; longer ones are not looked for
_LONGEST_LIST = 1000  # of layers without one period; longer ones are one group, since looking takes their square


class Group(NamedTuple):
    """Consecutive layers that repeat the same blocks.

    Attributes:
      first: the first layer.
      period: P, the number of blocks.
      repeats: how often the blocks are repeated.
    """

    first: int
    period: int
    repeats: int

    @property
    def blocks(self) -> range:
        """The blocks' numbers, which are their first layers."""
        return range(self.first, self.first + self.period)

    @property
    def end(self) -> int:
        """The layer after the last."""
        return self.first + self.period * self.repeats

    def layers(self, block: int) -> range:
        """Returns the layers of a block."""
        return range(block, self.end, self.period)


def place(groups: Iterable[Group], layer: int) -> tuple[int, int]:
    """Returns a layer's block and its index among the block's layers."""
    group = next(group for group in groups if layer < group.end)
    index, at = divmod(layer - group.first, group.period)
    return group.first + at, index


def layers_of(groups: Iterable[Group], block: int) -> range:
    """Returns the layers of a block."""
    return next(group for group in groups if block < group.end).layers(block)


@functools.lru_cache(maxsize=64)
def divided(pattern: tuple[str, ...], num_layers: int) -> tuple[Group, ...]:
    """Returns the groups of a pattern of kinds that is repeated, the last time perhaps in part, for `num_layers` layers.

    If the pattern is repeated in whole at least twice, it is the only group's. Otherwise blocks and groups are as few as possible.
    """
    period = len(pattern)
    if num_layers % period == 0 and num_layers > period:
        return (Group(0, period, num_layers // period),)
    if num_layers > _LONGEST_LIST:
        return (Group(0, num_layers, 1),)
    return _cheapest([pattern[i % period] for i in range(num_layers)])


def _cheapest(kinds: Sequence[str]) -> tuple[Group, ...]:
    """Returns the groups with the least cost: the number of blocks, and `_GROUP_COST` for each group.

    Of equal costs, fewer groups, then a first group of more layers, then one of fewer blocks.
    """
    count = len(kinds)
    same = _repeated(kinds)
    # The best division of the layers from each one on: its order among divisions, and its first group.
    best: list[tuple[tuple[int, ...], Group | None]] = [((0, 0), None)] * (count + 1)

    def order(group: Group) -> tuple[int, ...]:
        (cost, groups, *_), _ = best[group.end]
        return cost + group.period + _GROUP_COST, groups + 1, -group.end, group.period

    for first in reversed(range(count)):
        options = [Group(first, length, 1) for length in range(1, count - first + 1)]
        for period in range(1, len(same)):
            most = 1 + same[period][first] // period
            options += [Group(first, period, repeats) for repeats in range(2, most + 1)]
        chosen = min(options, key=order)
        best[first] = order(chosen), chosen
    groups: list[Group] = []
    while (group := best[groups[-1].end if groups else 0][1]) is not None:
        groups.append(group)
    return tuple(groups)


def _repeated(kinds: Sequence[str]) -> list[list[int]]:
    """Returns, for each period and layer, how many layers from there on are of the kind of the layer a period later."""
    count = len(kinds)
    by_period: list[list[int]] = [[]]
    for period in range(1, min(_LONGEST_PERIOD, count // 2) + 1):
        runs = [0] * (count + 1)
        for layer in reversed(range(count - period)):
            runs[layer] = runs[layer + 1] + 1 if kinds[layer] == kinds[layer + period] else 0
        by_period.append(runs)
    return by_period


def inferred(repeats: Mapping[int, int]) -> tuple[Group, ...]:
    """Returns the groups of a stack of layers that is stored as blocks.

    Args:
      repeats: the number of layers of each block, by the block's number.
    """
    groups: list[Group] = []
    for block, count in sorted(repeats.items()):
        last = groups[-1] if groups else None
        if last is not None and (block, count) == (last.blocks.stop, last.repeats):
            groups[-1] = last._replace(period=last.period + 1)
        else:
            groups.append(Group(block, 1, count))
    return tuple(groups)


def in_stacks(
    shapes: Mapping[str, Sequence[int]], *, scanned: bool
) -> dict[str, tuple[Group, ...]]:
    """Returns the groups of each stack of layers.

    Args:
      shapes: the shapes of arrays by path, of all blocks.
      scanned: whether the arrays of a block have a leading axis of its layers; otherwise each block is one layer.
    """
    stacks: dict[str, dict[int, int]] = {}
    for path, shape in shapes.items():
        if match := BLOCK.fullmatch(path):
            stacks.setdefault(match[1], {})[int(match[2])] = shape[0] if scanned else 1
    return {stack: inferred(repeats) for stack, repeats in stacks.items()}
