"""Questions, replies and outcomes: the interface of every kind of judge.

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
      prompt: to which the answers reply.
      a, b: the answers.
      systems: names of the systems that wrote them.
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
      prompt: to which the answers reply.
      answers: one or two, in the order in which they are shown.
      about: facts about the question for people; replies do not depend on them.
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
    """The reply to a question.

    Attributes:
      value: the judge's verdict: a label, or a finite score; None where its words could not be read.
      text: its words.
      error: reason that no reply came, such as a timeout; empty otherwise.
    """

    value: str | float | None
    text: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a pair, from the replies to both questions.

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
    """A judge.

    Attributes:
      name: for people.
      identity: everything that its replies depend on beside the question, as JSON.
      attempts: times that a question is asked before it counts as not answered.
    """

    name: str
    identity: Mapping[str, Any]
    attempts: int

    def questions(self, pair: Pair) -> tuple[Question, Question]:
        """The two questions about a pair whose answers differ."""

    def replies(self, asked: Sequence[Question], attempt: int) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of every question, as they are done.

        Args:
          asked: the questions.
          attempt: how often they have been asked before.

        Raises:
          JudgeError: it makes no sense to ask on.
        """

    def outcome(self, first: Reply, second: Reply) -> Outcome:
        """The outcome of a pair, from the replies to both questions."""
