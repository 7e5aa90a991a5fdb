"""What arbitrage writes: rows for supervised training, pairs for preference training, and a table of the teachers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from espalier.common import tables
from espalier.data.aya_expanse import routing
from espalier.data.aya_expanse.prompts import Prompt

Form = Literal["messages", "prompt"]

_ABOUT = ("key", "settings", "source", "prompt_tokens", "new_tokens", "cost")


def sft_row(
    prompt: Prompt, name: str, answer: Mapping[str, Any], *, form: Form, **about: Any
) -> dict[str, Any]:
    """Returns a row for supervised training, with the provenance of its answer.

    Args:
      name: the teacher.
      answer: its row of completions.
      form: "messages" for a conversation, "prompt" for texts with "prompt" and "completion".
      about: further columns, such as the reward.
    """
    columns = {**prompt.columns, "id": prompt.id, "language": prompt.language, "teacher": name}
    columns |= {key: answer.get(key) for key in _ABOUT} | about
    if form == "prompt":
        return {**columns, "prompt": prompt.prompt, "completion": answer["text"]}
    return {**columns, "messages": [*prompt.messages, _turn(answer)]}


def pair_row(
    prompt: Prompt,
    answers: Mapping[str, Mapping[str, Any]],
    rewards: Mapping[str, float],
    *,
    form: Form,
    **about: Any,
) -> dict[str, Any] | None:
    """Returns the best and the worst answer as a row of preference data; None if rewards or texts are equal.

    Args:
      answers, rewards: of the teachers, by name, in the order of the pool.
    """
    names = routing.pair(rewards, {name: answers[name]["text"] for name in rewards})
    if names is None:
        return None
    content: dict[str, Any] = {"prompt": prompt.prompt if form == "prompt" else prompt.messages}
    columns = {**prompt.columns, "id": prompt.id, "language": prompt.language, **about}
    for side, name in zip(("chosen", "rejected"), names, strict=True):
        answer = answers[name]
        content[side] = answer["text"] if form == "prompt" else [_turn(answer)]
        columns[f"{side}_reward"] = rewards[name]
        columns[f"{side}_teacher"] = name
        columns[f"{side}_key"] = answer["key"]
    return {**columns, **content}


def _turn(answer: Mapping[str, Any]) -> dict[str, str]:
    return {"role": "assistant", "content": answer["text"]}


def table(
    prompts: Sequence[Prompt],
    chosen: Sequence[str | None],
    answers: Sequence[Mapping[str, Mapping[str, Any]]],
    rewards: Sequence[Mapping[str, float]],
    fates: Sequence[Mapping[str, str]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns a row for each language and teacher that was asked in it.

    Args:
      chosen: the teacher of each prompt, or None.
      answers: all answers to each prompt, by teacher.
      rewards: of the answers that could be chosen.
      fates: why an answer could not be chosen, by teacher, such as "wrong language" or "no answer".
      names: all teachers, in the order of the pool.

    Returns:
      Rows with 'language', 'teacher', 'asked', 'chosen' (share of the language's rows), 'reward' (mean), 'new_tokens'
      (mean), 'cost' (sum; None if that of an answer is unknown), and the number of each fate.
    """
    rows = []
    for language in dict.fromkeys(prompt.language for prompt in prompts):
        own = [p for p, prompt in enumerate(prompts) if prompt.language == language]
        total = sum(chosen[p] is not None for p in own)
        for name in names:
            asked = [p for p in own if name in answers[p] or name in fates[p]]
            if not asked:
                continue
            its = [answers[p][name] for p in asked if name in answers[p]]
            its_fates = [fates[p][name] for p in asked if name in fates[p]]
            costs = [answer["cost"] for answer in its]
            tokens = [answer["new_tokens"] for answer in its if answer["new_tokens"] is not None]
            rows.append(
                {
                    "language": language,
                    "teacher": name,
                    "asked": len(asked),
                    "chosen": sum(chosen[p] == name for p in own) / total if total else None,
                    "reward": _mean([rewards[p][name] for p in asked if name in rewards[p]]),
                    "new_tokens": _mean(tokens),
                    "cost": None if None in costs else sum(costs),
                    **{fate: its_fates.count(fate) for fate in sorted(set(its_fates))},
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    plain = ("language", "teacher", "asked", "chosen", "reward", "new_tokens", "cost")
    fates = sorted({key for row in rows for key in row if key not in plain})
    titles = [*plain[:6], *fates, "cost"]
    header = [title.replace("_", " ") for title in titles]
    cells = ([_cell(title, row.get(title, 0)) for title in titles] for row in rows)
    return "\n".join(tables.markdown(header, cells)) + "\n"


def _cell(title: str, value: Any) -> str:
    if value is None:
        return "unknown" if title == "cost" else "-"
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    return f"{value:.1%}" if title == "chosen" else f"{value:.4g}"
