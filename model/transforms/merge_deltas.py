"""Merges of deltas, the differences of models from their base: task arithmetic, TIES, DARE, DELLA, breadcrumbs and SCE.

All but SCE are one routine: drop part of each delta, rescale, weigh, elect a sign for every value, sum and normalise.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from espalier.model.transforms import merge_blocks
from espalier.model.transforms.merge_blocks import Blocks, Parts, Top

_TINY = 1e-7  # an L1 norm below it is not matched
# Values whose signs are elected at a time, so that they stay in the processor's cache.
_PIECE = 1 << 14

Compute = Callable[[Parts, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a method treats deltas.

    Attributes:
      drops: which values are dropped: all but the "largest", all but the "middle", at "random", at random by "ranked" size, or none.
      elects: whether values against the elected sign are dropped.
    """

    drops: str | None = None
    elects: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Parameters of a merge of N deltas.

    Attributes:
      weight, density, gamma, epsilon: of each delta.
      normalize: divide by the sum of weights, of those with the elected sign if signs are elected.
      rescale: multiply the rest of a delta, so that it has the L1 norm of the whole delta.
      scale: multiplies the sum.
      keys: of each delta, for random numbers.
    """

    weight: Sequence[float]
    density: Sequence[float]
    gamma: Sequence[float]
    epsilon: Sequence[float]
    normalize: bool
    rescale: bool
    scale: float
    keys: Sequence[str]


def deltas_of(parts: Parts) -> Parts:
    """Returns the differences of all arrays but the first from the first."""
    return [part - parts[0] for part in parts[1:]]


def task_vectors(blocks: Blocks, kind: Kind, settings: Settings) -> Compute:
    """Returns the function that merges a grain, after the passes that the method needs."""
    masks = _masks(blocks, kind, settings)
    scales = _scales(blocks, masks, settings)
    weights = [blocks.work.type(w * s) for w, s in zip(settings.weight, scales, strict=True)]
    total = sum(settings.weight)
    divisor = 1.0 if abs(total) < 1e-8 else total

    def compute(parts: Parts, low: int) -> np.ndarray:
        terms = deltas_of(parts)
        for delta, mask, weight in zip(terms, masks, weights, strict=True):
            if mask is not None:
                delta *= mask(delta, low).astype(delta.dtype)
            if weight != 1:
                delta *= weight
        if kind.elects:
            result = _elected(terms, settings)
        else:
            result = terms[0]
            for term in terms[1:]:
                result += term
            if settings.normalize:
                result /= blocks.work.type(divisor)
        if settings.scale != 1:
            result *= blocks.work.type(settings.scale)
        result += parts[0]
        return result

    return compute


def _elected(terms: Parts, settings: Settings) -> np.ndarray:
    """Returns the sum of the terms that have the sign of the sum of all; their weighted mean with `normalize`.

    Terms are overwritten.
    """
    for low in range(0, terms[0].size, _PIECE):
        _elect([term[low : low + _PIECE] for term in terms], settings)
    return terms[0]


def _elect(terms: Parts, settings: Settings) -> None:
    """Writes the elected sum of pieces of terms into the first of them."""
    dtype = terms[0].dtype
    words = np.uint64 if dtype.itemsize == 8 else np.uint32
    signs = terms[0] + terms[1] if len(terms) > 1 else terms[0].copy()
    for term in terms[2:]:
        signs += term
    signs += dtype.type(0)  # a sum of -0 counts as positive
    bits = signs.view(words)
    np.bitwise_and(bits, words(1 << (8 * dtype.itemsize - 1)), out=bits)
    divisor = None
    for term, weight in zip(terms, settings.weight, strict=True):
        flipped = term.view(words)
        np.bitwise_xor(flipped, bits, out=flipped)  # now those that agree are positive
        if settings.normalize:
            part = (term > 0).astype(dtype)
            if weight != 1:
                part *= dtype.type(weight)
            divisor = part if divisor is None else np.add(divisor, part, out=divisor)
        np.maximum(term, 0, out=term)
    result = terms[0]
    for term in terms[1:]:
        result += term
    if divisor is not None:
        smallest = dtype.type(min(settings.weight))
        if smallest > 0:  # where nothing agrees, the result is 0 whatever it is divided by
            np.maximum(divisor, smallest, out=divisor)
        else:
            divisor[divisor == 0] = 1
        result /= divisor
    flipped = result.view(words)
    np.bitwise_xor(flipped, bits, out=flipped)


def _masks(blocks: Blocks, kind: Kind, settings: Settings) -> list[Callable | None]:
    """Returns, for each delta, the function that returns which values of a grain stay; None if all do."""
    densities = settings.density
    if kind.drops in ("largest", "middle"):
        return _by_magnitude(blocks, kind, settings)
    if kind.drops == "random":
        return [
            None if d >= 1 else _random(key, d)
            for key, d in zip(settings.keys, densities, strict=True)
        ]
    if kind.drops == "ranked":
        masks: list[Callable | None] = []
        width = blocks.shape[-1] if blocks.shape else 1
        for d, eps, key in zip(densities, settings.epsilon, settings.keys, strict=True):
            masks.append(None if d >= 1 else _nothing if d <= 0 else _ranked(key, d, eps, width))
        return masks
    return [None] * len(densities)


def _by_magnitude(blocks: Blocks, kind: Kind, settings: Settings) -> list[Callable | None]:
    """Returns masks of the largest values, or of the largest after the share `gamma` of outliers."""
    size, wanted, ranks = blocks.size, [], []
    for i, density in enumerate(settings.density):
        first, count = 0, size
        if density < 1:
            count = int(density * size) if density > 0 else 0
            if kind.drops == "largest" and density > 0:
                count = max(1, count)
            if kind.drops == "middle":
                first = min(int(settings.gamma[i] * size), size - count)
        ranks.append((first, first + count))
        wanted += [(i, rank) for rank in (first, first + count) if count and 0 < rank < size]
    tops = dict(zip(wanted, merge_blocks.largest(blocks, deltas_of, wanted), strict=True))

    def mask(i: int) -> Callable | None:
        first, last = ranks[i]
        if (first, last) == (0, size):
            return None
        if first == last:
            return _nothing
        return _between(tops.get((i, first)), tops.get((i, last)))

    return [mask(i) for i in range(len(ranks))]


def _between(outer: Top | None, inner: Top | None) -> Callable:
    def mask(delta: np.ndarray, low: int) -> np.ndarray:
        mask_ = np.ones(delta.shape, bool) if inner is None else inner.mask(delta, low)
        return mask_ if outer is None else mask_ & ~outer.mask(delta, low)

    return mask


def _nothing(delta: np.ndarray, low: int) -> np.ndarray:
    return np.zeros(delta.shape, bool)


def _random(key: str, density: float) -> Callable:
    limit = np.uint32(max(0, min(round(density * 2**32), 2**32 - 1)))

    def mask(delta: np.ndarray, low: int) -> np.ndarray:
        return merge_blocks.random_words(key, low, low + delta.size) < limit

    return mask


def _ranked(key: str, density: float, epsilon: float, width: int) -> Callable:
    """Returns the mask of DELLA: within a row, the probability rises by 2 epsilon from the smallest value to the largest.

    The only value of a row has the probability in the middle.
    """

    def mask(delta: np.ndarray, low: int) -> np.ndarray:
        rows = merge_blocks.bits_of(delta).reshape(-1, width)
        # Bits of the size, then the index: sorted as numbers, so that equal sizes have one order.
        sized = rows.astype(np.uint64) << np.uint64(32) | np.arange(width, dtype=np.uint64)
        sized.sort(axis=1)
        order = (sized & np.uint64(0xFFFFFFFF)).astype(np.int64)
        order += width * np.arange(len(rows))[:, None]
        steps = np.linspace(0, 1, width) if width > 1 else np.array([0.5])
        share = np.empty(delta.size)
        share[order.reshape(-1)] = np.tile(steps, len(rows))
        limits = (density - epsilon + 2 * epsilon * share) * 2**32
        words = merge_blocks.random_words(key, low, low + delta.size)
        return words < limits

    return mask


def _scales(blocks: Blocks, masks: Sequence[Callable | None], settings: Settings) -> list[float]:
    """Returns the factors that give the remaining values the L1 norms of the whole deltas."""
    if not settings.rescale or all(mask is None for mask in masks):
        return [1.0] * len(masks)

    def measure(parts: Parts, low: int) -> np.ndarray:
        sums = np.zeros((len(masks), 2))
        for row, delta, mask in zip(sums, deltas_of(parts), masks, strict=True):
            if mask is not None:
                size = np.abs(delta)
                row[:] = size.sum(dtype=np.float64), (size * mask(delta, low)).sum(dtype=np.float64)
        return sums

    sums = blocks.sum(measure)
    return [
        float(before / after) if before >= _TINY and after >= _TINY else 1.0
        for before, after in np.atleast_2d(sums)
    ]


def sce(blocks: Blocks, select_topk: float) -> Compute:
    """Returns the function that merges a grain by SCE: keep the values that vary most among models, weigh each model by the mean
    square of its delta, and drop values against the elected sign."""
    mask = _varying(blocks, select_topk)

    def selected(parts: Parts, low: int) -> Parts:
        deltas = deltas_of(parts)
        if mask is not None:
            mask_ = mask(deltas, low)
            deltas = [delta * mask_ for delta in deltas]
        return deltas

    squares = blocks.sum(
        lambda parts, low: np.array(
            [
                np.einsum("i,i->", x.astype(np.float64), x.astype(np.float64))
                for x in selected(parts, low)
            ]
        )
    )
    means = np.asarray(squares) / max(1, blocks.size)
    # As in the reference, small deltas (a sum of mean squares below 1e-6) weigh the same.
    small = abs(means.sum()) < 1e-6
    weights = np.full(len(means), 1 / len(means)) if small else means / means.sum()

    def compute(parts: Parts, low: int) -> np.ndarray:
        deltas = selected(parts, low)
        positive = sum(deltas[1:], deltas[0]) >= 0
        result, divisor = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
        for delta, weight in zip(deltas, weights, strict=True):
            agrees = (((delta > 0) == positive) & (delta != 0)) * delta.dtype.type(weight)
            result += delta * agrees
            divisor += agrees
        result /= np.maximum(divisor, divisor.dtype.type(1e-6))
        result += parts[0]
        return result

    return compute


def _varying(blocks: Blocks, share: float) -> Callable[[Parts, int], np.ndarray] | None:
    """Returns the function that returns which values of a grain are in the share that varies most; None for all."""
    if share >= 1:
        return None

    def variance(deltas: Parts) -> np.ndarray:
        mean = sum(deltas[1:], deltas[0]) / blocks.work.type(len(deltas))
        squares = [np.square(delta - mean) for delta in deltas]
        return sum(squares[1:], squares[0]) / blocks.work.type(len(deltas))

    nonzero = 0
    if share > 0:
        nonzero = sum(
            blocks.each(lambda parts, _: int(np.count_nonzero(variance(deltas_of(parts)))))
        )
    count = int(nonzero * share)
    if count == 0:
        return lambda deltas, low: _nothing(deltas[0], low)
    (top,) = merge_blocks.largest(blocks, lambda parts: [variance(deltas_of(parts))], [(0, count)])
    return lambda deltas, low: top.mask(variance(deltas), low)
