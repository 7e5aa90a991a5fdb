"""Procedures on strings of digits: their results, traces of calls, and an interpreter of traces.

A call is `sort(482)=248`. A trace goes on with all states before the result, what remains of the operand
and what is written by then: `sort(482)=248:48|2,8|24`.
"""

import dataclasses
import re
from collections.abc import Callable

DIGITS = 3
STATES = ":"  # precedes the states of a trace

_CALL = re.compile(r"([a-z]+)\((\d+)\)=(\d+)(?::([\d|,]+))?")
_NEXT = str.maketrans("0123456789", "1234567890")


@dataclasses.dataclass(frozen=True)
class Procedure:
    """A procedure twice: at once, as writers of traces use it, and by steps, as the interpreter does.

    Attributes:
      result: of an operand.
      take: index of the digit that a step takes from what remains.
      write: what the step writes for it.
    """

    result: Callable[[str], str]
    take: Callable[[str], int]
    write: Callable[[str], str]


PROCEDURES = {
    "shift": Procedure(
        lambda operand: operand.translate(_NEXT),
        lambda rest: 0,
        lambda digit: str((int(digit) + 1) % 10),
    ),
    "reverse": Procedure(lambda operand: operand[::-1], lambda rest: len(rest) - 1, str),
    "sort": Procedure(
        lambda operand: "".join(sorted(operand)), lambda rest: rest.index(min(rest)), str
    ),
}


def states(name: str, operand: str) -> list[tuple[str, str]]:
    """(what remains, what is written) after each step; the last one holds the result."""
    procedure = PROCEDURES[name]
    rest, written, out = operand, "", []
    while rest:
        at = procedure.take(rest)
        rest, written = rest[:at] + rest[at + 1 :], written + procedure.write(rest[at])
        out.append((rest, written))
    return out


def call(name: str, operand: str) -> str:
    """A call with its result."""
    return f"{name}({operand})={PROCEDURES[name].result(operand)}"


def trace(name: str, operand: str) -> str:
    """A call with its result and the states before it."""
    shown = ",".join(f"{rest}|{written}" for rest, written in states(name, operand)[:-1])
    return f"{call(name, operand)}{STATES}{shown}"


def holds(text: str) -> bool:
    """Executes a call or trace: whether it is whole, and all it claims is what comes out."""
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in PROCEDURES:
        return False
    name, operand, result, shown = match.groups()
    *before, (_, last) = states(name, operand)
    return result == last and shown in (None, ",".join("|".join(state) for state in before))
