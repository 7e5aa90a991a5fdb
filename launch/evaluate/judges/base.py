"""Questions, replies and outcomes: the interface of every kind of judge.

A judge decides between two answers to one prompt by two questions. Questions are asked, stored and repeated separately
(launch/evaluate/judges/asking.py). A judge that compares is asked about both orders of the answers; a judge that
scores is asked about each answer.
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
    """A judge that cannot be used, or answers that it cannot judge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, of two systems by name.

    `id` is the prompt's, for messages; `language` is the name of the language that an answer should be in, or empty.
    """

    id: str
    prompt: Prompt
    a: str
    b: str
    systems: tuple[str, str]
    language: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question to a judge.

    Attributes:
      prompt: the prompt of the answers.
      answers: one or two answers, in the order in which they are shown.
      language: the language that the answers should be in; empty if it does not matter.
      about: facts about the question for readers of the journal; replies do not depend on them.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    language: str = ""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def key(self, identity: Mapping[str, Any]) -> str:
        """Returns the digest of everything that a reply depends on; `identity` is the judge's."""
        content = [identity, self.prompt, self.answers]
        content += [self.language] if self.language else []
        text = json.dumps(content, sort_keys=True)  # ASCII, so that any string can be encoded
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to a question.

    Attributes:
      value: the judge's verdict: a label, or a finite score; None if its text could not be understood.
      text: the text of the reply.
      error: reason that no reply came, such as a timeout; else empty.
    """

    value: str | float | None
    text: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a pair, from the replies to both questions.

    Attributes:
      verdict: the preferred answer; None if a reply is missing or was not understood.
      consistent: whether both orders gave the same verdict; None for a judge that scores.
      bias: mean over both orders of 1 for the answer shown first, -1 for the other, 0 for a tie.
      identical: whether the answers are equal, which is a tie without asking.
    """

    verdict: Verdict | None
    consistent: bool | None = None
    bias: float | None = None
    identical: bool = False


class Judge(Protocol):
    """A judge.

    Attributes:
      name: name for messages.
      identity: everything besides the question that its replies depend on, as JSON.
      attempts: number of times to ask a question before it counts as not answered.
    """

    name: str
    identity: Mapping[str, Any]
    attempts: int

    def questions(self, pair: Pair) -> tuple[Question, Question]:
        """Returns the two questions about a pair whose answers differ."""

    def replies(self, asked: Sequence[Question], attempt: int) -> Iterator[tuple[int, Reply]]:
        """Yields (index, reply) of every question, in the order in which they finish, after `attempt` earlier attempts.

        Raises:
          JudgeError: further questions would fail too.
        """

    def outcome(self, first: Reply, second: Reply) -> Outcome:
        """Returns the outcome of a pair from two replies whose values are not None."""
