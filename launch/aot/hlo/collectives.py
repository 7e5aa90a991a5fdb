"""Collectives of a program by kind: how often each runs and how many bytes it sends over the wire."""

import dataclasses
import math
import re

from launch.aot.hlo.text import HloError, Instruction, Module, leaves

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


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
    it in the body of each. The repeats share a channel. Only the repeat that runs least often is counted.
    """
    apart: list[tuple[str, int, int]] = []
    channels: dict[tuple[str, str], tuple[str, int, int]] = {}
    for computation in module.computations.values():
        times = executions[computation.name]
        if not times:
            continue
        for instruction in computation.instructions.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode not in KINDS:
                continue
            kind = _kind(opcode, computation.name)
            entry = (kind, times, _wire_bytes(module, kind, instruction))
            if not entry[2]:  # within groups of one chip
                continue
            channel = instruction.attribute("channel_id")
            if channel is None:
                apart.append(entry)
            else:
                best = channels.get((kind, channel), entry)
                channels[kind, channel] = min(best, entry, key=lambda e: e[1])
    return apart + list(channels.values())


def _kind(opcode: str, computation: str) -> str:
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
