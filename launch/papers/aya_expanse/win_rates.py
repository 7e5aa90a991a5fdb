"""Win rates of the models of rounds by language, against the model that the rounds start from and a named opponent."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common import tables
from espalier.data.aya_expanse.prompts import Prompt
from espalier.data.text.documents import DataError
from espalier.launch.evaluate.judges import answers as judged_answers
from espalier.launch.evaluate.judges import shares

OPPONENT = "opponent"
_SHARES = ("win", "tie", "loss", "rate")
_TITLES = ("round", "against", "language", "win", "tie", "loss", "wins and half ties", "judged")


def between(
    a: str,
    b: str,
    prompts: Sequence[Prompt],
    answers: Sequence[Mapping[str, Mapping[str, Any]]],
    rewards: Any,
) -> dict[str, Any]:
    """Returns `judges.shares.by_language` of two models, over the prompts that both answer.

    A further key is 'unanswered', the number of prompts that one of the two has no answer to.

    Args:
      answers: to each prompt, by model.
      rewards: `arbitrage_rewards.Rewards`, which compares answers.

    Raises:
      DataError: there is no prompt that both answer.
      JudgeError, RewardError and others: the judge or reward cannot be used.
    """
    both = [p for p, row in enumerate(answers) if a in row and b in row]
    if not both:
        raise DataError(
            f"There is no prompt that both {a!r} and {b!r} answer: warnings above say why"
        )
    own = [prompts[p] for p in both]
    pairs, outcomes = rewards.outcomes(own, [answers[p] for p in both], a, b)
    summary = shares.by_language(pairs, outcomes, [prompt.language for prompt in own])
    return {**summary, "unanswered": len(prompts) - len(both)}


def stored(path: str, prompts: Sequence[Prompt]) -> list[dict[str, dict[str, Any]]]:
    """Returns the opponent's answers to the prompts, from a file of `espalier generate`, matched by prompt.

    Raises:
      DataError: a prompt without an answer, or with two.
      JudgeError: a row that is no answer.
    """
    texts: dict[str, str] = {}
    (system,) = judged_answers.read({OPPONENT: path})
    for answer in system.answers:
        prompt = answer.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if texts.setdefault(_key(messages), answer.text) != answer.text:
            raise DataError(
                f"{answer.place}: {path} has two answers to this prompt. Generate it with --num_samples=1"
            )
    keys = [_key(prompt.messages) for prompt in prompts]
    lacking = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in texts]
    if lacking:
        raise DataError(
            f"{path}, the recipe's 'opponent', has no answer to {lacking[0].where} and {len(lacking) - 1} more prompts. "
            "Generate it from the file 'held_out'"
        )
    return [{OPPONENT: _row(key, texts[key])} for key in keys]


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages])


def _row(key: str, text: str) -> dict[str, Any]:
    """Returns a row of `completions.Store`."""
    digest = hashlib.sha256(json.dumps([OPPONENT, key, text]).encode()).hexdigest()[:32]
    return {"key": digest, "text": text, "ended": "stop"}


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the win rates, in per cent, as a table in Markdown: a row for each two models and language, and their mean."""
    return "\n".join(tables.markdown(_TITLES, _rows(summaries))) + "\n"


def _rows(summaries: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for summary in summaries:
        names = [summary["a"], summary["b"]]
        for code, one in summary["languages"].items():
            counts = one["counts"]
            judged = sum(counts[name] for name in ("win", "tie", "loss"))
            total = judged + counts["invalid"]
            yield [*names, code, *(shares.cell(one[x]) for x in _SHARES), f"{judged} of {total}"]
        if mean := summary["mean"]:
            yield [*names, "mean", *(f"{100 * mean[x]:.1f}" for x in _SHARES), ""]
