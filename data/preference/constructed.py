"""Preference pairs that are made: of rated responses, and without human judgements, in an order known by construction.

`of_ratings` pairs the best response to a prompt with one of a lower rating. Its rows are

    {"prompt": ..., "responses": [..., ...], "ratings": [4.5, 2]}

The prompt is a text or a list of messages, and so is each response. If the prompt has messages, a response that is a text is the
assistant's message. "margin" is the difference of the ratings.

`reasoning` takes problems from the package reasoning-gym, which can score any answer. A pair is the right answer
against an altered answer with a lower score. `arithmetic` needs no package; a pair is a right result against an
altered one. `translations` takes gettext translations from installed packages. A pair is a message in the
requested language against the same message in another language.

All functions yield rows in the format of `records`; "source" names the origin of a pair.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from espalier.common.ranges import check_choice
from espalier.data.rows.records import text_of
from espalier.data.stream import order
from espalier.data.tasks import Tally
from espalier.data.text import splits
from espalier.data.text.documents import DataError
from espalier.data.text.sources import catalogues, languages
from espalier.data.text.sources.environment import Environment

Rejected = Literal["worst", "random", "next"]
EXAMPLE = '{"prompt": "...", "responses": ["...", "..."], "ratings": [4.5, 2]}'
_TEMPLATE_KEYS = ("tools", "chat_template_kwargs")


def of_ratings(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    rejected: Rejected = "worst",
    min_margin: float = 0.0,
    seed: int = 0,
    dropped: Tally | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields at most one pair for each row of rated responses.

    The chosen response is the first one with the highest rating. The rejected response always has a lower
    rating, since a pair with equal ratings teaches nothing.

    Args:
      rows: (place, row); errors name the place.
      rejected: 'worst', the 'next' best, or a 'random' one of the responses with a lower rating.
      min_margin: least difference of the two ratings.
      seed: seed of the random choices.
      dropped: counts rows without a possible rejected response, as 'tie' or 'small_margin'.

    Raises:
      DataError: a row is malformed.
    """
    check_choice("rejected", rejected, Rejected)
    if not 0 <= min_margin < math.inf:
        raise ValueError(f"min_margin is {min_margin}; it must be 0 or more.")
    return _of_ratings(rows, rejected, min_margin, seed, Tally() if dropped is None else dropped)


def _of_ratings(rows, rejected: str, min_margin: float, seed: int, dropped: Tally):
    for number, (where, row) in enumerate(rows):
        responses, ratings = _checked(row, where)
        best = max(range(len(ratings)), key=ratings.__getitem__)
        lower = [i for i, rating in enumerate(ratings) if rating < ratings[best]]
        far = [i for i in lower if ratings[best] - ratings[i] >= min_margin]
        if not far:
            dropped.add("small_margin" if lower else "tie", where)
            continue
        if rejected == "random":
            other = far[order.hash64(seed, "binarise", number) % len(far)]
        else:
            pick = min if rejected == "worst" else max
            other = pick(far, key=ratings.__getitem__)
        yield {
            "prompt": row["prompt"],
            "chosen": responses[best],
            "rejected": responses[other],
            "margin": ratings[best] - ratings[other],
            **{key: row[key] for key in _TEMPLATE_KEYS if key in row},
        }


def _checked(row: Mapping[str, Any], where: str) -> tuple[list[Any], list[float]]:
    """Returns the responses, as messages if the prompt has messages, and their ratings."""
    for key, kinds, what in (
        ("prompt", (str, list), "a text or messages"),
        ("responses", (list,), "a list of texts or of messages"),
        ("ratings", (list,), "a list of numbers"),
    ):
        if not isinstance(row.get(key), kinds):
            kind = type(row[key]).__name__ if key in row else "nothing"
            raise DataError(f"{where}: {key!r} holds {kind}; it must be {what}. A row is {EXAMPLE}")
    responses, ratings = row["responses"], row["ratings"]
    if len(responses) != len(ratings) or len(responses) < 2:
        raise DataError(
            f"{where}: {len(responses)} responses and {len(ratings)} ratings; a row needs at least two "
            "responses, each with one rating"
        )
    for rating in ratings:
        number = isinstance(rating, int | float) and not isinstance(rating, bool)
        if not number or not math.isfinite(rating):
            raise DataError(f"{where}: {rating!r} in 'ratings' is not a finite number")
    text_of(row["prompt"], "prompt", where)
    for number, response in enumerate(responses, 1):
        what = f"response {number}"
        if isinstance(text_of(response, what, where), tuple) and isinstance(row["prompt"], str):
            raise DataError(
                f"{where}: {what} has messages but 'prompt' is a text; write both in the same form"
            )
    if isinstance(row["prompt"], list):
        responses = [
            [{"role": "assistant", "content": text}] if isinstance(text, str) else text
            for text in responses
        ]
    return responses, ratings


# Data sets of reasoning-gym whose problems have one right answer, short enough for small models.
PROBLEMS = (
    *("basic_arithmetic", "chain_sum", "products", "gcd", "lcm", "simple_equations"),
    *("base_conversion", "count_bits", "fraction_simplification", "prime_factorization"),
    *("letter_counting", "spell_backward", "word_sorting", "number_sorting", "caesar_cipher"),
    *("calendar_arithmetic", "leg_counting", "family_relationships"),
)
# A worked example before each question of `arithmetic`, so that small models answer with a number.
WORKED = "12 + 7 = 19\n"
_TRIES = 20  # alterations of an answer to try before a problem is skipped
LANGUAGE_NAMES = {
    **{"ar": "Arabic", "cs": "Czech", "nl": "Dutch", "fr": "French", "de": "German", "el": "Greek"},
    **{"he": "Hebrew", "hi": "Hindi", "id": "Indonesian", "it": "Italian", "ja": "Japanese"},
    **{"ko": "Korean", "fa": "Persian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian"},
    **{"ru": "Russian", "es": "Spanish", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese"},
    **{"zh_hans": "simplified Chinese", "zh_hant": "traditional Chinese"},
}
# The same text can be right in both languages, so no pair contrasts them.
_ALIKE = {"zh_hans", "zh_hant"}


class MissingPackageError(ImportError):
    """Raised if an optional package is not installed."""


def reasoning(
    *, limit: int, seed: int = 0, problems: Sequence[str] = PROBLEMS
) -> Iterator[dict[str, Any]]:
    """Returns at most `limit` pairs of a right answer and an altered answer with a lower score.

    The data sets of reasoning-gym named in `problems` take turns, with equally many problems each.

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
    # One problem more, whose answer can replace the answer of the last problem.
    size = -(-limit // len(problems)) + 1
    sets = [reasoning_gym.create_dataset(name, size=size, seed=seed) for name in problems]
    turns = itertools.product(range(size - 1), zip(problems, sets, strict=True))
    rows = (_reasoning_row(name, dataset, index, rng) for index, (name, dataset) in turns)
    return itertools.islice(filter(None, rows), limit)


def arithmetic(*, limit: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Returns at most `limit` pairs of right and altered results, after a worked example.

    Sums and products of small numbers alternate, each problem once; then the remaining sums follow.
    """
    rng = random.Random(seed)
    sums = [(f"{a} + {b}", a + b) for a in range(2, 50) for b in range(2, 50)]
    products = [(f"{a} * {b}", a * b) for a in range(2, 50) for b in range(2, 10)]
    for problems in (sums, products):
        rng.shuffle(problems)
    turns = itertools.chain.from_iterable(itertools.zip_longest(sums, products))
    rows = (_arithmetic_row(*problem, rng) for problem in turns if problem is not None)
    return itertools.islice(rows, limit)


def _arithmetic_row(question: str, result: int, rng: random.Random) -> dict:
    right = str(result)
    wrong = next(other for other in _altered(right, right, rng) if other != right)
    return {
        "prompt": f"{WORKED}{question} =",
        "chosen": f" {right}",
        "rejected": f" {wrong}",
        "source": "constructed/arithmetic",
    }


def _reasoning_row(name: str, dataset: Any, index: int, rng: random.Random) -> dict | None:
    item = dataset[index]
    answer = item["answer"]
    for wrong in _altered(answer, dataset[index + 1]["answer"], rng):
        score = float(dataset.score_answer(wrong, entry=item))
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
    """Yields answers similar to `answer`: one number changed, two parts swapped, or `other`, another problem's answer."""
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
    """Returns at most `limit` pairs of a message in the requested language and in another language.

    There is one pair for each message and language, in random order over the packages of the environment
    (default the current one).
    """
    environment = environment or Environment.current()
    texts_by_message: dict[str, dict[str, str]] = {}
    for package in languages.GETTEXT_PACKAGES:
        for language in LANGUAGE_NAMES:
            locales = languages.VARIANTS[language].locales
            for message, text in catalogues.gettext_pairs(environment, package, locales):
                texts_by_message.setdefault(message, {}).setdefault(language, text)
    requests = [
        (message, language) for message, texts in texts_by_message.items() for language in texts
    ]
    requests.sort(key=lambda one: splits.stable_hash("\0".join(one), salt=f"order {seed}"))
    rows = (
        _translation_row(message, language, texts_by_message[message], seed)
        for message, language in requests
    )
    return itertools.islice(filter(None, rows), limit)


def _translation_row(
    message: str, language: str, texts: Mapping[str, str], seed: int
) -> dict | None:
    other_languages = [
        other
        for other in sorted(texts)
        if texts[other] != texts[language] and not {language, other} <= _ALIKE
    ]
    if not other_languages:
        return None
    prompt = f"Translate into {LANGUAGE_NAMES[language]}: {message}\nTranslation:"
    other = other_languages[splits.stable_hash(prompt, salt=f"other {seed}") % len(other_languages)]
    return {
        "prompt": prompt,
        "chosen": f" {texts[language]}",
        "rejected": f" {texts[other]}",
        "source": "constructed/gettext",
        "language": language,
        "rejected_language": other,
    }
