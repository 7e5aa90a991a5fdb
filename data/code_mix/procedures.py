"""Procedures on strings of digits: their results, traces of calls, and an interpreter of traces.

A call is `sort(482)=248`. A trace works it out first: `sort(482):2,24=248` has what is written after every step but the
last. What follows the last `=` is the result of both.
"""

import dataclasses
import re
from collections.abc import Callable

DIGITS = 3
STATES = ":"  # precedes the states of a trace
RESULT = "="  # precedes the result

_CALL = re.compile(rf"([a-z]+)\((\d+)\)(?:{STATES}([\d,]+))?{RESULT}(\d+)")
_NEXT = str.maketrans("0123456789", "1234567890")
_FORGOTTEN = "0"  # operands with this digit are the case that careless programs forget


@dataclasses.dataclass(frozen=True)
class Procedure:
    """Two definitions of a procedure: a function for calls, and steps for states of traces.

    Attributes:
      result: operand -> result.
      take: remaining digits -> index of the digit that the next step takes.
      write: the taken digit -> the digit that the step writes.
    """

    result: Callable[[str], str]
    take: Callable[[str], int]
    write: Callable[[str], str]

    def careless(self, operand: str) -> str:
        """Returns the result of a program that is off by one at its end for operands with a zero."""
        result = self.result(operand)
        if _FORGOTTEN not in operand:
            return result
        return result[:-1] + result[-1].translate(_NEXT)


PROCEDURES = {
    "shift": Procedure(
        lambda operand: operand.translate(_NEXT),
        lambda rest: 0,
        lambda digit: str((int(digit) + 1) % 10),
    ),
    "reverse": Procedure(
        lambda operand: operand[::-1],
        lambda rest: len(rest) - 1,
        str,
    ),
    "sort": Procedure(
        lambda operand: "".join(sorted(operand)),
        lambda rest: rest.index(min(rest)),
        str,
    ),
}


def states(name: str, operand: str) -> list[str]:
    """Returns the digits written after each step; the last are the result."""
    procedure = PROCEDURES[name]
    rest, out = operand, [""]
    while rest:
        at = procedure.take(rest)
        out.append(out[-1] + procedure.write(rest[at]))
        rest = rest[:at] + rest[at + 1 :]
    return out[1:]


def is_plain(name: str, operand: str) -> bool:
    """Returns whether careless programs are right for the operand."""
    procedure = PROCEDURES[name]
    return procedure.careless(operand) == procedure.result(operand)


def call(name: str, operand: str, *, careless: bool = False) -> str:
    """Returns a call with its result."""
    return f"{name}({operand}){RESULT}{_result(name, operand, careless)}"


def trace(name: str, operand: str, *, careless: bool = False) -> str:
    """Returns a call with the states before its result, and its result."""
    shown = ",".join(states(name, operand)[:-1])
    return f"{name}({operand}){STATES}{shown}{RESULT}{_result(name, operand, careless)}"


def _result(name: str, operand: str, careless: bool) -> str:
    procedure = PROCEDURES[name]
    return (procedure.careless if careless else procedure.result)(operand)


def holds(text: str) -> bool:
    """Executes a call or trace; returns whether it is complete and its result and states are right."""
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in PROCEDURES:
        return False
    name, operand, shown, result = match.groups()
    *before, last = states(name, operand)
    return result == last and shown in (None, ",".join(before))
