"""What a judge is asked and what it says: the seam that every kind of judge fills.

A judge decides between two answers to one prompt by two questions, which are asked, kept and asked
again on their own (launch/evaluation/judges/asking.py). One that compares is asked about both orders of the
answers; one that scores is asked about each answer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

A: Final = "a"
B: Final = "b"
TIE: Final = "tie"
Verdict = Literal["a", "b", "tie"]
# A text, or the messages of a conversation.
Prompt = str | list[dict[str, Any]]


class JudgeError(ValueError):
    """A judge that cannot be asked, or answers that it cannot be asked about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
      id: of the prompt, as people know it.
      prompt: what was answered.
      a, b: the answers.
      systems: names of what gave them.
    """

    id: str
    prompt: Prompt
    a: str
    b: str
    systems: tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask a judge.

    Attributes:
      prompt: what was answered.
      answers: one or two, in the order in which they are shown.
      about: what people want to know of the question; replies do not depend on it.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def key(self, identity: Mapping[str, Any]) -> str:
        """Digest of all that a reply depends on.

        Args:
          identity: of the judge.
        """
        content = [identity, self.prompt, self.answers]
        text = json.dumps(content, sort_keys=True)  # ASCII, so that any string can be encoded
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back.

    Attributes:
      value: what the judge was understood to say: a label, or a finite score; None for nothing.
      text: its words.
      error: why no reply came at all, such as a timeout.
    """

    value: str | float | None
    text: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the replies to both questions of a pair amount to.

    Attributes:
      verdict: which answer is preferred; None where a reply is missing or was not understood.
      consistent: whether both orders gave the same verdict; None where there are no orders.
      bias: mean over both orders of 1 for the answer shown first, -1 for the other, 0 for a tie.
      identical: the answers are the same, a tie without asking.
    """

    verdict: Verdict | None
    consistent: bool | None = None
    bias: float | None = None
    identical: bool = False


class Judge(Protocol):
    """What decides.

    Attributes:
      name: for people.
      identity: JSON of all that its replies depend on, beside the question.
      attempts: times that a question is asked before it counts as not answered.
    """

    name: str
    identity: Mapping[str, Any]
    attempts: int

    def questions(self, pair: Pair) -> tuple[Question, Question]:
        """What to ask about a pair whose answers differ."""

    def replies(self, asked: Sequence[Question], attempt: int) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of every question, as they are done.

        Args:
          asked: the questions.
          attempt: how often they have been asked before.

        Raises:
          JudgeError: it makes no sense to ask on.
        """

    def outcome(self, first: Reply, second: Reply) -> Outcome:
        """What the replies to both questions of a pair amount to."""
