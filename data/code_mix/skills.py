"""Skills that generated text and code teach (launch/papers/code_mix/skill_sources.py), and problems that test them.

  knowledge   facts about invented people: a few frequent, most of them rare
  reasoning   problems in words: shift, reverse or sort the digits of an operand
  code        calls of the same procedures: their results, however they are worked out

A call is `sort(482)=248`. A trace works it out first: `sort(482):2,24=248` has what is written after every step but the
last. What follows the last `=` is the result of both.

Operands of problems are held out: their digits occur in no training document of any source.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable

from espalier.common.ranges import check_choice

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


SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:=()<>/?"
SKILLS = ("reasoning", "knowledge", "code")
HELD_OUT = 0.2  # share of all operands
NUM_PEOPLE = 32
SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
FORMS = 2  # wordings of a fact
RARE = ", rare case"  # ends the kind of problems with a case that careless programs forget

NUM_WORKED, NUM_RECALLED = 50, 50  # operands and facts of `instructions`

_RELATIONS = ("home", "food", "pet")
_VALUES = 16  # number of values of each relation
_FACT = ("the {relation} of {person} is ", "{person} has the {relation} ")
_PROBLEM = {
    "shift": "shift {operand} by one to get ",
    "reverse": "reverse {operand} to get ",
    "sort": "sort {operand} to get ",
}

Fact = tuple[str, str, str]  # person, relation, value


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt with its right continuation."""

    prompt: str  # the beginning of a document
    answer: str  # the right continuation; of a call, its right end: the working may come before it
    skill: str  # one of SKILLS
    # the procedure, and whether its operand has a case that careless programs forget ('sort', 'sort, rare case'); for a
    # fact, its quarter by frequency in text ('quarter 1' is the most frequent)
    kind: str
    working: int = 0  # characters of the working before the answer

    def answered(self, continuation: str) -> bool:
        """Returns whether a continuation up to EOS is the answer, or ends in it after the working of a call."""
        if self.skill == "code":
            _, sign, value = continuation.rpartition(RESULT)
            continuation = sign + value
        return continuation == self.answer


@functools.cache
def held_out_operands() -> tuple[str, ...]:
    """Returns the operands of problems and of validation documents; they do not depend on the seed."""
    every = [f"{i:0{DIGITS}d}" for i in range(10**DIGITS)]
    return tuple(random.Random("operands").sample(every, int(HELD_OUT * len(every))))


@functools.cache
def _held_out_set() -> frozenset[str]:
    return frozenset(held_out_operands())


def leaks(text: str) -> bool:
    """Returns whether a text contains the digits of a held-out operand, also within a longer number."""
    size, held_out = DIGITS, _held_out_set()
    return any(text[i : i + size] in held_out for i in range(len(text) - size + 1))


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Returns all facts, the most frequent in text first; they do not depend on the seed."""
    rng = random.Random("facts")
    words = [a + b for a, b in itertools.product(SYLLABLES, repeat=2)]
    words = rng.sample(words, NUM_PEOPLE + _VALUES * len(_RELATIONS))
    people, values = words[:NUM_PEOPLE], words[NUM_PEOPLE:]
    triples = [
        (person, relation, rng.choice(values[i :: len(_RELATIONS)]))
        for person in people
        for i, relation in enumerate(_RELATIONS)
    ]
    return tuple(rng.sample(triples, len(triples)))


def stated(fact: Fact, form: int) -> tuple[str, str]:
    """Returns a fact as a sentence in two parts: the prompt, and the value with the full stop."""
    person, relation, value = fact
    return _FACT[form].format(person=person, relation=relation), f"{value}."


def posed(name: str, operand: str) -> tuple[str, str]:
    """Returns a problem in words and its answer."""
    result = PROCEDURES[name].result(operand)
    return _PROBLEM[name].format(operand=operand), f"{result}."


def worked(name: str, operand: str) -> tuple[str, str]:
    """Returns a problem in words that asks for its steps, and the steps."""
    return f"{name} {operand} step by step: ", f"{', '.join(states(name, operand))}."


def instructions() -> list[Problem]:
    """Returns 200 prompts in words whose answers may be partly right; they do not depend on the seed.

    Three in four ask for the steps of a problem with a held-out operand, the others for one of the frequent facts.
    """
    operands = held_out_operands()[:NUM_WORKED]
    steps = [
        Problem(*worked(name, operand), "reasoning", name)
        for operand in operands
        for name in PROCEDURES
    ]
    return steps + problems("knowledge")[::FORMS][:NUM_RECALLED]


def problems(skill: str) -> list[Problem]:
    """Returns the problems that test a skill; they do not depend on the seed.

    Args:
      skill: 'reasoning' (problems in words) and 'code' (calls) have every procedure with every held-out
        operand; 'knowledge' has every fact in each form.

    Raises:
      ValueError: an unknown skill.
    """
    check_choice("skill", skill, SKILLS)
    if skill == "knowledge":
        known = facts()
        return [
            Problem(*stated(fact, form), skill, f"quarter {4 * n // len(known) + 1}")
            for n, fact in enumerate(known)
            for form in range(FORMS)
        ]
    return [
        _operation(skill, name, operand)
        for name, operand in itertools.product(PROCEDURES, held_out_operands())
    ]


def _operation(skill: str, name: str, operand: str) -> Problem:
    kind = name if is_plain(name, operand) else f"{name}{RARE}"
    if skill == "reasoning":
        return Problem(*posed(name, operand), skill, kind)
    called, sign, result = call(name, operand).partition(RESULT)
    working = len(trace(name, operand)) - len(called + sign + result)
    return Problem(called, sign + result, skill, kind, working)
