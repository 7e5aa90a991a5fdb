"""Counts how often each computation of a program runs: loop trip counts, multiplied through nesting.

XLA's own cost analysis counts a loop body once. TPU programs do not contain trip counts either. They are computed
from the loop's condition, its initial value and its step.
"""

import json
import math
import re

from espalier.launch.precompile.hlo.text import Computation, HloError, Instruction, Module

# Operations that return a scalar unchanged.
_TRANSPARENT = ("copy", "convert", "bitcast", "copy-start", "copy-done", "opt-barrier", "reshape")
_HOLDS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
}


def executions(module: Module, *, open_loops: int = 0) -> dict[str, int]:
    """Returns how often each computation runs in one execution of the program.

    Both branches of a conditional count as executed. Scalar functions of reductions, sorts and scatters are not
    counted.

    Args:
      open_loops: number of loops that the program's data ends, such as a loop over new tokens. One trip of each counts.

    Raises:
      HloError: the trip count of another loop cannot be determined.
    """
    loops = _Loops(module, open_loops)
    edges = {name: list(loops.calls(c)) for name, c in module.computations.items()}
    counts = dict.fromkeys(module.computations, 0)
    counts[module.entry.name] = 1
    for name in _callers_first(module.entry.name, edges):
        for callee, times in edges[name]:
            counts[callee] += counts[name] * times
    return counts


def _callers_first(entry: str, edges: dict[str, list[tuple[str, int]]]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for callee, _ in edges[name]:
                visit(callee)
            order.append(name)

    visit(entry)
    return order[::-1]


class _Loops:
    """Solves trip counts by following values through tuples, fusions and outer loops."""

    def __init__(self, module: Module, open_loops: int = 0):
        self._module = module
        self._open_left = open_loops
        self._callers: dict[str, list[Instruction]] = {}
        for computation in module.computations.values():
            for instruction in computation.instructions.values():
                for callee in _callees(instruction):
                    self._callers.setdefault(callee, []).append(instruction)

    def calls(self, computation: Computation):
        """Yields (callee, executions per run of `computation`) of its instructions."""
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips = self._trips_or_one(instruction)
                yield instruction.callees("body")[0], trips
                yield instruction.callees("condition")[0], trips + 1
            else:
                for callee in _callees(instruction):
                    yield callee, 1

    def _trips_or_one(self, loop: Instruction) -> int:
        try:
            return self.trips(loop)
        except HloError:
            if not self._open_left:
                raise
            self._open_left -= 1
            return 1

    def trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":(\{[^{}]*\})', loop.attributes)
        if known:
            return int(json.loads(known[1])["n"])
        compare = self._through(self._computation(loop.callees("condition")[0]).result)
        if compare.opcode != "compare":
            raise self._unknown(loop, f"its condition ends in {compare.opcode}")
        direction = compare.attribute("direction")
        sides = [self._linear(self._module.operand(compare, i)) for i in (0, 1)]
        moving = [
            i for i, (index, _) in enumerate(sides) if index is not None and self._step(loop, index)
        ]
        if len(moving) != 1 or direction not in _HOLDS:
            raise self._unknown(loop, "its condition does not compare a counter with a limit")
        (index, offset), limit = sides[moving[0]], sides[1 - moving[0]]
        start = self._initial(loop, index)
        stop = limit[1] if limit[0] is None else self._initial(loop, limit[0])
        step = self._step(loop, index)
        if start is None or stop is None:
            raise self._unknown(loop, "its start or its limit is not constant")
        if limit[0] is not None:
            stop += limit[1]
        if moving[0] == 1:
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        return self._count(loop, start + offset, stop, step, direction)

    def _count(self, loop: Instruction, start: int, stop: int, step: int, direction: str) -> int:
        if not _HOLDS[direction](start, stop):
            return 0
        span = stop - start
        if direction in ("LE", "GE"):
            span += 1 if direction == "LE" else -1
        if span * step <= 0 or (direction == "NE" and span % step):
            raise self._unknown(
                loop, f"it would never end: it runs from {start} by {step} to {stop}"
            )
        return math.ceil(span / step)

    def _unknown(self, loop: Instruction, why: str) -> HloError:
        return HloError(
            f"the trip count of loop {loop.name} (in {loop.computation}) is unknown: {why}. "
            "FLOPs and collectives inside it cannot be counted."
        )

    def _computation(self, name: str) -> Computation:
        return self._module.computations[name]

    def _through(self, instruction: Instruction) -> Instruction:
        """Returns the instruction that computes this value, through copies and one-result fusions."""
        while True:
            if instruction.opcode in _TRANSPARENT:
                instruction = self._module.operand(instruction, 0)
            elif instruction.opcode in ("fusion", "call"):
                instruction = self._computation(_callees(instruction)[0]).result
            elif instruction.opcode == "parameter" and not self._is_loop(instruction):
                argument = self._argument(instruction)
                if argument is None:
                    return instruction
                instruction = argument
            else:
                return instruction

    def _is_loop(self, parameter: Instruction) -> bool:
        return any(c.opcode == "while" for c in self._callers.get(parameter.computation, ()))

    def _argument(self, parameter: Instruction) -> Instruction | None:
        callers = self._callers.get(parameter.computation, [])
        if len(callers) != 1 or callers[0].opcode not in ("fusion", "call"):
            return None
        return self._module.operand(callers[0], int(parameter.argument))

    def _linear(self, instruction: Instruction) -> tuple[int | None, int | None]:
        """Returns (i, c) for element i of the loop's tuple plus c; (None, c) for a constant."""
        instruction = self._through(instruction)
        if instruction.opcode == "constant":
            return None, _integer(instruction)
        if instruction.opcode == "get-tuple-element":
            source = self._through(self._module.operand(instruction, 0))
            index = int(instruction.attribute("index"))
            if source.opcode == "tuple":
                return self._linear(self._module.operand(source, index))
            if source.opcode == "parameter" and self._is_loop(source):
                return index, 0
        if instruction.opcode in ("add", "subtract"):
            (i, a), (j, b) = (self._linear(self._module.operand(instruction, k)) for k in (0, 1))
            if a is not None and b is not None and not (i is not None and j is not None):
                if instruction.opcode == "add":
                    return (i if i is not None else j), a + b
                if j is None:
                    return i, a - b
        return None, None

    def _element(self, loop: Instruction, index: int) -> Instruction | None:
        """Returns the value of element `index` of the loop's tuple after a trip."""
        root = self._through(self._computation(loop.callees("body")[0]).result)
        return self._module.operand(root, index) if root.opcode == "tuple" else None

    def _step(self, loop: Instruction, index: int) -> int:
        """Returns the amount that one trip adds to element `index`; 0 if it is constant or not a counter."""
        element = self._element(loop, index)
        if element is None:
            return 0
        source, step = self._linear(element)
        return step if source == index and step is not None else 0

    def _initial(self, loop: Instruction, index: int) -> int | None:
        """Returns the constant initial value of element `index` of the loop's tuple."""
        source = self._through(self._module.operand(loop, 0))
        if source.opcode == "tuple":
            return self._constant(self._module.operand(source, index))
        if source.opcode == "while":
            return self._unchanged(source, index)
        return None

    def _unchanged(self, loop: Instruction, index: int) -> int | None:
        """Returns the initial value of an element that no trip of `loop` changes."""
        element = self._element(loop, index)
        if element is None or self._linear(element) != (index, 0):
            return None
        return self._initial(loop, index)

    def _constant(self, instruction: Instruction) -> int | None:
        instruction = self._through(instruction)
        index, value = self._linear(instruction)
        if index is None:
            return value
        # An element of an enclosing loop's tuple: constant when that loop never changes it.
        loops = [c for c in self._callers[instruction.computation] if c.opcode == "while"]
        outer = self._unchanged(loops[0], index) if len(loops) == 1 else None
        return None if outer is None or value is None else outer + value


def _callees(instruction: Instruction) -> list[str]:
    """Returns the computations this instruction executes, except scalar functions."""
    match instruction.opcode:
        case "while":
            return instruction.callees("body", "condition")
        case "fusion" | "async-start":
            return instruction.callees("calls")
        case "call":
            return instruction.callees("to_apply")
        case "conditional":
            return instruction.callees(
                "branch_computations", "true_computation", "false_computation"
            )
        case "custom-call":
            return instruction.callees("called_computations", "calls")
    return []


def _integer(constant: Instruction) -> int | None:
    text = constant.argument.strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None
