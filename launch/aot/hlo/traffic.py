"""An estimate of the bytes a program moves to and from main memory (HBM).

Every instruction outside fusions reads its operands and writes its result once. Arrays in on-chip memory are free. A
slice counts with the size of the slice, not of its operand.
"""

from launch.aot.hlo.collectives import KINDS
from launch.aot.hlo.text import Array, Computation, Instruction, Module, leaves

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
_FREE_TARGETS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
)
# Instructions that read only a part of their first operand.
_SLICES = ("dynamic-slice", "gather", "slice")


def hbm_bytes(module: Module, executions: dict[str, int]) -> int:
    """Returns the estimated bytes per execution of the program."""
    fused = {
        callee
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion"
        for callee in instruction.callees("calls")
    }
    return sum(
        executions[name] * sum(_moved(module, i) for i in computation.instructions.values())
        for name, computation in module.computations.items()
        if executions[name] and name not in fused
    )


def _moved(module: Module, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(f'"{t}"' in instruction.attributes for t in _FREE_TARGETS):
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
