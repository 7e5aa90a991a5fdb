"""Passes over one tensor of several models, in blocks whose size does not change any result.

A tensor is read as its flattened values. A thread reads a block at a time. It consists of grains: a fixed number
of values, or of whole rows for methods that work on rows. All arithmetic is per grain, and sums over grains are added in
their order, so results do not depend on the size of a block or on the number of threads.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError

GRAIN = 1 << 16  # values
_SAMPLE = 1 << 9  # values of a grain that are sampled to guess a threshold
_MOST_HELD = 1 << 22  # values between two guesses that stay in memory
_TOP_BITS = np.uint32(0x7FFFFFFF)  # of a float32 without its sign
_WORDS_PER_COUNT = 8  # 32-bit words that Philox makes of one counter

Read = Callable[[int, int], np.ndarray]  # (low, high) -> these values of a flattened tensor
Parts = list[np.ndarray]  # a grain of each input
_T = TypeVar("_T")


class Blocks:
    """The values of one tensor of several models.

    Args:
      reads: for each input, returns the values [low, high) in any float dtype. Several threads may call it.
      shape: the tensor's shape.
      work: float32 or float64; grains have this dtype.
      cast: dtype that inputs are rounded to first; None for none.
      block: number of values that a thread reads at a time; at least a grain is read.
      row: number of values that are never split, such as a row; 1 for none.
      names: of the inputs, for messages; None for none.
      pool: runs blocks in threads; None for this thread.
      threads: number of threads of the pool.
    """

    def __init__(
        self,
        reads: Sequence[Read],
        shape: tuple[int, ...],
        *,
        work: Any = np.float32,
        cast: Any = None,
        block: int = 1 << 20,
        row: int = 1,
        names: Sequence[str] | None = None,
        pool: concurrent.futures.Executor | None = None,
        threads: int = 1,
    ):
        self.shape, self.size = tuple(shape), math.prod(shape)
        self.work = np.dtype(work)
        self.grain = max(1, GRAIN // max(1, row)) * max(1, row)
        self._reads, self._cast = reads, None if cast is None else np.dtype(cast)
        self._names = [f"input {i}" for i in range(len(reads))] if names is None else names
        self._block = max(1, block // self.grain) * self.grain
        self._pool, self._threads = pool, threads
        self._finite: set[int] = set()  # the blocks whose values are known to be finite

    def grains(self, low: int, high: int) -> Iterator[tuple[int, Parts]]:
        """Yields the first index and the inputs' values of each grain of a block.

        Raises:
          TransformError: values of an input are not finite; they are checked the first time that they are read.
        """
        raw = [read(low, high) for read in self._reads]
        for start in range(0, high - low, self.grain):
            parts = [self._cast_part(x[start : start + self.grain]) for x in raw]
            for number, part in enumerate(parts if low not in self._finite else ()):
                if base.not_finite(part):
                    self._refuse(number)
            yield low + start, parts
        self._finite.add(low)

    def _cast_part(self, values: np.ndarray) -> np.ndarray:
        if self._cast is not None and values.dtype != self._cast:
            values = values.astype(self._cast)
        return values.astype(self.work, copy=False)

    def map(
        self, compute: Callable[[Parts, int], np.ndarray], dtypes: Sequence[Any]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields blocks of results in order, as (first index, values rounded to each of `dtypes` in turn).

        Raises:
          TransformError: values of the result are not finite.
        """
        last = np.dtype(dtypes[-1])

        def work(low: int, high: int) -> tuple[int, np.ndarray]:
            values = np.empty(high - low, last)
            for start, parts in self.grains(low, high):
                part = compute(parts, start)
                with np.errstate(over="ignore"):
                    for dtype in dtypes:
                        part = part.astype(dtype, copy=False)
                if problem := base.not_finite(part):
                    raise TransformError(
                        f"the result of {', '.join(self._names)} has {problem} in {last.name}, though the inputs are finite: "
                        "use a wider dtype, or other weights."
                    )
                values[start - low : start - low + part.size] = part
            return low, values

        yield from self._in_order(work)

    def _refuse(self, number: int) -> None:
        """Raises TransformError for an input with values that are not finite, after a count of them."""
        bad = 0
        for low in range(0, self.size, self._block):
            raw = self._reads[number](low, min(low + self._block, self.size))
            bad += raw.size - int(np.isfinite(self._cast_part(raw)).sum())
        rounded = "" if self._cast is None else f" in {self._cast.name}"
        raise TransformError(
            f"{self._names[number]} has {bad:,} of {self.size:,} values that are NaN or infinite{rounded}: leave out this model, "
            "or take another checkpoint of it."
        )

    def each(self, measure: Callable[[Parts, int], _T]) -> list[_T]:
        """Returns a result for each grain, in order."""
        return list(self.stream(measure))

    def stream(self, measure: Callable[[Parts, int], _T]) -> Iterator[_T]:
        """Yields a result for each grain, in order."""

        def work(low: int, high: int) -> list[_T]:
            return [measure(parts, start) for start, parts in self.grains(low, high)]

        for block in self._in_order(work):
            yield from block

    def sum(self, measure: Callable[[Parts, int], np.ndarray]) -> np.ndarray:
        """Returns the sum of a float64 array over all grains, added in order."""
        results = self.each(measure)
        total = np.zeros_like(results[0]) if results else np.zeros(())
        for result in results:
            total = total + result
        return total

    def products(self, vectors: Callable[[Parts], Parts]) -> np.ndarray:
        """Returns the inner products [N, N] of N vectors that are computed from the inputs, in float64."""
        return self.sum(lambda parts, _: products(vectors(parts)))

    def _in_order(self, work: Callable[[int, int], _T]) -> Iterator[_T]:
        """Yields the results of all blocks in order; at most one block more than there are threads is in memory."""
        bounds = [
            (low, min(low + self._block, self.size)) for low in range(0, self.size, self._block)
        ]
        if self._pool is None or len(bounds) < 2:
            yield from (work(*bound) for bound in bounds)
            return
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for bound in bounds:
                pending.append(self._pool.submit(work, *bound))
                if len(pending) > self._threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            concurrent.futures.wait(pending)

    def sample(self, scores: Callable[[Parts], Parts]) -> list[np.ndarray]:
        """Returns some of the values of each score, as bits in ascending order."""
        samples: list[list[np.ndarray]] = []
        for low in range(0, self.size, self.grain):
            high = min(low + min(_SAMPLE, self.grain), self.size)
            parts = [self._cast_part(read(low, high)) for read in self._reads]
            samples.append([bits_of(x) for x in scores(parts)])
        return [np.sort(np.concatenate(column)) for column in zip(*samples, strict=True)]


def products(vectors: Parts) -> np.ndarray:
    """Returns the inner products [N, N] of vectors, or [N, N, R] of the rows of arrays of R rows, in float64."""
    wide = [x.astype(np.float64, copy=False) for x in vectors]
    count = len(wide)
    result = np.empty((count, count, *wide[0].shape[:-1]))
    for i in range(count):
        for j in range(i + 1):
            result[i, j] = result[j, i] = np.einsum("...i,...i->...", wide[i], wide[j])
    return result


def bits_of(values: np.ndarray) -> np.ndarray:
    """Returns the bits of the absolute values as uint32, whose order is that of the values; float64 is rounded first."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32) & _TOP_BITS


@dataclasses.dataclass(frozen=True)
class Top:
    """The largest scores of a tensor; of equal scores, the first.

    Attributes:
      value: bits of the smallest score in the set; all larger ones are in it.
      held: number of scores of this value that are in the set.
      before: number of scores of this value before each grain, and in the whole tensor; None if all of them are in the set.
      grain: number of values of a grain.
    """

    value: int
    held: int
    before: np.ndarray | None
    grain: int

    def mask(self, scores: np.ndarray, low: int) -> np.ndarray:
        """Returns which scores of the grain from index `low` on are in the set."""
        bits, value = bits_of(scores), np.uint32(self.value)
        if self.before is None:
            return bits >= value
        number = low // self.grain
        first, last = self.before[number : number + 2]
        if last <= self.held:
            return bits >= value
        mask = bits > value
        if first < self.held:
            mask[np.flatnonzero(bits == value)[: self.held - int(first)]] = True
        return mask


def largest(
    blocks: Blocks, scores: Callable[[Parts], Parts], wanted: Sequence[tuple[int, int]]
) -> list[Top]:
    """Returns sets of the largest scores, exactly.

    A sample guesses two bounds. One pass counts the scores above them and keeps those between, until the bounds hold few
    enough scores to sort or only equal ones; deltas of narrow dtypes have many of these.

    Args:
      blocks: the tensor.
      scores: returns the scores of a grain, at least 0, from the inputs; one array for each kind of score.
      wanted: (kind of score, number of the largest scores), between 1 and the tensor's size.
    """
    samples = blocks.sample(scores) if wanted else []
    searches = [_Search(samples[kind], count, blocks.size) for kind, count in wanted]
    while open_ := [i for i, search in enumerate(searches) if search.value is None]:

        def measure(
            parts: Parts, _: int, open_: list[int] = open_
        ) -> list[tuple[int, int, np.ndarray]]:
            values = scores(parts)
            bits = {kind: bits_of(values[kind]) for kind in {wanted[i][0] for i in open_}}
            return [searches[i].measure(bits[wanted[i][0]]) for i in open_]

        for search in (searches[i] for i in open_):
            search.begin()
        for result in blocks.stream(measure):
            for i, part in zip(open_, result, strict=True):
                searches[i].add(*part)
        for i in open_:
            searches[i].narrow()
    return [search.top(blocks.grain) for search in searches]


class _Search:
    """The search for the `count`-th largest of `size` scores, as bits.

    Attributes:
      value: the score; None while it is not known.
      held: number of scores of this value among the `count` largest.
      equal: number of scores of this value in each grain.
    """

    def __init__(self, sample: np.ndarray, count: int, size: int):
        self._count = count
        self._bottom, self._top = 0, int(_TOP_BITS)  # the value is known to be within
        self.value: int | None = None
        self.held, self.equal = 0, np.zeros(0, np.int64)
        self._guess(sample, count / size)

    def _guess(self, sample: np.ndarray, share: float) -> None:
        """Sets bounds around the value that `share` of the scores reach, a few standard errors apart."""
        middle, n = (1 - share) * len(sample), len(sample)
        # Neighbours of a sample are alike, so the margin is wider than that of independent scores.
        margin = 12 * math.sqrt(n * share * (1 - share)) + 4
        low, high = math.floor(middle - margin), math.ceil(middle + margin)
        self._low = max(self._bottom, int(sample[low])) if low >= 0 else self._bottom
        self._high = min(self._top, int(sample[high])) if high < n else self._top

    def begin(self) -> None:
        self._above = self._within = 0
        self._values: list[np.ndarray] = []  # of each grain, as long as all of them are held
        self._counts: list[int] = []
        self._size, self._stride = 0, 1

    def measure(self, bits: np.ndarray) -> tuple[int, int, np.ndarray]:
        """Returns the number of scores above the bounds and within, and those within."""
        above = int(np.count_nonzero(bits > np.uint32(self._high)))
        if self._low == self._high:
            return above, int(np.count_nonzero(bits == np.uint32(self._low))), bits[:0]
        # Differences of smaller scores wrap around to large numbers.
        inside = bits - np.uint32(self._low) <= np.uint32(self._high - self._low)
        within = bits.compress(inside)
        return above, within.size, within[:: self._stride]

    def add(self, above: int, within: int, values: np.ndarray) -> None:
        self._above += above
        self._within += within
        self._counts.append(within)
        self._values.append(values)
        self._size += values.size
        while (
            self._size > _MOST_HELD
        ):  # too many to sort: from here on they only guess narrower bounds
            self._stride *= 2
            self._values = [np.concatenate(self._values)[::2].copy()]
            self._size = self._values[0].size

    def narrow(self) -> None:
        """Finds the value, or narrows the bounds."""
        rank = self._count - self._above  # of the value among those within
        if rank <= 0:
            self._bottom = self._low = self._high + 1
            self._high = self._top
        elif rank > self._within:
            self._top = self._high = self._low - 1
            self._low = self._bottom
        elif self._low == self._high:
            self.value, self.held, self.equal = self._low, rank, np.array(self._counts)
        else:
            values = np.concatenate(self._values)
            if self._stride == 1:
                place = values.size - rank
                values.partition(place)
                value = values[place]
                above = int(np.count_nonzero(values > value))
                self.value, self.held = int(value), rank - above
                equal = [np.count_nonzero(part == value) for part in self._values]
                self.equal = np.array(equal, np.int64)
            else:
                before = (self._low, self._high)
                self._bottom, self._top = before
                self._guess(np.sort(values), rank / self._within)
                if (self._low, self._high) == before:  # halve, so that the search always ends
                    self._low = (before[0] + before[1] + 1) // 2
        self._values, self._counts = [], []

    def top(self, grain: int) -> Top:
        """Returns the set, once `value` is known."""
        assert self.value is not None
        before = np.concatenate([[0], np.cumsum(self.equal)])
        return Top(self.value, self.held, before if self.held < before[-1] else None, grain)


def random_words(key: str, low: int, high: int) -> np.ndarray:
    """Returns uniform 32-bit words of the indices [low, high), which depend on nothing but the key and the index."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    first = low // _WORDS_PER_COUNT
    philox = np.random.Philox(key=np.frombuffer(digest, "<u8"), counter=[first, 0, 0, 0])
    count = (high - first * _WORDS_PER_COUNT + 1) // 2
    words = philox.random_raw(count).astype("<u8", copy=False).view("<u4")
    start = low - first * _WORDS_PER_COUNT
    return words[start : start + high - low]


def promoted(dtypes: Sequence[Any]) -> np.dtype:
    """Returns the dtype of all, or the narrowest of float32 and float64 that holds them."""
    kinds = {np.dtype(x) for x in dtypes}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)


def is_float(dtype: Any) -> bool:
    """Returns whether a dtype is of floating-point numbers, the narrow ones of ml_dtypes included."""
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True
