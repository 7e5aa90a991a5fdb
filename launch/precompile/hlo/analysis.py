"""Analyses the cost of a compiled program per execution and chip, from its text.

FLOPs are those of matrix products, two per multiply-add, from the shapes of dots and convolutions. TPU programs express dots as convolutions whose windows slide over padded and dilated operands. So only window taps
that read data are counted.

Bytes that a program moves to and from main memory (HBM) are an estimate. Every instruction outside fusions reads its operands and writes its result once. Arrays in on-chip memory are free. A
slice counts with the size of the slice, not of its operand.
"""

import collections
import dataclasses
import math
import re

from espalier.launch.precompile.hlo import collectives, loops, text
from espalier.launch.precompile.hlo.collectives import KINDS
from espalier.launch.precompile.hlo.text import (
    Array,
    Computation,
    HloError,
    Instruction,
    Module,
    leaves,
)

# Fields of a convolution's window and their defaults.
_WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
# Instructions that move no data themselves.
_FREE = (
    "add-dependency",
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)
FREE_TARGETS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
)
# Instructions that read only a part of their first operand.
_SLICES = ("dynamic-slice", "gather", "slice")


def product_flops(module: Module, instruction: Instruction) -> int:
    """Returns the FLOPs of one execution of a dot or convolution; 0 for other instructions."""
    if instruction.opcode == "dot":
        return _dot(module, instruction)
    if instruction.opcode == "convolution":
        return _convolution(module, instruction)
    return 0


def _dot(module: Module, dot: Instruction) -> int:
    lhs = module.operand(dot, 0).array
    dims = re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")
    return 2 * dot.array.size * math.prod(lhs.dims[int(dim)] for dim in dims)


def _convolution(module: Module, convolution: Instruction) -> int:
    labels = convolution.attribute("dim_labels")
    match = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels or "")
    if match is None:
        raise HloError(f"convolution {convolution.name} has dim_labels={labels!r}")
    lhs_labels, rhs_labels, out_labels = match.groups()
    lhs = dict(zip(lhs_labels, module.operand(convolution, 0).array.dims, strict=True))
    rhs = dict(zip(rhs_labels, module.operand(convolution, 1).array.dims, strict=True))
    out = dict(zip(out_labels, convolution.array.dims, strict=True))
    window = _window(convolution, sum(label.isdigit() for label in lhs_labels))
    # Window entries are in the order of the spatial digits.
    taps = math.prod(
        _taps(lhs[str(digit)], out[str(digit)], **entry) for digit, entry in enumerate(window)
    )
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    # rhs["i"] is already the input features of one feature group.
    return 2 * (lhs["b"] // batch_groups) * rhs["i"] * rhs["o"] * taps


def _window(convolution: Instruction, rank: int) -> list[dict[str, int]]:
    """Returns size, stride, lower padding and dilations of each spatial dimension."""
    text = (convolution.attribute("window") or "{}").strip("{}")
    fields = dict(item.split("=") for item in text.split())
    if fields.keys() - {*_WINDOW, "rhs_reversal"}:
        raise HloError(f"convolution {convolution.name} has window={text!r}")
    each = (
        fields[name].split("x") if name in fields else [default] * rank
        for name, default in _WINDOW.items()
    )
    names = [name.replace("pad", "low") for name in _WINDOW]
    # Padding is written as lower_upper.
    return [
        dict(zip(names, (int(value.split("_")[0]) for value in values), strict=True))
        for values in zip(*each, strict=True)
    ]


def _taps(
    lhs: int, out: int, *, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns the number of pairs (output position, window tap) that read data, not padding or a dilation hole."""
    last = (lhs - 1) * lhs_dilate
    count = 0
    for tap in range(size):
        shift = tap * rhs_dilate - low  # reads dilated position out * stride + shift
        if lhs_dilate == 1:
            first = max(0, -(shift // stride))
            count += max(0, min(out - 1, (last - shift) // stride) - first + 1)
        else:
            positions = range(shift, shift + out * stride, stride)
            count += sum(0 <= p <= last and p % lhs_dilate == 0 for p in positions)
    return count


def hbm_bytes(module: Module, executions: dict[str, int]) -> int:
    """Returns the estimated bytes per execution of the program."""
    return sum(
        executions[name] * sum(_moved(module, i) for i in computation.instructions.values())
        for name, computation in module.computations.items()
        if executions[name] and name not in module.fused
    )


def _moved(module: Module, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(f'"{t}"' in instruction.attributes for t in FREE_TARGETS):
        return 0
    operands = [module.operand(instruction, i) for i in range(len(instruction.operands))]
    if opcode.endswith("-start"):
        return _started(instruction, operands)
    if opcode == "fusion":
        body = module.computations[instruction.callees("calls")[0]]
        read = sum(_read(module, body, i, o) for i, o in enumerate(operands))
        return read + _written(module, body, instruction)
    if opcode in _SLICES:
        return 2 * _bytes(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1])
    if opcode == "scatter":
        return 3 * _bytes(operands[-1])
    return sum(_bytes(o) for o in operands) + _bytes(instruction)


def _bytes(instruction: Instruction) -> int:
    return sum(leaf.bytes for leaf in leaves(instruction.shape) if leaf.space == 0)


def _started(instruction: Instruction, operands: list[Instruction]) -> int:
    """Returns the bytes of an asynchronous start; its result is a tuple of its operands, its result, and flags."""
    result = instruction.shape
    if not isinstance(result, Array):
        result = result[0 if instruction.opcode == "copy-start" else 1]  # copies name it first
    result = list(leaves(result))
    written = sum(leaf.bytes for leaf in result if leaf.space == 0)
    if instruction.opcode == "slice-start":
        in_hbm = any(_bytes(operand) for operand in operands)
        return written + (sum(leaf.bytes for leaf in result) if in_hbm else 0)
    return written + sum(_bytes(operand) for operand in operands)


def _read(module: Module, body: Computation, index: int, operand: Instruction) -> int:
    """Returns the bytes that a fusion reads of one operand."""
    whole = _bytes(operand)
    if not whole:
        return 0
    names = {body.parameters[index].name}
    part = 0
    for user in body.instructions.values():  # In order, so that views come before their users.
        used = names.intersection(user.operands)
        if not used or user.opcode == "tuple" or _is_transfer(user):
            continue
        first = user.operands[0] in used
        if user.opcode == "bitcast":
            names.add(user.name)
        elif first and user.opcode in _SLICES:
            part += user.array.bytes
        elif not (first and user.opcode == "dynamic-update-slice"):  # updated in place: not read
            return whole
    return min(whole, part)


def _is_transfer(instruction: Instruction) -> bool:
    """Returns whether an instruction is a collective inside a fusion (counted at its start), or its end."""
    return instruction.opcode in KINDS or '"AsyncCollectiveDone"' in instruction.attributes


def _written(module: Module, body: Computation, fusion: Instruction) -> int:
    """Returns the bytes that a fusion writes; an in-place update writes only the update."""
    root = body.result
    outputs = fusion.shape if isinstance(fusion.shape, tuple) else (fusion.shape,)
    if root.opcode == "tuple":
        roots = [module.operand(root, i) for i in range(len(root.operands))]
    elif len(outputs) > 1:
        # The start of an asynchronous collective returns its operand, its result, then flags.
        return sum(leaf.bytes for leaf in leaves(outputs[1]) if leaf.space == 0)
    else:
        roots = [root]
    total = 0
    for producer, output in zip(roots, outputs, strict=True):
        while producer.opcode in ("bitcast", "reshape"):
            producer = module.operand(producer, 0)
        if producer.opcode == "parameter" or _is_transfer(producer):  # passed through
            continue
        written = (
            [module.operand(producer, 1).array]
            if producer.opcode == "dynamic-update-slice"
            else leaves(output)
        )
        in_hbm = next(iter(leaves(output))).space == 0
        total += sum(leaf.bytes for leaf in written) if in_hbm else 0
    return total


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Executions of one hand-written (Pallas) kernel, loop trips included; XLA does not know its FLOPs."""

    name: str
    count: int
    operands: tuple[text.Array, ...]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Costs of one execution on one chip.

    Attributes:
      flops: FLOPs of matrix products, with loop trip counts applied; kernels excluded.
      collectives: totals by kind.
      hbm_bytes: estimated traffic to and from main memory.
    """

    flops: int
    kernels: tuple[Kernel, ...]
    collectives: dict[str, collectives.Total]
    hbm_bytes: int


def analyse(program: str, *, open_loops: int = 0) -> Analysis:
    """Returns the costs of a program from its text, `compiled.as_text()`.

    Args:
      program: the text.
      open_loops: see `loops.executions`.

    Raises:
      HloError: the text, a loop or a collective cannot be understood.
    """
    module = text.parse(program)
    executions = loops.executions(module, open_loops=open_loops)
    products = 0
    kernels: collections.Counter = collections.Counter()
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values():
            products += executions[name] * product_flops(module, instruction)
            if instruction.attribute("custom_call_target") == '"tpu_custom_call"':
                operands = [
                    module.operand(instruction, i) for i in range(len(instruction.operands))
                ]
                arrays = tuple(leaf for o in operands for leaf in text.leaves(o.shape))
                kernels[_kernel_name(instruction.name), arrays] += executions[name]
    return Analysis(
        flops=products,
        kernels=tuple(
            Kernel(name, count, arrays)
            for (name, arrays), count in sorted(kernels.items(), key=lambda item: item[0][0])
        ),
        collectives=collectives.totals(module, executions),
        hbm_bytes=hbm_bytes(module, executions),
    )


def _kernel_name(instruction: str) -> str:
    """Returns an instruction's name without the numbers that make it unique."""
    return instruction.rstrip("0123456789.").removesuffix(".clone")
