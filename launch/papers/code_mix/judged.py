"""Win rates of the recipes: their answers to the same prompts, compared by a judge that knows the right answers.

The paper's judge is a large model that reads open answers. Here prompts have right answers, and an answer with the right
last word is better than one without it: `espalier evaluate win_rate` with a judge that scores.
"""

import contextlib
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.data.code_mix import skills
from espalier.launch.evaluate import win_rate
from espalier.launch.evaluate.judges.answers import Answer, System
from espalier.launch.evaluate.judges.asking import Question
from espalier.launch.evaluate.judges.checkpoint import RewardJudge
from espalier.launch.papers.code_mix.scores import ASKED

SHARES = ("win", "tie", "loss")


_SKILLS = dict(zip(ASKED, ("reasoning", "knowledge"), strict=True))


class RightEnd:
    """Scores an answer by its last word: 1 where it is the right one, which is the final result of steps, or the fact."""

    name = "right end"
    identity: Mapping[str, Any] = {"kind": name}

    def __init__(self) -> None:
        self._right = {one.prompt: one.answer for one in skills.instructions()}

    def scores(self, asked: Sequence[Question]) -> Iterator[tuple[int, float]]:
        for i, question in enumerate(asked):
            assert isinstance(question.prompt, str)
            yield i, float(_same_end(question.answers[0], self._right[question.prompt]))


def _same_end(answer: str, right: str) -> bool:
    return answer.split()[-1:] == right.split()[-1:]


def right(answers: Sequence[str]) -> dict[str, float]:
    """Returns the share of `skills.instructions()` that are answered rightly, by what is asked for."""
    found: dict[str, list[bool]] = {skill: [] for skill in _SKILLS.values()}
    for one, text in zip(skills.instructions(), answers, strict=True):
        found[one.skill].append(_same_end(text, one.answer))
    return {asked: sum(found[skill]) / len(found[skill]) for asked, skill in _SKILLS.items()}


def compared(
    answers: Mapping[str, Sequence[str]], out: pathlib.Path
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the shares of won, tied and lost prompts: arm -> other arm -> one of ASKED -> {'win', 'tie', 'loss'}.

    Steps and facts are compared apart, since text that teaches one is not text that teaches the other.

    Args:
      answers: arm -> its answers to `skills.instructions()`.
      out: folder of the judgements.
    """
    shares: dict[str, dict[str, dict[str, Any]]] = {}
    for asked, skill in _SKILLS.items():
        systems = [
            System(
                name=arm,
                path=arm,
                answers=[
                    Answer(place=f"{arm}, prompt {i}", id=str(i), prompt=one.prompt, text=text)
                    for i, (one, text) in enumerate(zip(skills.instructions(), texts, strict=True))
                    if one.skill == skill
                ],
            )
            for arm, texts in answers.items()
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            summary = win_rate.win_rates(systems, RewardJudge(RightEnd()), out=str(out / skill))
        for arm, others in by_arm(summary).items():
            for other, found in others.items():
                shares.setdefault(arm, {}).setdefault(other, {})[asked] = found
    return shares


def by_arm(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the shares of a summary of `espalier evaluate win_rate`, in both directions."""
    out: dict[str, dict[str, Any]] = {}
    turned = {"win": "loss", "tie": "tie", "loss": "win"}
    for pair in summary["pairs"]:
        shares = {share: pair[share]["value"] for share in SHARES}
        out.setdefault(pair["a"], {})[pair["b"]] = shares
        out.setdefault(pair["b"], {})[pair["a"]] = {turned[k]: v for k, v in shares.items()}
    return out
