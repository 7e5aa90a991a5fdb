"""A judge that compares two answers in words, in both orders; a preference that depends on the order is a tie."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from launch.evaluation.judges import template
from launch.evaluation.judges.base import TIE, A, B, Outcome, Pair, Question, Reply, Verdict
from launch.evaluation.judges.template import Template
from launch.inference.chat_endpoint import Silence

# Temperature when a question is repeated, so that the reply may differ.
RETRY_TEMPERATURE = 0.5
# The preference for the answer that is shown first.
_SIGNS: Mapping[Any, int] = {template.FIRST: 1, template.TIE: 0, template.SECOND: -1}


class Writer(Protocol):
    """The interface of models that write replies.

    Attributes:
      name: name for messages.
      identity: JSON of everything besides the prompt that its replies depend on.
    """

    name: str
    identity: Mapping[str, Any]

    def write(
        self, prompts: Sequence[str], *, temperature: float, seed: int
    ) -> Iterator[tuple[int, str | Silence]]:
        """Yields (index, text) of the reply to every prompt, in the order in which they finish.

        The temperature, 0 for the first attempt, is added to the writer's own.

        Raises:
          JudgeError: further questions would fail too.
        """


class PairwiseJudge:
    """See launch/evaluation/judges/base.py; `writer` writes replies to prompts in the wording of `wording`."""

    def __init__(self, writer: Writer, *, wording: Template, attempts: int = 3):
        self._writer = writer
        self._wording = wording
        self.name = writer.name
        self.identity: Mapping[str, Any] = {**writer.identity, **wording.identity}
        self.attempts = attempts

    def questions(self, pair: Pair) -> tuple[Question, Question]:
        def question(answers: tuple[str, str], systems: tuple[str, str]) -> Question:
            about = {"id": pair.id, "first": systems[0], "second": systems[1]}
            return Question(
                prompt=pair.prompt, answers=answers, language=pair.language, about=about
            )

        a, b = pair.systems
        return question((pair.a, pair.b), (a, b)), question((pair.b, pair.a), (b, a))

    def replies(self, asked: Sequence[Question], attempt: int) -> Iterator[tuple[int, Reply]]:
        prompts = [
            self._wording.render(q.prompt, *q.answers, language=q.language, reminder=attempt > 0)
            for q in asked
        ]
        temperature = RETRY_TEMPERATURE if attempt else 0.0
        for i, text in self._writer.write(prompts, temperature=temperature, seed=attempt):
            if isinstance(text, Silence):
                yield i, Reply(value=None, error=text.reason)
            else:
                yield i, Reply(value=self._wording.read(text), text=text)

    def outcome(self, first: Reply, second: Reply) -> Outcome:
        forth, back = _SIGNS[first.value], _SIGNS[second.value]
        consistent = forth == -back
        verdict: Verdict = {1: A, 0: TIE, -1: B}[forth] if consistent else TIE
        return Outcome(verdict=verdict, consistent=consistent, bias=(forth + back) / 2)
