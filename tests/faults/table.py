"""What a fault table is made of: rows of cases, and the verdicts on them.

A row is a kind of fault, and a case is one way in which it happens. A case is a function of the bench, the place where
cases work. It returns if what the row promises held, and raises otherwise: `Lost`, `Silent` or `Unclear`. Any other
exception of a case is unclear too, because a user would see its traceback.
"""

import dataclasses
import hashlib
import pathlib
import random
from collections.abc import Callable, Iterable
from typing import Any

HELD = "held"


class NotHeld(Exception):  # noqa: N818
    """A promise that was not held; a subclass is the verdict."""

    verdict = "unclear"


class Lost(NotHeld):
    """Data or steps are lost beyond what is promised."""

    verdict = "lost"


class Silent(NotHeld):
    """A wrong result without an error."""

    verdict = "silent"


class Unclear(NotHeld):
    """A traceback, a hang, or an exit status or message that does not say what to do."""

    verdict = "unclear"


class NotTried(Exception):  # noqa: N818
    """This machine cannot make the fault; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The place where cases work.

    Attributes:
      out: work folder of the whole table, which cases of one row may share.
      folder: empty folder of this case.
      seed: seed of all random choices.
      shim: library that makes faults of file systems and clocks, loaded into this process; None without a C compiler.
    """

    out: pathlib.Path
    folder: pathlib.Path
    seed: int
    shim: Any = None

    def random(self, name: str) -> random.Random:
        """Returns a random generator of this name, the same at each run with this seed."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return random.Random(digest)


@dataclasses.dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
      name: unique in its row.
      run: makes the fault; returns the number of faults tried, None for 1.
      seconds: time after which the case counts as a hang.
      own_process: whether it needs a process of its own, because it ends, limits or changes the process.
    """

    name: str
    run: Callable[[Bench], int | None]
    seconds: float = 700.0
    own_process: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of fault.

    Attributes:
      number: number of the row.
      fault: what happens.
      promise: what must hold.
      cases: returns the cases, the same for the same seed; called with the seed.
      sample: number of cases in a short sample.
    """

    number: int
    fault: str
    promise: str
    cases: Callable[[int], Iterable[Case]]
    sample: int = 3


def selected(row: Row, seed: int, *, sample: bool) -> list[Case]:
    """Returns the cases of a row, or of its sample, which are spread over the row."""
    cases = list(row.cases(seed))
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), f"row {row.number} has two cases of one name"
    if not sample or len(cases) <= row.sample:
        return cases
    return [cases[i * len(cases) // row.sample] for i in range(row.sample)]


def refused(call: Callable[[], Any], *errors: type[Exception], naming: str = "") -> Exception:
    """Returns the error with which `call` refuses its input.

    Args:
      call: reads the bad input.
      errors: classes that count as a clear error.
      naming: what the message must contain, such as the name of a file.

    Raises:
      Silent: the input was accepted.
      Unclear: another error, or a message that is long or does not name the culprit.
    """
    try:
        result = call()
    except errors as error:
        text = str(error)
        if naming not in text:
            raise Unclear(f"the error does not name {naming}: {text[:300]}") from error
        if len(text) > 5000:
            raise Unclear(f"an error of {len(text)} characters: {text[:200]}") from error
        return error
    raise Silent(f"accepted: {str(result)[:200]}")
