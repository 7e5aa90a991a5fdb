"""T5's unsupervised objectives: the parts of a text that the encoder reads, and those that the decoder predicts.

Span corruption (Raffel et al., arXiv 1910.10683, section 3.1.4) has the lengths and numbers of spans of T5's
`random_spans_helper` and `random_spans_noise_mask`; the prefix language model those of its `prefix_lm`, by which
published checkpoints were adapted to language modelling.

Shapes: N tokens of a text.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from espalier.common.ranges import Fraction, Positive

# (count) -> so many random 64-bit numbers.
Draw = Callable[[int], np.ndarray]
Lengths = Mapping[str, int]


class Denoising(Protocol):
    """Splits texts into inputs and targets, neither with its end token."""

    def text_length(self, lengths: Lengths) -> int:
        """Returns the tokens of the longest text for rows of {'inputs': ..., 'targets': ...} tokens.

        Raises:
            ValueError: the rows have no room for it.
        """
        ...

    def split(
        self, tokens_N: np.ndarray, draw: Draw, first_sentinel: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (inputs, targets); sentinels are `first_sentinel`, `first_sentinel` - 1, ..."""
        ...

    def sentinels(self, length: int) -> int:
        """Returns the number of sentinels in a text of this many tokens."""
        ...

    def record(self) -> list[Any]:
        """Returns all that determines the split, as JSON."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Replaces spans by sentinels; the targets are the spans, each after its sentinel.

    Attributes:
        noise_density: share of tokens in spans.
        mean_noise_span_length: mean tokens of a span.
    """

    noise_density: Fraction = 0.15
    mean_noise_span_length: Positive = 3.0

    def text_length(self, lengths: Lengths) -> int:
        def fits(length: int) -> bool:
            inputs, targets = self._lengths(length)
            return inputs <= lengths["inputs"] and targets <= lengths["targets"]

        length = 1
        while fits(length + 1):
            length += 1
        if length == 1:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS = {dict(lengths)}: span corruption needs rows of at least 3 inputs and 3 targets."
            )
        return length

    def split(
        self, tokens_N: np.ndarray, draw: Draw, first_sentinel: int
    ) -> tuple[np.ndarray, np.ndarray]:
        noise_N = self._mask(len(tokens_N), draw)
        return (
            _with_sentinels(tokens_N, noise_N, first_sentinel),
            _with_sentinels(tokens_N, ~noise_N, first_sentinel),
        )

    def sentinels(self, length: int) -> int:
        return self._numbers(length)[1]

    def record(self) -> list[Any]:
        return ["span_corruption", self.noise_density, self.mean_noise_span_length]

    def _numbers(self, length: int) -> tuple[int, int]:
        """Returns the numbers of tokens in spans, and of spans."""
        # Of two even choices, round() takes the even number, as TensorFlow and Python do.
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = max(round(noise / self.mean_noise_span_length), 1)
        return noise, min(spans, noise, length - noise)

    def _lengths(self, length: int) -> tuple[int, int]:
        """Returns the lengths of inputs and targets, each with its end token."""
        noise, spans = self._numbers(length)
        return length - noise + spans + 1, noise + spans + 1

    def _mask(self, length: int, draw: Draw) -> np.ndarray:
        """Returns True at tokens in spans, [N]; the text begins outside of a span."""
        noise, spans = self._numbers(max(length, 2))
        # Alternately the tokens before a span, and of the span.
        sizes = np.empty(2 * spans, np.int64)
        sizes[0::2] = _segments(max(length, 2) - noise, spans, draw)
        sizes[1::2] = _segments(noise, spans, draw)
        return (np.repeat(np.arange(2 * spans), sizes) % 2 == 1)[:length]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """Cuts a text at a random place: the encoder reads what is before it, the decoder predicts the rest."""

    def text_length(self, lengths: Lengths) -> int:
        length = min(
            lengths["inputs"], lengths["targets"]
        )  # less one token, and one end token more
        if length < 2:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS = {dict(lengths)}: a prefix and its continuation need rows of at least 2."
            )
        return length

    def split(
        self, tokens_N: np.ndarray, draw: Draw, first_sentinel: int
    ) -> tuple[np.ndarray, np.ndarray]:
        del first_sentinel
        if len(tokens_N) < 2:
            return tokens_N[:0], tokens_N
        cut = 1 + int(draw(1)[0] % np.uint64(len(tokens_N) - 1))
        return tokens_N[:cut], tokens_N[cut:]

    def sentinels(self, length: int) -> int:
        del length
        return 0

    def record(self) -> list[Any]:
        return ["prefix_lm"]


def _segments(items: int, segments: int, draw: Draw) -> np.ndarray:
    """Returns the sizes of a random division of `items` into non-empty segments, all divisions equally likely."""
    ends = np.sort(np.argsort(draw(items - 1), kind="stable")[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], ends, [items]]))


def _with_sentinels(tokens_N: np.ndarray, noise_N: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Returns the tokens with each run of noise replaced by one sentinel, in descending order."""
    first_N = noise_N & ~np.concatenate([[False], noise_N[:-1]])
    sentinel_N = first_sentinel + 1 - np.cumsum(first_N)
    return np.where(first_N, sentinel_N, tokens_N)[first_N | ~noise_N]
