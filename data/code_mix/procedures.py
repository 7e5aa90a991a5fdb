"""Procedures on strings of digits: their results, traces of calls, and an interpreter of traces.

A call is `sort(482)=248`. A trace adds all states before the result, each the remaining digits of the operand
and the digits written so far: `sort(482)=248:48|2,8|24`.
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
    """Two definitions of a procedure: a function for calls, and steps for states of traces."""

    result: Callable[[str], str]  # operand -> result
    take: Callable[[str], int]  # remaining digits -> index of the digit that the next step takes
    write: Callable[[str], str]  # the taken digit -> the digit that the step writes


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
    """Returns (remaining digits, written digits) after each step; the last pair holds the result."""
    procedure = PROCEDURES[name]
    rest, written, out = operand, "", []
    while rest:
        at = procedure.take(rest)
        rest, written = rest[:at] + rest[at + 1 :], written + procedure.write(rest[at])
        out.append((rest, written))
    return out


def call(name: str, operand: str) -> str:
    """Returns a call with its result."""
    return f"{name}({operand})={PROCEDURES[name].result(operand)}"


def trace(name: str, operand: str) -> str:
    """Returns a call with its result and the states before the result."""
    shown = ",".join(f"{rest}|{written}" for rest, written in states(name, operand)[:-1])
    return f"{call(name, operand)}{STATES}{shown}"


def holds(text: str) -> bool:
    """Executes a call or trace; returns whether it is complete and its result and states are right."""
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in PROCEDURES:
        return False
    name, operand, result, shown = match.groups()
    *before, (_, last) = states(name, operand)
    return result == last and shown in (None, ",".join("|".join(state) for state in before))
