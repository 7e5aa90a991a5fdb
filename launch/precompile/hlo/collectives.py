"""Collectives of a program by kind: how often each runs and how many bytes it sends over the wire.

In programs of several TPU slices, collectives run within a slice. What slices exchange is sent and received by the host,
with the kind of collective in an attribute; these kinds have the prefix BETWEEN.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from espalier.launch.precompile.hlo.text import HloError, Instruction, Module, leaves

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

BETWEEN = "between-slices "
# Bytes that a chip sends to n slices, as a multiple of what it has: exchanges of slices by their kind.
_EXCHANGES = {
    "ALL_GATHER": lambda n: n - 1,
    "ALL_REDUCE": lambda n: 2 * (n - 1) / n,
    "ALL_TO_ALL": lambda n: (n - 1) / n,
    "ONE_TO_ONE": lambda n: 1,
    "REDUCE_SCATTER": lambda n: (n - 1) / n,
}


@dataclasses.dataclass(frozen=True)
class Total:
    """Sums over one execution of the program.

    Attributes:
      count: number of executions, with loop trip counts applied.
      bytes: bytes each chip sends.
      largest: bytes each chip sends in the largest single collective.
    """

    count: int = 0
    bytes: int = 0
    largest: int = 0

    def plus(self, count: int, each: int) -> "Total":
        return Total(self.count + count, self.bytes + count * each, max(self.largest, each))


def totals(module: Module, executions: dict[str, int]) -> dict[str, Total]:
    """Returns totals by kind; kinds that do not occur are absent.

    Raises:
      HloError: the group of chips of a collective cannot be read.
    """
    sums: dict[str, Total] = {}
    for kind, count, each in _distinct(module, executions):
        sums[kind] = sums.get(kind, Total()).plus(count, each)
    return dict(sorted(sums.items()))


def _distinct(module: Module, executions: dict[str, int]) -> list[tuple[str, int, int]]:
    """Returns (kind, executions, bytes) of each collective, without repeats.

    The TPU compiler spreads one asynchronous collective over several fusions, also in unrelated loops, and repeats
    it in the body of each. The repeats share a channel and a size. Only the repeat that runs least often is counted. All
    collectives that JAX's functions ask for by name share one channel, so those outside of fusions are counted one by one.
    """
    apart: list[tuple[str, int, int]] = []
    repeated: dict[tuple[str, str, int], tuple[str, int, int]] = {}
    for computation in module.computations.values():
        times = executions[computation.name]
        if not times:
            continue
        for instruction in computation.instructions.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode == "send" and (exchange := _exchange(module, instruction)):
                apart.append((exchange[0], times, exchange[1]))
            if opcode not in KINDS:
                continue
            kind = kind_of(opcode, computation.name)
            entry = (kind, times, _wire_bytes(module, kind, instruction))
            if not entry[2]:  # within groups of one chip
                continue
            channel = instruction.attribute("channel_id")
            if channel is None or computation.name not in module.fused:
                apart.append(entry)
            else:
                best = repeated.get((kind, channel, entry[2]), entry)
                repeated[kind, channel, entry[2]] = min(best, entry, key=lambda e: e[1])
    return apart + list(repeated.values())


def _exchange(module: Module, send: Instruction) -> tuple[str, int] | None:
    """Returns (kind, bytes) of what a chip sends to other slices; None for other transfers to the host.

    Raises:
      HloError: an unknown kind of exchange.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    if kind is None:
        return None
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', send.attributes)
    if kind[1] not in _EXCHANGES or slices is None:
        raise HloError(f"send {send.name} between slices has the kind {kind[1]!r}: unknown bytes")
    size = sum(leaf.bytes for leaf in leaves(module.operand(send, 0).shape))
    factor = _EXCHANGES[kind[1]](len(slices[1].split(",")))
    return BETWEEN + kind[1].lower().replace("_", "-"), round(size * factor)


def sent(totals: Mapping[str, Total]) -> tuple[int, int]:
    """Returns the bytes that a chip sends within its slice, and to other slices."""
    between = sum(total.bytes for kind, total in totals.items() if kind.startswith(BETWEEN))
    return sum(total.bytes for total in totals.values()) - between, between


def kind_of(opcode: str, computation: str) -> str:
    """Returns the kind of a collective; TPU programs have a reduce-scatter as an all-reduce in a fusion of this name."""
    fused = opcode == "all-reduce" and computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if fused else opcode


def _wire_bytes(module: Module, kind: str, instruction: Instruction) -> int:
    """Returns the bytes that one chip sends in the usual ring algorithms."""
    operands = range(len(instruction.operands))
    size = sum(
        leaf.bytes for i in operands for leaf in leaves(module.operand(instruction, i).shape)
    )
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
        return size if any(source != target for source, target in pairs) else 0
    group = group_size(instruction, module.num_partitions)
    if kind == "all-gather":
        return size * (group - 1)
    if kind == "all-reduce":
        return 2 * size * (group - 1) // group
    return size * (group - 1) // group


def group_size(instruction: Instruction, partitions: int) -> int:
    """Returns the number of chips in one group of a collective, from any of XLA's notations."""
    text = instruction.attribute("replica_groups")
    # The mesh form has a blank before its axes, which may follow a list of devices.
    mesh = re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:\s*,?\s*device_ids=\((?:[^()]|\([^()]*\))*\))?\s*\{([^}]*)\}",
        instruction.attributes,
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        if all(name in sizes for name, _ in axes):
            return math.prod(int(part) if part else sizes[name] for name, part in axes)
    elif text in ("{}", "{{}}"):
        return partitions
    elif text and (lists := re.match(r"\{\{([\d,]+)\}", text)):
        return len(lists[1].split(","))
    elif text and (iota := re.match(r"\[(\d+),(\d+)\]<=", text)):
        return int(iota[2])
    raise HloError(
        f"{instruction.opcode} {instruction.name} has replica_groups={text!r}, from which no group "
        "size can be read; its bytes cannot be counted"
    )
