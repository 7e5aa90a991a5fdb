"""Encoders of domains that need no model: hashed n-grams, and two controls that read nothing.

Shapes: M width of an embedding, '...' any leading.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from data.nexus.domain_embeddings import EmbeddingsError

BUCKETS = 1 << 16  # of hashed n-grams
_BLOCK = 4096  # of them that are projected at a time


class Encoder(Protocol):
    """What makes the raw vector of a domain.

    Attributes:
      centred: whether the mean of the domains is taken from all.
      reads: whether documents are read.
    """

    centred: bool
    reads: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        """Kind and all settings: what makes equal vectors has equal ones."""

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """The vector [M] of a domain's documents; `index` is its place in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ngrams:
    """How often the n-grams of characters occur: square roots, projected at random.

    The product of two such vectors is the Bhattacharyya coefficient of the domains' distributions, up to
    the projection's error of about 1 / sqrt(M). Every document counts alike, however long.

    Attributes:
      order: n.
      dim: M.
      documents: how many were drawn of each domain.
      tokens: characters of a document, the first ones.
      seed: of the projection and of the draw of documents.
    """

    order: int
    dim: int
    documents: int
    tokens: int
    seed: int
    centred = True
    reads = True

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": "ngrams", **dataclasses.asdict(self)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder.

        Raises:
          EmbeddingsError: no document is as long as an n-gram.
        """
        histogram = np.zeros(BUCKETS)
        for text in texts:
            found = self._buckets(text[: self.tokens])
            if len(found):
                histogram += np.bincount(found, minlength=BUCKETS) / len(found)
        if not histogram.any():
            raise EmbeddingsError(
                f"no document has {self.order} characters: give longer ones, or a lower --order"
            )
        return self._projected(np.sqrt(histogram / histogram.sum()))

    def _buckets(self, text: str) -> np.ndarray:
        """The bucket of each n-gram: the upper bits of a sum of products with odd numbers, modulo 2^64."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        count = len(codes) - self.order + 1
        if count < 1:
            return np.zeros(0, np.int64)
        keys = _bits(self.seed, 0, self.order) | np.uint64(1)
        sums = sum(keys[i] * (codes[i : i + count] + np.uint64(1)) for i in range(self.order))
        return (sums >> np.uint64(64 - BUCKETS.bit_length() + 1)).astype(np.int64)

    def _projected(self, histogram: np.ndarray) -> np.ndarray:
        """The histogram times signs / sqrt(M), of which no more than a block is there at a time."""
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
    """A control: directions that say nothing of the domains.

    Attributes:
      dim: M.
      seed: of the directions.
    """

    dim: int
    seed: int
    centred = False
    reads = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": "random", **dataclasses.asdict(self)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        return np.random.default_rng((self.seed, index)).standard_normal(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneHot:
    """A control: each domain has an axis of its own, so that none resembles another.

    Attributes:
      dim: M, at least the number of domains.
    """

    dim: int
    centred = False
    reads = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": "one_hot", **dataclasses.asdict(self)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder.

        Raises:
          EmbeddingsError: all axes are taken.
        """
        if index >= self.dim:
            raise EmbeddingsError(
                f"one_hot vectors of {self.dim} numbers are for as many domains: set --dim to at least "
                f"{index + 1}"
            )
        return np.eye(1, self.dim, index)[0]


def _bits(seed: int, part: int, words: int) -> np.ndarray:
    """Random words of 64 bits, the same in every release of numpy (bit generators do not change)."""
    return np.random.PCG64((seed, part)).random_raw(words)
