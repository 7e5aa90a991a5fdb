"""Skills that generated text and code teach (data/code_mix/skill_sources.py), and problems that ask for them.

  knowledge   facts about invented people, some stated often and most seldom
  reasoning   problems in words: shift, reverse or sort the digits of an operand
  code        calls of the same procedures

Operands that problems ask for are held out: their digits stand in no training document of any source.
"""

import dataclasses
import functools
import itertools
import random

from data.code_mix import procedures

SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:=()|<>/?"
SKILLS = ("reasoning", "knowledge", "code")
HELD_OUT = 0.2  # of all operands
NUM_PEOPLE = 32
SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
FORMS = 2  # in which facts are put

_RELATIONS = ("home", "food", "pet")
_VALUES = 16  # of each relation
_FACT = ("the {relation} of {person} is ", "{person} has the {relation} ")
_PROBLEM = {
    "shift": "shift {operand} by one to get ",
    "reverse": "reverse {operand} to get ",
    "sort": "sort {operand} to get ",
}

Fact = tuple[str, str, str]  # person, relation, value


@dataclasses.dataclass(frozen=True)
class Problem:
    """What to continue, and how.

    Attributes:
      prompt: the beginning of a document.
      answer: what follows; a call's may be followed by its states.
      skill: of SKILLS.
      kind: the procedure, or how often text states the fact: 'quarter 1' is the most frequent.
    """

    prompt: str
    answer: str
    skill: str
    kind: str

    def answered(self, continuation: str) -> bool:
        """Whether this is how a document goes on, to its end."""
        if self.skill == "code":
            continuation = continuation.partition(procedures.STATES)[0]
        return continuation == self.answer


@functools.cache
def held_out_operands() -> tuple[str, ...]:
    """Operands of problems and of held-out documents, the same for all seeds."""
    every = [f"{i:0{procedures.DIGITS}d}" for i in range(10**procedures.DIGITS)]
    return tuple(random.Random("operands").sample(every, int(HELD_OUT * len(every))))


@functools.cache
def _held_out_set() -> frozenset[str]:
    return frozenset(held_out_operands())


def leaks(text: str) -> bool:
    """Whether the digits of a held-out operand stand in a text, in a longer number too."""
    size, held_out = procedures.DIGITS, _held_out_set()
    return any(text[i : i + size] in held_out for i in range(len(text) - size + 1))


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts, the same for all seeds, in order of how often text states them."""
    rng = random.Random("facts")
    words = [a + b for a, b in itertools.product(SYLLABLES, repeat=2)]
    words = rng.sample(words, NUM_PEOPLE + _VALUES * len(_RELATIONS))
    people, values = words[:NUM_PEOPLE], words[NUM_PEOPLE:]
    found = [
        (person, relation, rng.choice(values[i :: len(_RELATIONS)]))
        for person in people
        for i, relation in enumerate(_RELATIONS)
    ]
    return tuple(rng.sample(found, len(found)))


def stated(fact: Fact, form: int) -> tuple[str, str]:
    """A fact as a sentence: its beginning, and the rest, which one must know."""
    person, relation, value = fact
    return _FACT[form].format(person=person, relation=relation), f"{value}."


def posed(name: str, operand: str) -> tuple[str, str]:
    """A problem in words, and its answer."""
    result = procedures.PROCEDURES[name].result(operand)
    return _PROBLEM[name].format(operand=operand), f"{result}."


def problems(skill: str) -> list[Problem]:
    """What a model is asked, the same for all seeds.

    Args:
      skill: 'reasoning' are problems in words and 'code' calls, every procedure with every held-out
        operand; 'knowledge' are all facts in each form.

    Raises:
      ValueError: no such skill.
    """
    if skill == "knowledge":
        known = facts()
        return [
            Problem(*stated(fact, form), skill, f"quarter {4 * n // len(known) + 1}")
            for n, fact in enumerate(known)
            for form in range(FORMS)
        ]
    asked = itertools.product(procedures.PROCEDURES, held_out_operands())
    if skill == "reasoning":
        return [Problem(*posed(name, operand), skill, name) for name, operand in asked]
    if skill == "code":
        calls = [(name, procedures.call(name, x).partition("=")) for name, x in asked]
        return [Problem(call + sign, result, skill, name) for name, (call, sign, result) in calls]
    raise ValueError(f"skill = {skill!r} is none of {', '.join(SKILLS)}.")
