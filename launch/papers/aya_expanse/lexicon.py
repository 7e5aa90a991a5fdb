"""Real words of seven languages, requests that small models can learn to answer in them, and an exact score of answers.

Days, months and names of languages are messages of Django with their translations, in three families of two
languages, and in English, which all clusters of the recipe share (arXiv 2412.04261). A request is made of words of its
language, and its answer is a list of words:

  translate   two words of another language, said in this one
  sort        three names of languages, in the order of letters

Words are in lower case. Requests with the same concepts are in the same split in every language.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import NonNegative, Seed
from espalier.data.languages import parallel
from espalier.data.text import splits
from espalier.data.text.sources import cleaning

CACHED_AS = "data.aya_expanse.lexicon"  # the name by which caches of its data know it

FAMILIES = {"romance": ("es", "it"), "germanic": ("de", "nl"), "slavic": ("cs", "pl")}
SHARED = "en"
LANGUAGES = (SHARED, *(code for family in FAMILIES.values() for code in family))
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
NAMES = (
    *("Arabic", "Bulgarian", "Catalan", "Croatian", "Czech", "Danish", "Dutch", "English"),
    *("Estonian", "Finnish", "French", "German", "Greek", "Hebrew", "Hungarian", "Icelandic"),
    *("Indonesian", "Irish", "Italian", "Japanese", "Korean", "Latvian", "Lithuanian", "Persian"),
    *("Polish", "Portuguese", "Romanian", "Russian", "Serbian", "Slovak", "Spanish", "Swedish"),
    *("Turkish", "Ukrainian", "Vietnamese"),
)
CONCEPTS = (*DAYS, *MONTHS, *NAMES)  # what answers are made of
KINDS = ("translate", "sort")
_VERBS = {
    "en": ("translate", "sort"),
    "es": ("traduce", "ordena"),
    "it": ("traduci", "ordina"),
    "de": ("übersetze", "sortiere"),
    "nl": ("vertaal", "sorteer"),
    "cs": ("přelož", "seřaď"),
    "pl": ("przetłumacz", "posortuj"),
}
# Split -> its parts of ten by the hash of a request's concepts.
SPLITS = {"tuning": range(4), "pool": range(4, 7), "dev": range(7, 8), "held_out": range(8, 10)}
_LENGTH_PENALTY = 0.1  # for each reference's length beyond it


def family(language: str) -> tuple[str, ...]:
    """Returns the languages of a language's family; English is alone."""
    return next((codes for codes in FAMILIES.values() if language in codes), (language,))


def sibling(language: str) -> str:
    """Returns the other language of the family; raises ValueError for English, which has none."""
    others = [code for code in family(language) if code != language]
    if not others:
        raise ValueError(f"{language} has no other language in its family: give another language.")
    return others[0]


@functools.cache
def words(language: str) -> Mapping[str, str]:
    """Returns the word of each concept in a language.

    Raises:
      ValueError: Django is not installed.
    """
    if language == SHARED:
        translations: Mapping[str, str] = {}
    else:
        translations = dict(parallel.of_packages([language])[language])
    # A message that is the same in both languages is in no catalogue.
    return {
        english: cleaning.normalise(translations.get(english, english)).strip().lower()
        for english in CONCEPTS
    }


@functools.cache
def concepts(language: str) -> Mapping[str, str]:
    """Returns the concept of each word in a language."""
    return {words(language)[concept]: concept for concept in CONCEPTS}


@functools.cache
def meanings(word: str) -> frozenset[str]:
    """Returns the concepts that a word names in any of the languages."""
    return frozenset(concepts(code)[word] for code in LANGUAGES if word in concepts(code))


@dataclasses.dataclass(frozen=True)
class Content:
    """What a request asks, in no language.

    Attributes:
      kind: of KINDS.
      parts: concepts.
    """

    kind: str
    parts: tuple[str, ...]

    @property
    def digest(self) -> int:
        """A hash, which decides the split."""
        return splits.stable_hash(f"{self.kind} {self.parts}", salt="lexicon")

    def said(self, language: str, source: str) -> tuple[str, str]:
        """Returns (prompt, answer) in a language; words to be translated are of `source`."""
        word = words(language)
        verb = _VERBS[language][KINDS.index(self.kind)]
        if self.kind == "translate":
            asked = [words(source)[concept] for concept in self.parts]
            answer = [word[concept] for concept in self.parts]
        else:
            asked = [word[concept] for concept in self.parts]
            answer = sorted(asked)
        return f"{verb}: {', '.join(asked)} =", ", ".join(answer)


def contents(split: str, seed: int) -> Iterator[Content]:
    """Yields different contents of a split without end, the kinds in turn; a function of the split and the seed."""
    rng = np.random.default_rng([splits.stable_hash(split) % 2**32, seed])
    known = set()
    while True:
        for kind in KINDS:
            while True:
                content = _drawn(kind, rng)
                if content.digest % 10 in SPLITS[split] and content not in known:
                    break
            known.add(content)
            yield content


def _drawn(kind: str, rng: np.random.Generator) -> Content:
    if kind == "translate":
        return Content(kind, tuple(CONCEPTS[i] for i in rng.permutation(len(CONCEPTS))[:2]))
    return Content(kind, tuple(NAMES[i] for i in rng.permutation(len(NAMES))[:3]))


def requests(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """Returns `count` requests in every language, with the same contents.

    Returns:
      Rows with 'id', 'prompt', 'answer', 'language', 'kind', and 'english', the same prompt in English. 'id' begins with that
      of the content.
    """
    rng = np.random.default_rng([seed, count])
    rows = []
    for number, content in zip(range(count), contents(split, seed), strict=False):
        for language in LANGUAGES:
            others = [code for code in LANGUAGES if code != language]
            source = others[rng.integers(len(others))]
            prompt, answer = content.said(language, source)
            row = {"id": f"{split}-{number}-{language}", "prompt": prompt, "answer": f" {answer}"}
            english = content.said(SHARED, source)[0]
            rows.append({**row, "language": language, "kind": content.kind, "english": english})
    return rows


def score(text: str, answer: str, language: str) -> float:
    """Returns how good an answer is, S in [0, 1].

    The share of the reference's places with the right concept, in any language, times the share of words that are of the
    language, minus 0.1 for each further length of the reference.

    Args:
      text: words with commas between them.
      answer: the reference.
      language: of the request.
    """
    given, wanted = _items(text), _items(answer)
    if not given:
        return 0.0
    own = concepts(language)
    right = sum(own[want] in meanings(one) for one, want in zip(given, wanted, strict=False))
    consistent = sum(one in own for one in given) / len(given)
    excess = max(0.0, len(given) / len(wanted) - 1)
    return max(0.0, right / len(wanted) * consistent - _LENGTH_PENALTY * excess)


def _items(text: str) -> list[str]:
    return [item for part in text.split(",") if (item := part.strip().lower())]


def artefacts(text: str, language: str) -> float:
    """Returns the share of an answer's words that are of the other language of the family instead; 0 without one."""
    given = _items(text)
    if not given or len(family(language)) < 2:
        return 0.0
    own, other = concepts(language), concepts(sibling(language))
    return sum(one in other and one not in own for one in given) / len(given)


def normal(*parts: Any) -> float:
    """Returns a draw from the standard normal distribution that is a function of the parts."""
    return float(np.random.default_rng(splits.stable_hash(repr(parts))).standard_normal())


def noisy_score(
    text: str, info: Any, *, deviation: NonNegative = 0.1, seed: Seed = 0, name: str = "reward"
) -> float:
    """Returns the score with Gaussian noise, which is a function of the seed, the name, the request and the text.

    Args:
      text: of an answer.
      info: the request's row, with 'id', 'answer' and 'language'.
      deviation: of the noise.
      seed, name: of the noise; a reward and a judge have other names, so that their noise is independent.
    """
    exact = score(text, info["answer"], info["language"])
    if not deviation:
        return exact
    return exact + deviation * normal(seed, name, info["id"], text.strip())


def translated(text: str, language: str, *, loss: float, key: Any) -> str:
    """Returns an English answer said in another language word by word, with the mistakes of `lossy`; unknown words stay."""
    english = concepts(SHARED)
    translated = [words(language)[english[one]] if one in english else one for one in _items(text)]
    return lossy(", ".join(translated), language, loss=loss, key=key)


def lossy(text: str, language: str, *, loss: float, key: Any) -> str:
    """Returns an answer with some words in the other language of the family, as a poor translator would leave it.

    Args:
      text: words with commas between them.
      language: of the text, other than English.
      loss: chance of each word.
      key: the draws are a function of it.
    """
    own, out = concepts(language), []
    for place, item in enumerate(_items(text)):
        # A normal draw as a uniform one.
        draw = 0.5 * (1 + math.erf(normal("translator", key, place) / math.sqrt(2)))
        known = item in own and draw < loss
        out.append(words(sibling(language))[own[item]] if known else item)
    return " " + ", ".join(out)


def of_languages(rows: Sequence[Mapping[str, Any]], codes: Sequence[str]) -> list[Any]:
    """Returns the rows in some of the languages."""
    return [row for row in rows if row["language"] in codes]
