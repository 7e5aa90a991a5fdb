"""Regular expressions that come in files of others, such as a run's model.json: they match in linear time, so that reading ends.

The matcher of `re` tries one way to match after the other, and `(a+)+!` has exponentially many. Here all ways are followed
at the same time, as states of an automaton (Thompson, 1968). The syntax is that of `re`, without what no automaton has.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_MOST = 5000  # parts of a pattern, with its counted repeats written out
_MOST_LOOKS = 3  # each multiplies the time by the length of the text
_END = 0  # the state in which a pattern has matched
_CLASSES = {
    **{ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_SPACE: r"\s", ops.CATEGORY_WORD: r"\w"},
    **{ops.CATEGORY_NOT_DIGIT: r"\D", ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_NOT_WORD: r"\W"},
}
_CHARACTERS = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)


class PatternError(ValueError):
    """A text that is not a regular expression, or one that is not matched in linear time."""


@dataclasses.dataclass
class _State:
    """A state: it reads the character `part` if `reads`; else it goes on to `then` at once, if the condition `part` holds.

    A condition is None, an (AT, place) or an (ASSERT or ASSERT_NOT, first state of what has to follow).
    """

    reads: bool
    part: Any
    then: list[int]


class Pattern:
    """A regular expression; see `compiled`.

    Raises:
      PatternError: the text is no regular expression; it has flags, back-references, possessive repeats or looks at earlier
        characters; or it is too long.
    """

    def __init__(self, text: str):
        self.text = text
        self._states = [_State(False, None, [])]
        self._count = self._looks = 0
        try:
            tree = _parser.parse(text)
            if tree.state.flags & ~(re.UNICODE | re.VERBOSE):
                raise self._error("flags are not supported: remove them")
            self._start = self._sequence(tree, _END)
        except (re.error, RecursionError, OverflowError, TypeError) as error:
            raise self._error(f"it is not a regular expression ({error})") from None

    def _error(self, problem: str) -> PatternError:
        return PatternError(f"the pattern {self.text[:80]!r}: {problem}")

    def _add(self, reads: bool, part: Any, *then: int) -> int:
        self._states.append(_State(reads, part, [*then]))
        return len(self._states) - 1

    def _sequence(self, items: Iterable[tuple[Any, Any]], then: int) -> int:
        """Returns the first state of parts that follow each other, and after which `then` comes."""
        for op, value in reversed(list(items)):
            then = self._part(op, value, then)
        return then

    def _part(self, op: Any, value: Any, then: int) -> int:
        self._count += 1
        if self._count > _MOST:
            raise self._error(f"it has more than {_MOST} parts: shorten it, or lower its counts")
        if op in _CHARACTERS:
            return self._add(True, (op, value), then)
        if op is ops.AT:
            return self._add(False, (op, value), then)
        if op is ops.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(value[3], then)
        if op is ops.BRANCH:
            return self._add(False, None, *(self._sequence(x, then) for x in value[1]))
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, body = value
            return self._repeat(least, most, body, then)
        if op in (ops.ASSERT, ops.ASSERT_NOT) and value[0] == 1:
            self._looks += 1
            if self._looks > _MOST_LOOKS:
                raise self._error(f"it looks ahead more than {_MOST_LOOKS} times: join these parts")
            return self._add(False, (op, self._sequence(value[1], _END)), then)
        name = str(op).lower().replace("_", " ")
        raise self._error(f"{name} is not supported: write the pattern without it")

    def _repeat(self, least: int, most: Any, body: Any, then: int) -> int:
        if most is ops.MAXREPEAT:
            loop = self._add(False, None)
            self._states[loop].then = [self._sequence(body, loop), then]
            then = loop
        else:
            for _ in range(self._times(most - least)):
                then = self._add(False, None, self._sequence(body, then), then)
        for _ in range(self._times(least)):
            then = self._sequence(body, then)
        return then

    def _times(self, count: int) -> int:
        self._count += count  # also of nothing, which adds no states
        return min(count, _MOST)

    def fullmatch(self, text: str, start: int = 0) -> bool:
        """Returns whether the pattern matches all of `text` from the index `start` on; `^` is the beginning of `text`."""
        return self._follow(self._start, text, start, whole=True)

    def search(self, text: str) -> bool:
        """Returns whether the pattern matches a part of `text`."""
        return self._follow(self._start, text, 0, anywhere=True)

    def _follow(
        self, first: int, text: str, start: int, *, whole: bool = False, anywhere: bool = False
    ) -> bool:
        current: set[int] = set()
        for i in range(start, len(text) + 1):
            if i == start or anywhere:
                current.add(first)
            reached = self._reached(current, text, i)
            if _END in reached and (i == len(text) or not whole):
                return True
            if i == len(text) or not (reached or anywhere):
                return False
            states = (self._states[x] for x in reached)
            current = {x.then[0] for x in states if x.reads and _fits(x.part, text[i])}
        return False

    def _reached(self, states: Iterable[int], text: str, i: int) -> set[int]:
        """Returns the states that are reached at index `i` without reading a character."""
        reached, open_ = set(states), list(states)
        while open_:
            state = self._states[open_.pop()]
            if not state.reads and (state.part is None or self._holds(state.part, text, i)):
                new = [x for x in state.then if x not in reached]
                reached.update(new)
                open_ += new
        return reached

    def _holds(self, condition: tuple[Any, Any], text: str, i: int) -> bool:
        op, value = condition
        if op is not ops.AT:
            return self._follow(value, text, i) == (op is ops.ASSERT)
        if value in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return i == 0
        if value is ops.AT_END_STRING:
            return i == len(text)
        if value is ops.AT_END:
            return text[i:] in ("", "\n")
        sides = [bool(re.fullmatch(r"\w", x)) for x in (text[max(0, i - 1) : i], text[i : i + 1])]
        return (sides[0] != sides[1]) == (value is ops.AT_BOUNDARY)


def _fits(part: tuple[Any, Any], character: str) -> bool:
    """Returns whether a part of a parsed pattern is this character."""
    (op, value), code = part, ord(character)
    if op is ops.LITERAL or op is ops.NOT_LITERAL:
        return (code == value) == (op is ops.LITERAL)
    if op is ops.RANGE:
        return value[0] <= code <= value[1]
    if op is ops.CATEGORY:
        return re.fullmatch(_CLASSES[value], character) is not None
    if op is ops.ANY:
        return character != "\n"
    negated = value[0][0] is ops.NEGATE
    return any(_fits(x, character) for x in value[negated:]) != negated


@functools.lru_cache(1 << 12)
def compiled(text: str) -> Pattern:
    """Returns a regular expression, see `Pattern`."""
    return Pattern(text)


@functools.lru_cache(1 << 16)
def fullmatch(pattern: str, text: str) -> bool:
    """Returns whether a regular expression matches a whole text; PatternError as in `Pattern`."""
    return compiled(pattern).fullmatch(text)
