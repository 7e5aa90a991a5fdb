"""Reads answers of several systems to the same prompts, from files of `espalier generate`."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.data.languages import table
from espalier.launch.evaluate.judges.asking import JudgeError, Pair, Prompt
from espalier.launch.inference import row_files

EXAMPLE = '{"prompt": "...", "text": "..."}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One row; `place` is its file and line, for errors, and `language` a code, empty if languages do not matter."""

    place: str
    id: str | None
    prompt: Prompt
    text: str
    language: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A system and its answers, in the order of the file at `path`."""

    name: str
    path: str
    answers: Sequence[Answer]


def read(files: Mapping[str, str], *, by_language: bool = False) -> list[System]:
    """Reads a file of answers for each system, by name.

    Args:
      files: path of each system's file.
      by_language: whether every row must have a "language", such as "cs".

    Raises:
      JudgeError: a missing file, or rows that cannot be judged, such as prompts of tokens.
      DataError: a malformed line.
    """
    return [
        System(name=name, path=path, answers=_rows(path, by_language))
        for name, path in files.items()
    ]


def pairs(systems: Sequence[System], *, opponents: int = 0) -> list[Pair]:
    """Returns a pair of answers for every prompt and every two systems, in the order of the first system's rows.

    Rows are matched by their "id" if all have one, else by their prompts. The last `opponents` systems, if any, are compared
    with each of the others, and nothing else is.

    Raises:
      JudgeError: fewer than two systems, two answers of one system to a prompt, or prompts without an answer by
        every system.
    """
    if len(systems) < 2:
        raise JudgeError("--systems needs at least two files, to compare their answers.")
    own = range(len(systems) - opponents)
    against = itertools.product(own, range(len(own), len(systems)))
    by_id = all(answer.id is not None for system in systems for answer in system.answers)
    by_key = [_by_key(system, by_id) for system in systems]
    first = by_key[0]
    for system, answers in zip(systems[1:], by_key[1:], strict=True):
        _check_same(systems[0], first, system, answers)
    return [
        Pair(
            id=answer.id if by_id and answer.id is not None else str(number),
            prompt=answer.prompt,
            a=by_key[i][key].text,
            b=by_key[j][key].text,
            systems=(systems[i].name, systems[j].name),
            language=table.name_of(answer.language),
        )
        for i, j in (against if opponents else itertools.combinations(own, 2))
        for number, (key, answer) in enumerate(first.items())
    ]


def _rows(path: str, by_language: bool) -> list[Answer]:
    if not os.path.isfile(path):
        raise JudgeError(f"{path} does not exist: give a file of espalier generate.")
    answers = [
        answer(row, place, by_language) for place, row in row_files.read(path, example=EXAMPLE)
    ]
    if not any(one.text.strip() for one in answers):
        raise JudgeError(
            f'{path} has no answer: every "text" is empty. Generate it again with espalier generate.'
            if answers
            else f"{path} has no row: generate it with espalier generate."
        )
    return answers


def answer(row: Mapping[str, Any], place: str, by_language: bool) -> Answer:
    """Returns the answer of a row; raises JudgeError if it cannot be judged."""
    prompt, text = row.get("prompt"), row.get("text")
    if not isinstance(text, str) or prompt is None:
        raise JudgeError(
            f"{place} lacks the prompt or the answer's text: give rows of espalier generate, {EXAMPLE}."
        )
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise JudgeError(
            f'{place}: the prompt is neither a text nor messages of texts, such as [{{"role": "user", '
            '"content": "..."}]. Judges cannot read tokens: generate from "text" or "messages".'
        )
    if "tools" in row or "documents" in row:
        raise JudgeError(
            f"{place}: judges do not see tools and documents, on which the answer may depend. Write "
            "them into the prompt."
        )
    language = _language(row, place) if by_language else ""
    return Answer(place=place, id=_id(row), prompt=prompt, text=text, language=language)


def _language(row: Mapping[str, Any], place: str) -> str:
    tag = row.get("language")
    if not isinstance(tag, str) or not tag.strip():
        raise JudgeError(
            f'{place} has no "language", such as "cs": add one to the row of its prompt, which espalier generate copies; '
            "win_rate needs it only with --by_language."
        )
    return table.code_of(tag)


def _id(row: Mapping[str, Any]) -> str | None:
    value = row.get("id")
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in prompt
        )
    )


def _by_key(system: System, by_id: bool) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for answer in system.answers:
        key = json.dumps(answer.id if by_id else answer.prompt, sort_keys=True)
        if key in answers:
            what = f"the id {answer.id}" if by_id else "the prompt"
            raise JudgeError(
                f"{answer.place}: {what} occurs in {answers[key].place} too. Each system needs one answer "
                'to a prompt (--num_samples=1); repeated prompts need an "id" in every file.'
            )
        answers[key] = answer
    return answers


def _check_same(
    first: System, answers: Mapping[str, Answer], second: System, other: Mapping[str, Answer]
) -> None:
    for key, answer in answers.items():
        if key in other and other[key].language != answer.language:
            raise JudgeError(
                f"{answer.place} and {other[key].place} have the same prompt in {answer.language!r} and "
                f"{other[key].language!r}. Correct the language of one."
            )
        if key in other and other[key].prompt != answer.prompt:
            raise JudgeError(
                f"{answer.place} and {other[key].place} have the same id, {answer.id}, but different "
                "prompts. Generate both files from the same prompts."
            )
    for left, right, missing in ((answers, other, second.path), (other, answers, first.path)):
        if alone := [key for key in left if key not in right]:
            raise JudgeError(
                f"{left[alone[0]].place}: {missing} has no answer to this prompt, nor to "
                f"{len(alone) - 1} more. Generate both files from the same prompts."
            )
