"""Vocabularies trained on languages of unequal amounts of text, as they are and in equal shares: how many tokens each takes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from espalier.data.text.documents import Document

LANGUAGES = (
    *("ar", "cs", "de", "el", "en", "es", "fa", "he"),
    *("hi", "id", "ja", "ko", "ru", "tr", "vi", "uk"),
)
SHARES = {"raw": 1.5, "balanced": 0.0}  # exponent of a language's rank, by which its bytes fall
SIZE = 4096  # pieces
TOTAL = 160_000  # bytes of all languages
SENTENCES = 300
SETTINGS = {
    "languages": LANGUAGES,
    "shares": SHARES,
    "size": SIZE,
    "total": TOTAL,
    "sentences": SENTENCES,
}


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The corpus of installed packages, of which the language of rank r has a share proportional to r ** -exponent."""

    corpus: Any
    order: tuple[str, ...]  # tasks, the one with most text first
    exponent: float

    @property
    def digest(self) -> str:
        return f"{self.corpus.digest} {TOTAL} {self.exponent} {' '.join(self.order)}"

    @property
    def sources(self) -> tuple[str, ...]:
        return self.order

    def size(self, source: str) -> int:
        weights = {name: rank**-self.exponent for rank, name in enumerate(self.order, start=1)}
        return round(TOTAL * weights[source] / sum(weights.values()))

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        return self.corpus.sample(source, num_bytes)


def measure(seed: int) -> dict[str, dict[str, float]]:
    """Returns {'raw' or 'balanced': {language: parity, 'spread': ...}}; the seed decides which language has most text.

    A language's parity is its tokens over those of the same messages in English; 'spread' is the deviation of its logarithm
    over languages. Both vocabularies of a seed read as many bytes.
    """
    import numpy as np

    from espalier.data.languages import parallel, table, tokenizer_report
    from espalier.data.text import corpus as corpus_lib
    from espalier.data.tokenizers import vocabularies

    sources = [table.LANGUAGES[code].sources[0] for code in LANGUAGES]
    corpus = corpus_lib.assemble(sources=sources, bytes_per_source=TOTAL)
    pairs = parallel.read(parallel.PACKAGES, LANGUAGES, limit=SENTENCES)
    order = tuple(np.random.default_rng(seed).permutation(sources).tolist())
    out: dict[str, dict[str, float]] = {}
    for name, exponent in SHARES.items():
        vocabulary = vocabularies.sentencepiece(
            corpus=Ranked(corpus, order, exponent), size=SIZE, balance=1.0, sample_bytes=TOTAL
        )
        report = tokenizer_report.measure(vocabulary, pairs)
        parity = {code: one["parity"] for code, one in report["languages"].items()}
        out[name] = {**parity, "spread": float(np.std(np.log(list(parity.values())), ddof=1))}
    return out
