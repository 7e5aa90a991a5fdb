"""Which teacher answers a prompt: before the answers exist (whom to ask), and after (whose answer to keep).

The notation follows "Multilingual Arbitrage" (arXiv 2408.14960): prompts x in languages, a pool of teachers t_1 ... t_K,
and a reward R(x, y).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.data.aya_expanse.pool import DEFAULT, Pool, Teacher
from espalier.data.aya_expanse.prompts import Prompt
from espalier.data.languages import table
from espalier.data.text.documents import DataError
from espalier.data.text.splits import stable_hash


def able(pool: Pool, language: str) -> list[Teacher]:
    """Returns the teachers that are asked in a language; raises DataError if there is none."""
    teachers = [teacher for teacher in pool.teachers.values() if teacher.teaches(language)]
    if not teachers:
        raise DataError(
            f"No teacher of the pool is asked in {language!r}: add one, or the language to one"
        )
    return teachers


def single(pool: Pool, name: str | None, prompt: Prompt) -> str:
    """Returns the same teacher for every prompt.

    Raises:
      DataError: there is no such teacher, or it is not asked in the prompt's language.
    """
    if name not in pool.teachers:
        names = ", ".join(pool.teachers)
        raise DataError(f"--teacher={name} is not a teacher of the pool: give one of {names}")
    if not pool.teachers[name].teaches(prompt.language):
        raise DataError(
            f"--teacher={name} is not asked in {prompt.language!r}, the language of {prompt.where}"
        )
    return name


def random(pool: Pool, prompt: Prompt, *, seed: int) -> str:
    """Returns a uniform draw among the teachers of the prompt's language; a function of the seed and the prompt."""
    teachers = able(pool, prompt.language)
    return teachers[stable_hash(prompt.digest, salt=f"random {seed}") % len(teachers)].name


def fixed(pool: Pool, prompt: Prompt) -> str:
    """Returns the teacher that the pool fixes for the prompt's language, or its default.

    Raises:
      DataError: there is none.
    """
    name = pool.fixed.get(prompt.language, pool.fixed.get(DEFAULT))
    if name is None or not pool.teachers[name].teaches(prompt.language):
        raise DataError(
            f"{prompt.where}: the pool's 'fixed' names no teacher for {prompt.language!r}: add it, or a {DEFAULT!r}"
        )
    return name


def in_subset(prompt: Prompt, share: float, *, seed: int) -> bool:
    """Returns whether all teachers answer a prompt, from which a router learns; a draw with probability `share`."""
    return stable_hash(prompt.digest, salt=f"subset {seed}") < share * 2**64


def best(rewards: Mapping[str, float]) -> str:
    """Returns the teacher with the largest reward; of equals the first, in the order of the pool."""
    return max(rewards, key=lambda name: rewards[name])


def worst(rewards: Mapping[str, float]) -> str:
    """Returns the teacher with the smallest reward; of equals the last."""
    return min(reversed(list(rewards)), key=lambda name: rewards[name])


def best_by_language(
    prompts: Sequence[Prompt], rewards: Sequence[Mapping[str, float]], names: Sequence[str]
) -> Mapping[str, list[str]]:
    """Returns the teachers of each language by mean reward, the best first; of equals in the order of `names`.

    Args:
      prompts: P prompts.
      rewards: of each prompt, by teacher; teachers without an answer are absent.
      names: all teachers, in the order of the pool.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for prompt, by_name in zip(prompts, rewards, strict=True):
        for name, reward in by_name.items():
            of_language = sums.setdefault(table.code_of(prompt.language), {})
            of_language.setdefault(name, []).append(reward)
    return table.ByLanguage(
        {
            code: sorted(
                (name for name in names if name in by_name),
                key=lambda name: -float(np.mean(by_name[name])),
            )
            for code, by_name in sums.items()
        }
    )


def pair(rewards: Mapping[str, float], texts: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the teachers of the best and the worst answer; None if their rewards or texts are equal."""
    if len(rewards) < 2:
        return None
    chosen, rejected = best(rewards), worst(rewards)
    if rewards[chosen] == rewards[rejected] or texts[chosen] == texts[rejected]:
        return None
    return chosen, rejected
