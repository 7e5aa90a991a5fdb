"""Win rates of the recipes: their answers to the same prompts, compared by a judge that knows the right answers.

The paper's judge is a large model that reads open answers. Here prompts have right answers of several words, and the
answer with more of them is better: `launch.evaluate win_rate` with a judge that scores.
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

SHARES = ("win", "tie", "loss")


class RightWords:
    """Scores an answer by the share of its words that are right: those at their places in the right answer."""

    name = "right words"
    identity: Mapping[str, Any] = {"kind": name}

    def __init__(self) -> None:
        self._right = {one.prompt: one.answer.split() for one in skills.instructions()}

    def scores(self, asked: Sequence[Question]) -> Iterator[tuple[int, float]]:
        for i, question in enumerate(asked):
            assert isinstance(question.prompt, str)
            words, right = question.answers[0].split(), self._right[question.prompt]
            same = sum(one == other for one, other in zip(words, right, strict=False))
            yield i, same / max(len(words), len(right))


def compared(answers: Mapping[str, Sequence[str]], out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the shares of won, tied and lost prompts: arm -> other arm -> {'win', 'tie', 'loss'}.

    Args:
      answers: arm -> its answers to `skills.instructions()`.
      out: folder of the judgements.
    """
    prompts = [one.prompt for one in skills.instructions()]
    systems = [
        System(
            name=arm,
            path=arm,
            answers=[
                Answer(place=f"{arm}, prompt {i}", id=str(i), prompt=prompt, text=text)
                for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            ],
        )
        for arm, texts in answers.items()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        summary = win_rate.win_rates(systems, RewardJudge(RightWords()), out=str(out))
    return by_arm(summary)


def by_arm(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the shares of a summary of `launch.evaluate win_rate`, in both directions."""
    out: dict[str, dict[str, Any]] = {}
    turned = {"win": "loss", "tie": "tie", "loss": "win"}
    for pair in summary["pairs"]:
        shares = {share: pair[share]["value"] for share in SHARES}
        out.setdefault(pair["a"], {})[pair["b"]] = shares
        out.setdefault(pair["b"], {})[pair["a"]] = {turned[k]: v for k, v in shares.items()}
    return out
