"""Domain encoders without a model: hashed n-grams, and two controls that read no documents.

Shapes: M width of an embedding.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from espalier.data.nexus.domain_embeddings import EmbeddingsError

BUCKETS = 1 << 16  # number of buckets for hashed n-grams
_BLOCK = 4096  # buckets projected at a time


class Encoder(Protocol):
    """Computes the raw vector of a domain."""

    centred: bool  # whether the mean over domains is to be subtracted from the raw vectors

    @property
    def settings(self) -> Mapping[str, Any]:
        """Returns kind and all settings; encoders with equal vectors have equal settings."""

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """Returns the raw vector [M] of a domain's documents; `index` is the domain's position in the file."""


class _Encoder:
    """Settings are the fields of the dataclass; by default, the encoder is a control."""

    kind: ClassVar[str]
    centred = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngrams(_Encoder):
    """A random projection of the square roots of the frequencies of character n-grams.

    The dot product of two such vectors is the Bhattacharyya coefficient of the domains' n-gram distributions,
    up to the projection's error of about 1 / sqrt(M). All documents have equal weight, whatever their length.
    """

    order: int  # n
    dim: int  # M
    documents: int  # number of documents drawn from each domain
    tokens: int  # number of characters read from the beginning of each document
    seed: int  # seed of the projection and of the choice of documents
    kind = "ngrams"
    centred = True

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder; raises EmbeddingsError if all documents are shorter than n characters."""
        histogram = np.zeros(BUCKETS)
        for text in texts:
            buckets = self._buckets(text[: self.tokens])
            if len(buckets):
                histogram += np.bincount(buckets, minlength=BUCKETS) / len(buckets)
        if not histogram.any():
            raise EmbeddingsError(
                f"all documents have fewer than {self.order} characters: use longer ones, or lower --order"
            )
        return self._projected(np.sqrt(histogram / histogram.sum()))

    def _buckets(self, text: str) -> np.ndarray:
        """Returns the bucket of each n-gram: the upper bits of a sum of products with odd numbers, modulo 2^64."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        count = len(codes) - self.order + 1
        if count < 1:
            return np.zeros(0, np.int64)
        keys = _bits(self.seed, 0, self.order) | np.uint64(1)
        sums = sum(keys[i] * (codes[i : i + count] + np.uint64(1)) for i in range(self.order))
        return (sums >> np.uint64(64 - BUCKETS.bit_length() + 1)).astype(np.int64)

    def _projected(self, histogram: np.ndarray) -> np.ndarray:
        """Returns the histogram times a matrix of random signs / sqrt(M); holds one block of the matrix at a time."""
        total_M = np.zeros(self.dim)
        for block in range(BUCKETS // _BLOCK):
            part = histogram[block * _BLOCK : (block + 1) * _BLOCK]
            bits = _bits(self.seed, 1 + block, -(-_BLOCK * self.dim // 64))
            signs = np.unpackbits(bits.astype("<u8").view(np.uint8))[: _BLOCK * self.dim]
            (used,) = part.nonzero()
            signs_M = signs.reshape(_BLOCK, self.dim)[used]
            total_M += part[used] @ (2.0 * signs_M - 1)
        return total_M / np.sqrt(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(_Encoder):
    """A control: random directions of width `dim`, independent of the documents."""

    dim: int
    seed: int
    kind = "random"

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        return np.random.default_rng((self.seed, index)).standard_normal(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneHot(_Encoder):
    """A control: one of `dim` axes per domain, so that all domains are orthogonal."""

    dim: int
    kind = "one_hot"

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder; raises EmbeddingsError if there are more domains than axes."""
        if index >= self.dim:
            raise EmbeddingsError(
                f"one_hot vectors of {self.dim} numbers can represent {self.dim} domains: set --dim to at "
                f"least {index + 1}"
            )
        return np.eye(1, self.dim, index)[0]


def _bits(seed: int, part: int, words: int) -> np.ndarray:
    """Returns random 64-bit words, the same in every release of numpy (bit generators do not change)."""
    return np.random.PCG64((seed, part)).random_raw(words)
