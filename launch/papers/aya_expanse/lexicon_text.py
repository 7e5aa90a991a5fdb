"""Texts in the seven languages of `lexicon`, on which the base of the small experiment is trained, and their tasks.

A document is in one language, whose code it begins with:

  entry      a concept in some of the languages, as in a dictionary
  calendar   days or months in their order
  index      names of languages in the order of letters
  message    a message of Django or Sphinx

The task words_L has the documents of language L; the mixture `words` has all of them in equal shares.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from espalier.common.ranges import Seed, Size
from espalier.data import tasks
from espalier.data.cache import fingerprint
from espalier.data.data_source import GeneratedSource
from espalier.data.languages import parallel
from espalier.data.text.documents import Document
from espalier.data.text.sources import cleaning
from espalier.launch.papers.aya_expanse import lexicon

CACHED_AS = "data.aya_expanse.lexicon_text"  # the name by which caches of its data know it

MIXTURE = "words"
_MAX_LETTERS = 80  # of a message
_SHARES = {"entry": 0.45, "calendar": 0.2, "index": 0.2, "message": 0.15}
_CYCLES = (lexicon.DAYS, lexicon.MONTHS)


@functools.cache
def messages(language: str) -> tuple[str, ...]:
    """Returns the short messages of Django and Sphinx in a language, without places for values."""
    codes = [language, "es"] if language == lexicon.SHARED else [language]
    texts = (cleaning.normalise(text).strip() for _, text in parallel.of_packages(codes)[language])
    return tuple(t for t in texts if 0 < len(t) <= _MAX_LETTERS and not set(t) & set("%{\n"))


@dataclasses.dataclass(frozen=True)
class Words(GeneratedSource):
    """Documents of one language."""

    language: str

    validation_documents: ClassVar[int] = 128

    @property
    def digest(self) -> str:
        known = [lexicon.words(code) for code in lexicon.LANGUAGES]
        return fingerprint.of_json([str(self), known, messages(self.language), _SHARES, 1])

    def texts(self, split: str) -> list[str]:
        place = [self.splits.index(split), lexicon.LANGUAGES.index(self.language)]
        rng = np.random.default_rng([self.seed, *place])
        kinds = rng.choice(
            list(_SHARES), size=self.num_input_examples(split), p=[*_SHARES.values()]
        )
        return [getattr(self, f"_{kind}")(rng) for kind in kinds]

    def _entry(self, rng: np.random.Generator) -> str:
        concept = str(rng.choice(lexicon.CONCEPTS))
        others = [code for code in lexicon.LANGUAGES if code != self.language]
        codes = [*rng.permutation(others)[:3].tolist(), self.language]
        return ", ".join(f"{code} {lexicon.words(code)[concept]}" for code in codes)

    def _calendar(self, rng: np.random.Generator) -> str:
        cycle = _CYCLES[rng.integers(len(_CYCLES))]
        start = int(rng.integers(len(cycle)))
        count = min(len(cycle), 7)
        ordered = (*cycle, *cycle)[start : start + count]
        return f"{self.language}: {' '.join(lexicon.words(self.language)[one] for one in ordered)}"

    def _index(self, rng: np.random.Generator) -> str:
        chosen = rng.permutation(lexicon.NAMES)[: rng.integers(3, 6)].tolist()
        return (
            f"{self.language}: {', '.join(sorted(lexicon.words(self.language)[x] for x in chosen))}"
        )

    def _message(self, rng: np.random.Generator) -> str:
        known = messages(self.language)
        return f"{self.language}: {known[rng.integers(len(known))]}"


@dataclasses.dataclass(frozen=True)
class Requests(GeneratedSource):
    """Requests with their answers in all languages as texts, which the vocabulary is trained on too."""

    validation_documents: ClassVar[int] = 8

    @property
    def digest(self) -> str:
        return fingerprint.of_json([str(self), self.texts("train")])

    def texts(self, split: str) -> list[str]:
        rows = lexicon.requests("tuning", self.num_input_examples(split), self.seed)
        return [row["prompt"] + row["answer"] for row in rows]


@dataclasses.dataclass(frozen=True)
class Texts:
    """All documents, for `vocabularies.sentencepiece`."""

    documents: int = 2000
    seed: int = 0

    @functools.cached_property
    def _sources(self) -> dict[str, GeneratedSource]:
        own = [Words(_task(code), self.documents, self.seed, code) for code in lexicon.LANGUAGES]
        requests = Requests("words_requests", self.documents // 4, self.seed)
        return {source.name: source for source in (*own, requests)}

    @property
    def digest(self) -> str:
        return fingerprint.of_json([source.digest for source in self._sources.values()])

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def size(self, source: str) -> int:
        return sum(len(text.encode()) for text in self._sources[source].texts("train"))

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        for i, text in enumerate(self._sources[source].texts("train")):
            if num_bytes <= 0:
                return
            num_bytes -= len(text.encode())
            yield Document(f"{source}/{i}", text)


def _task(language: str) -> str:
    return f"words_{language}"


def register(*, vocabulary: Any, documents: Size = 8000, seed: Seed = 0) -> None:
    """Registers the task of each language, and the mixture.

    Args:
      vocabulary: a SeqIO vocabulary with EOS.
      documents: training documents of each language.
      seed: of the documents.

    Raises:
      ValueError: Django is not installed, or another task has one of the names.
    """
    names: Sequence[str] = [_task(code) for code in lexicon.LANGUAGES]
    for name, code in zip(names, lexicon.LANGUAGES, strict=True):
        tasks.register_source(
            name,
            Words(name, documents, seed, code),
            origin="lexicon_text.register",
            vocabulary=vocabulary,
            add_bos=False,
            add_eos=True,
        )
    tasks.register_mixture(MIXTURE, dict.fromkeys(names, 1.0))
