"""Answers that a second model makes of the teachers': one of several (fusion), or a translation of an English one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from espalier.data.aya_expanse import routing, second_prompts
from espalier.data.aya_expanse.pool import Pool
from espalier.data.aya_expanse.prompts import Prompt, same_language
from espalier.data.text.documents import DataError

Answers = dict[str, Mapping[str, Any]]


class Teachers(Protocol):
    """Asks models of a pool, and has their answers; a launch.aya_expanse.route.Router."""

    def ask(self, prompts: Sequence[Prompt], planned: Sequence[Sequence[str]]) -> None:
        """Asks the models named in `planned` each prompt."""

    def answers(self, prompt: Prompt, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Returns the answers of models to a prompt by name, without those that failed."""


def check(pool: Pool, flag: str, name: str | None) -> str:
    """Returns the name of the second model; raises DataError if the pool does not have it."""
    if name is None or name not in pool.teachers:
        names = ", ".join(pool.teachers)
        raise DataError(f"--{flag}={name} is not a teacher of the pool: give one of {names}")
    return name


def writers(pool: Pool, fuser: str, prompt: Prompt) -> list[str]:
    """Returns the teachers whose answers are fused; raises DataError if there is none besides the fuser."""
    names = [t.name for t in routing.able(pool, prompt.language) if t.name != fuser]
    if not names:
        raise DataError(
            f"{prompt.where}: no teacher besides --fuser={fuser} is asked in {prompt.language!r}: add one to the pool"
        )
    return names


def fused(
    teachers: Teachers, prompts: Sequence[Prompt], usable: Sequence[Answers], fuser: str
) -> list[tuple[Prompt, Mapping[str, Any] | None] | None]:
    """Returns, for each prompt with answers, what the fuser is asked, and its answer or None."""
    asked = [
        second_prompts.fusion(prompt, {name: one["text"] for name, one in answers.items()})
        if answers
        else None
        for prompt, answers in zip(prompts, usable, strict=True)
    ]
    return _answered(teachers, asked, fuser)


def translated(
    teachers: Teachers, prompts: Sequence[Prompt], usable: Sequence[Answers], translator: str
) -> list[tuple[Prompt, Mapping[str, Any] | None] | None]:
    """Returns what the translator is asked, and its answer, for each prompt in another language with an English answer."""
    asked = [
        second_prompts.translation(prompt, next(iter(answers.values()))["text"])
        if answers and not same_language(prompt.language, "en")
        else None
        for prompt, answers in zip(prompts, usable, strict=True)
    ]
    return _answered(teachers, asked, translator)


def _answered(
    teachers: Teachers, asked: Sequence[Prompt | None], name: str
) -> list[tuple[Prompt, Mapping[str, Any] | None] | None]:
    some = [one for one in asked if one is not None]
    teachers.ask(some, [[name]] * len(some))
    return [
        None if one is None else (one, teachers.answers(one, [name]).get(name)) for one in asked
    ]
