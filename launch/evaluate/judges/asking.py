"""Questions to judges, replies and outcomes: the interface of every kind of judge, and how judges are asked.

A judge decides between two answers to one prompt by two questions. A judge that compares is asked about both orders of the
answers; a judge that scores is asked about each answer. Only unanswered questions are asked, and each reply is written on
arrival as a JSON line of the journal.
"""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from espalier.common.bars import Bar
from espalier.data.cache import fingerprint
from espalier.launch.inference.row_files import ResumedRows

A: Final = "a"
B: Final = "b"
TIE: Final = "tie"
Verdict = Literal["a", "b", "tie"]
# A text, or the messages of a conversation.
Prompt = str | list[dict[str, Any]]
# Number of consecutive questions without a reply after which asking stops.
_PATIENCE = 32


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
        return fingerprint.of_json(content)[:32]


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


class Journal(ResumedRows):
    """Replies by the keys of their questions.

    Raises:
      JudgeError: a line is not a judge's reply.
    """

    def __init__(self, *file: Any, **options: Any):
        super().__init__(*file, **options)
        self._replies: dict[str, list[Reply]] = defaultdict(list)
        for place, record in self.rows:
            if not {"key", "value"} <= record.keys():
                raise JudgeError(
                    f"{place}: not a judge's reply. Delete the line to ask the question again."
                )
            if "error" not in record:
                reply = Reply(value=record["value"], text=record.get("text", ""))
                self._replies[record["key"]].append(reply)

    def replies(self, key: str) -> list[Reply]:
        """Returns the judge's replies to a question, by attempt."""
        return self._replies.get(key, [])

    def add_reply(self, key: str, question: Question, reply: Reply, *, judge: str) -> None:
        """Writes a reply. The record of a missing reply is only for readers of the file."""
        record = {"key": key, "judge": judge, **question.about, "value": reply.value}
        record |= {"text": reply.text} if reply.text else {}
        if reply.error:
            record["error"] = reply.error
        else:
            self._replies[key].append(reply)
        self.add(record)


@dataclasses.dataclass(kw_only=True)
class Tally:
    """Counts of questions and replies.

    Attributes:
      questions: number of different questions.
      kept: questions answered by earlier runs, which are not asked again.
      asked: attempts in this run.
      not_understood: replies in this run that could not be read.
      no_reply: attempts in this run without a reply, by reason.
    """

    questions: int = 0
    kept: int = 0
    asked: int = 0
    not_understood: int = 0
    no_reply: Counter = dataclasses.field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Returns the counts as JSON, with the most frequent reasons."""
        silent = {"attempts": self.no_reply.total(), "reasons": dict(self.no_reply.most_common(5))}
        return {**dataclasses.asdict(self), "no_reply": silent}

    def __str__(self) -> str:
        return (
            f"{self.questions:,} questions, {self.kept:,} of them answered before; asked "
            f"{self.asked:,} times: {self.not_understood:,} replies not understood, "
            f"{self.no_reply.total():,} that did not come"
        )


def judge_pairs(
    judge: Judge, pairs: Sequence[Pair], journal: Journal
) -> tuple[list[Outcome], Tally]:
    """Returns the outcome of every pair, after asking the judge the unanswered questions.

    Identical answers are a tie without asking. If a reply cannot be read, the question is repeated, up to
    `judge.attempts` times in this and earlier runs together. If no reply comes, it is repeated up to as many times in
    each run. A pair without both replies is invalid: it counts for neither side.

    Raises:
      JudgeError: the judge cannot be reached, or sends no replies.
    """
    asked = [None if p.a == p.b else judge.questions(p) for p in pairs]
    questions = {q.key(judge.identity): q for two in asked if two for q in two}
    tally = ask(judge, questions, journal)

    def outcome(two: tuple[Question, Question] | None) -> Outcome:
        if two is None:
            return Outcome(verdict=TIE, identical=True)
        replies = understood(judge, two, journal)
        return judge.outcome(*replies) if replies else Outcome(verdict=None)

    return [outcome(two) for two in asked], tally


def understood(judge: Judge, asked: Sequence[Question], journal: Journal) -> list[Reply]:
    """Returns the last reply to each question; none if a reply is missing or was not understood."""
    replies = [reply for q in asked for reply in journal.replies(q.key(judge.identity))[-1:]]
    complete = len(replies) == len(asked) and all(reply.value is not None for reply in replies)
    return replies if complete else []


def ask(judge: Judge, questions: Mapping[str, Question], journal: Journal) -> Tally:
    """Asks the judge the unanswered questions, by their keys; see `judge_pairs` for repetitions and errors."""
    silent: Counter = Counter()  # attempts of this run without a reply, by key

    def attempts(key: str) -> int:
        """Returns the number of attempts at a question; `judge.attempts` if it is answered."""
        replies = journal.replies(key)
        answered = bool(replies) and replies[-1].value is not None
        return judge.attempts if answered else len(replies) + silent[key]

    heard = any(journal.replies(key) for key in questions)
    num_done = sum(attempts(key) >= judge.attempts for key in questions)
    tally = Tally(questions=len(questions), kept=num_done)
    with Bar(total=len(questions), initial=num_done, desc="judge", unit="question") as progress:
        for attempt in range(judge.attempts):
            keys = [key for key in questions if attempts(key) == attempt]
            if not keys:
                continue
            in_a_row = 0
            replies = judge.replies([questions[key] for key in keys], attempt)
            with contextlib.closing(replies):  # type: ignore[type-var]
                for i, reply in replies:
                    key = keys[i]
                    journal.add_reply(key, questions[key], reply, judge=judge.name)
                    tally.asked += 1
                    if reply.error:
                        silent[key] += 1
                        tally.no_reply[reply.error] += 1
                        in_a_row += 1
                        if attempt == 0 and in_a_row >= _PATIENCE:
                            raise _silence(judge, in_a_row, reply.error)
                    else:
                        heard, in_a_row = True, 0
                        tally.not_understood += reply.value is None
                    progress.set_postfix_str(_counts(tally), refresh=False)
                    progress.update(attempts(key) >= judge.attempts)
            if not heard:
                raise _silence(judge, in_a_row, tally.no_reply.most_common(1)[0][0])
    return tally


def _counts(tally: Tally) -> str:
    silent = tally.no_reply.total()
    parts = [(tally.not_understood, "not understood"), (silent, "without reply")]
    return ", ".join(f"{count:,} {what}" for count, what in parts if count)


def _silence(judge: Judge, count: int, reason: str) -> JudgeError:
    return JudgeError(
        f"{judge.name} has given no answer to {count} questions in a row: {reason}. Earlier replies are "
        "saved: repair the judge, then repeat the command to continue."
    )
