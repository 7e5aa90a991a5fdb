"""Pairs whose order is known by construction and can be checked: nobody was asked what they prefer.

`reasoning` takes problems of the package reasoning-gym, which scores any answer to them: the right answer
against one that is altered and scores less. `arithmetic` needs no package: right results against altered ones.
`translations` takes what installed packages translate with gettext: a message in the language that is asked for
against the same message in another one.

All yield rows as `records` has them, with "source" telling where a pair is from.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.text import splits
from data.text.sources import catalogues, languages
from data.text.sources.environment import Environment

# With one right answer each, short enough for small models.
PROBLEMS = (
    *("basic_arithmetic", "chain_sum", "products", "gcd", "lcm", "simple_equations"),
    *("base_conversion", "count_bits", "fraction_simplification", "prime_factorization"),
    *("letter_counting", "spell_backward", "word_sorting", "number_sorting", "caesar_cipher"),
    *("calendar_arithmetic", "leg_counting", "family_relationships"),
)
# Before each question of `arithmetic`, so that small models answer with a number.
WORKED = "12 + 7 = 19\n"
_TRIES = 20  # alterations of an answer, before a problem is passed over
LANGUAGE_NAMES = {
    **{"ar": "Arabic", "cs": "Czech", "nl": "Dutch", "fr": "French", "de": "German", "el": "Greek"},
    **{"he": "Hebrew", "hi": "Hindi", "id": "Indonesian", "it": "Italian", "ja": "Japanese"},
    **{"ko": "Korean", "fa": "Persian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian"},
    **{"ru": "Russian", "es": "Spanish", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese"},
    **{"zh_hans": "simplified Chinese", "zh_hant": "traditional Chinese"},
}
# Of these two a text may be in either.
_ALIKE = {"zh_hans", "zh_hant"}


class MissingPackageError(ImportError):
    """A package that is not among the project's own requirements."""


def reasoning(
    *, limit: int, seed: int = 0, problems: Sequence[str] = PROBLEMS
) -> Iterator[dict[str, Any]]:
    """Right answers to problems against altered ones that the problem's own scorer gives less.

    Args:
      limit: the most pairs; as many problems of each kind, in turns.
      seed: of the problems and the alterations.
      problems: names of reasoning-gym's data sets.

    Raises:
      MissingPackageError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise MissingPackageError(
            "problems come from the package reasoning-gym, which is not installed: pip install "
            "reasoning-gym"
        ) from None
    rng = random.Random(seed)
    size = -(-limit // len(problems)) + 1  # one more, whose answer can stand in for the last one's
    sets = [reasoning_gym.create_dataset(name, size=size, seed=seed) for name in problems]
    turns = itertools.product(range(size - 1), zip(problems, sets, strict=True))
    made = (_reasoning_row(name, found, index, rng) for index, (name, found) in turns)
    return itertools.islice(filter(None, made), limit)


def arithmetic(*, limit: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Right results of sums and products of small numbers against altered ones, after a worked example.

    Args:
      limit: the most pairs: sums and products in turns, each once, then what is left of the sums.
      seed: of their order and the alterations.
    """
    rng = random.Random(seed)
    sums = [(f"{a} + {b}", a + b) for a in range(2, 50) for b in range(2, 50)]
    products = [(f"{a} * {b}", a * b) for a in range(2, 50) for b in range(2, 10)]
    for problems in (sums, products):
        rng.shuffle(problems)
    turns = itertools.chain.from_iterable(itertools.zip_longest(sums, products))
    made = (_arithmetic_row(*problem, rng) for problem in turns if problem is not None)
    return itertools.islice(made, limit)


def _arithmetic_row(question: str, result: int, rng: random.Random) -> dict:
    right = str(result)
    wrong = next(other for other in _altered(right, right, rng) if other != right)
    return {
        "prompt": f"{WORKED}{question} =",
        "chosen": f" {right}",
        "rejected": f" {wrong}",
        "source": "constructed/arithmetic",
    }


def _reasoning_row(name: str, found: Any, index: int, rng: random.Random) -> dict | None:
    item = found[index]
    answer = item["answer"]
    for wrong in _altered(answer, found[index + 1]["answer"], rng):
        score = float(found.score_answer(wrong, entry=item))
        if wrong != answer and score < 1:
            return {
                "prompt": f"{item['question'].strip()}\nAnswer:",
                "chosen": f" {answer}",
                "rejected": f" {wrong}",
                "source": f"constructed/reasoning_gym/{name}",
                "rejected_score": score,
            }
    return None


def _altered(answer: str, other: str, rng: random.Random) -> Iterator[str]:
    """Answers that look like the given one: another number in it, parts exchanged, another problem's."""
    for _ in range(_TRIES):
        numbers = list(re.finditer(r"\d+", answer))
        words = answer.split(" ")
        if numbers:
            match = rng.choice(numbers)
            value = max(0, int(match[0]) + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)))
            yield answer[: match.start()] + str(value) + answer[match.end() :]
        elif len(words) > 1:
            place = rng.randrange(len(words) - 1)
            yield " ".join([*words[:place], words[place + 1], words[place], *words[place + 2 :]])
        elif len(answer) > 3 and rng.random() < 0.5:
            place = rng.randrange(len(answer) - 1)
            yield answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
        else:
            yield other


def translations(
    *, limit: int, seed: int = 0, environment: Environment | None = None
) -> Iterator[dict[str, Any]]:
    """Messages in the language that is asked for against the same ones in another language.

    Args:
      limit: the most pairs: one of each message in each language, those of all packages mixed.
      seed: of which come first, and of the other language of each.
      environment: where packages are looked for; by default those that are installed.
    """
    environment = environment or Environment.current()
    found: dict[str, dict[str, str]] = {}
    for package in languages.GETTEXT_PACKAGES:
        for language in LANGUAGE_NAMES:
            locales = languages.VARIANTS[language].locales
            for message, text in catalogues.gettext_pairs(environment, package, locales):
                found.setdefault(message, {}).setdefault(language, text)
    asked = [(message, language) for message, texts in found.items() for language in texts]
    asked.sort(key=lambda one: splits.stable_hash("\0".join(one), salt=f"order {seed}"))
    rows = (
        _translation_row(message, language, found[message], seed) for message, language in asked
    )
    return itertools.islice(filter(None, rows), limit)


def _translation_row(
    message: str, language: str, texts: Mapping[str, str], seed: int
) -> dict | None:
    others = [
        other
        for other in sorted(texts)
        if texts[other] != texts[language] and not {language, other} <= _ALIKE
    ]
    if not others:
        return None
    prompt = f"Translate into {LANGUAGE_NAMES[language]}: {message}\nTranslation:"
    other = others[splits.stable_hash(prompt, salt=f"other {seed}") % len(others)]
    return {
        "prompt": prompt,
        "chosen": f" {texts[language]}",
        "rejected": f" {texts[other]}",
        "source": "constructed/gettext",
        "language": language,
        "rejected_language": other,
    }
