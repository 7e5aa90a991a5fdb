"""Vocabularies trained on languages of unequal amounts of text: as they are, and in equal shares."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from data.text.documents import Document

LANGUAGES = (
    "ar",
    "cs",
    "de",
    "el",
    "en",
    "es",
    "fa",
    "he",
    "hi",
    "id",
    "ja",
    "ko",
    "ru",
    "tr",
    "vi",
    "uk",
)
BALANCES = {
    "raw": 1.0,
    "balanced": 0.0,
}  # exponent of a language's bytes, see data.tokenizers.vocabularies
SIZE = 4096  # pieces
LARGEST = 120_000  # bytes of the language with most text; the one of rank r has 1/r of it
SENTENCES = 300
SETTINGS = {
    "languages": LANGUAGES,
    "balances": BALANCES,
    "size": SIZE,
    "largest": LARGEST,
    "sentences": SENTENCES,
}


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The corpus of installed packages, of which the language of rank r has 1/r of the first one's bytes."""

    corpus: Any
    order: tuple[str, ...]  # tasks, the one with most text first

    @property
    def digest(self) -> str:
        return f"{self.corpus.digest} {LARGEST} {' '.join(self.order)}"

    @property
    def sources(self) -> tuple[str, ...]:
        return self.order

    def size(self, source: str) -> int:
        return LARGEST // (self.order.index(source) + 1)

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        return self.corpus.sample(source, num_bytes)


def measure(seeds: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {seed: {'raw' or 'balanced': {language: parity, 'spread': ...}}}; a seed decides which language has most text.

    A language's parity is its tokens over those of the same messages in English; 'spread' is the highest parity over the
    lowest. Both vocabularies of a seed read as many bytes.
    """
    import numpy as np

    from data import cpu_tensorflow
    from data.languages import parallel, table, tokenizer_report
    from data.text import corpus as corpus_lib
    from data.tokenizers import vocabularies

    cpu_tensorflow.load()
    sources = [table.LANGUAGES[code].sources[0] for code in LANGUAGES]
    corpus = corpus_lib.assemble(sources=sources, bytes_per_source=2 * LARGEST)
    pairs = parallel.read(parallel.PACKAGES, LANGUAGES, limit=SENTENCES)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        order = tuple(np.random.default_rng(seed).permutation(sources).tolist())
        ranked = Ranked(corpus, order)
        total = sum(map(ranked.size, order))
        out[str(seed)] = {}
        for name, balance in BALANCES.items():
            vocabulary = vocabularies.sentencepiece(
                corpus=ranked, size=SIZE, balance=balance, sample_bytes=total // 2
            )
            report = tokenizer_report.measure(vocabulary, pairs)
            parity = {code: one["parity"] for code, one in report["languages"].items()}
            out[str(seed)][name] = {**parity, "spread": report["parity_spread"]}
    return out
