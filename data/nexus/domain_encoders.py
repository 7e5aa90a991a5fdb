"""Domain encoders without a model: hashed n-grams, and two controls that read no documents.

Shapes: M width of an embedding.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from data.nexus.domain_embeddings import EmbeddingsError

BUCKETS = 1 << 16  # number of buckets for hashed n-grams
_BLOCK = 4096  # buckets projected at a time


class Encoder(Protocol):
    """Computes the raw vector of a domain.

    Attributes:
      centred: whether the mean over domains is to be subtracted from the raw vectors.
    """

    centred: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        """Returns kind and all settings; encoders with equal vectors have equal settings."""

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """Returns the raw vector [M] of a domain's documents; `index` is the domain's position in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngrams:
    """A random projection of the square roots of the frequencies of character n-grams.

    The dot product of two such vectors is the Bhattacharyya coefficient of the domains' n-gram distributions,
    up to the projection's error of about 1 / sqrt(M). All documents have equal weight, whatever their length.

    Attributes:
      order: n.
      dim: M.
      documents: number of documents drawn from each domain.
      tokens: number of characters read from the beginning of each document.
      seed: seed of the projection and of the choice of documents.
    """

    order: int
    dim: int
    documents: int
    tokens: int
    seed: int
    centred = True

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": "ngrams", **dataclasses.asdict(self)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder.

        Raises:
          EmbeddingsError: all documents are shorter than n characters.
        """
        histogram = np.zeros(BUCKETS)
        for text in texts:
            buckets = self._buckets(text[: self.tokens])
            if len(buckets):
                histogram += np.bincount(buckets, minlength=BUCKETS) / len(buckets)
        if not histogram.any():
            raise EmbeddingsError(
                f"no document has {self.order} characters: give longer ones, or a lower --order"
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
class Random:
    """A control: random directions, independent of the documents.

    Attributes:
      dim: M.
      seed: seed of the directions.
    """

    dim: int
    seed: int
    centred = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": "random", **dataclasses.asdict(self)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        return np.random.default_rng((self.seed, index)).standard_normal(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneHot:
    """A control: one axis per domain, so that all domains are orthogonal.

    Attributes:
      dim: M, at least the number of domains.
    """

    dim: int
    centred = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": "one_hot", **dataclasses.asdict(self)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder.

        Raises:
          EmbeddingsError: there are more domains than axes.
        """
        if index >= self.dim:
            raise EmbeddingsError(
                f"one_hot vectors of {self.dim} numbers are for as many domains: set --dim to at least "
                f"{index + 1}"
            )
        return np.eye(1, self.dim, index)[0]


def _bits(seed: int, part: int, words: int) -> np.ndarray:
    """Returns random 64-bit words, the same in every release of numpy (bit generators do not change)."""
    return np.random.PCG64((seed, part)).random_raw(words)
