"""The measurements by part, with the models and haystacks that can judge."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.snapkv import measure
from launch.papers.snapkv.haystacks import DIGITS

BAR = 0.9  # exact answers with the full cache, below which a retrieval model judges nothing
CHAT_BAR = 0.5  # of the chat model, which is not trained here
SMALL, CHAT = "retrieval model", "SmolLM2-135M"


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The retrieval models.

    Attributes:
      phases: a row for each phase of training.
      models: seed -> measurements.
    """

    phases: Sequence[Mapping[str, Any]]
    models: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> "Retrieval":
        return cls(measured["phases"], {int(seed): one for seed, one in measured["models"].items()})

    @property
    def length(self) -> int:
        """Tokens of the longest prompts."""
        return next(iter(self.models.values()))["accuracy"]["length"]

    def right(
        self, seed: int, method: str, capacity: int, lines: int = measure.LINES
    ) -> Mapping[str, Any] | None:
        """Returns {'exact', 'tokens', 'depths'} of a method; the full cache has no capacity. None if not measured."""
        key = "accuracy" if lines == measure.LINES else f"accuracy_{lines}"
        cells = self.models[seed].get(key, {}).get("right", {}).get(method, {})
        return next(iter(cells.values()), None) if method == "full" else cells.get(str(capacity))

    def exact(self, method: str, capacity: int) -> dict[int, float]:
        """Returns the share of exact answers by seed that can judge."""
        cells = {seed: self.right(seed, method, capacity) for seed in self.sound}
        return {seed: cell["exact"] for seed, cell in cells.items() if cell is not None}

    @functools.cached_property
    def excluded(self) -> dict[int, str]:
        """Seed -> why it judges nothing: its full cache does not reach BAR."""
        full = {
            seed: (self.right(seed, "full", 0) or {"exact": 0.0})["exact"] for seed in self.models
        }
        return {seed: f"answers {share:.2f}" for seed, share in full.items() if share < BAR}

    @property
    def sound(self) -> list[int]:
        return [seed for seed in self.models if seed not in self.excluded]

    @property
    def sound_at_both(self) -> list[int]:
        """The seeds that answer both positions of the question."""

        def reaches(seed: int) -> bool:
            positions = self.models[seed]["positions"].values()
            return all(shares["full"] >= BAR for shares in positions)

        return [seed for seed in self.sound if reaches(seed)]

    def window_rates(self, seed: int) -> np.ndarray:
        """Returns hit rates [layers, windows] of the prompt's last windows."""
        return rates(self.models[seed]["hits"]["hits"])

    def kept_rate(self, seed: int, question: str) -> float:
        """Returns the hit rate of what SnapKV keeps, over all layers."""
        hits, attended = np.asarray(self.models[seed][f"kept_{question}"]).sum(0)
        return float(hits / attended)


def rates(counts: Any) -> np.ndarray:
    """Returns hit rates from (hits, attended) in the last axis."""
    counts = np.asarray(counts, float)
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


@dataclasses.dataclass(frozen=True)
class Needles:
    """The chat model's answers.

    Attributes:
      candidates: results of the haystacks that choose window and kernel.
      chosen: the chosen sizes.
      haystacks: results of the others.
    """

    candidates: Sequence[Mapping[str, Any]]
    chosen: Mapping[str, int]
    haystacks: Sequence[Mapping[str, Any]]

    def of_length(self, tokens: int) -> dict[int, Mapping[str, Any]]:
        """Returns the haystacks of a length by number."""
        return {one["haystack"]: one for one in self.haystacks if one["tokens"] == tokens}

    def digits(self, tokens: int, method: str, capacity: int) -> np.ndarray:
        """Returns the right digits [haystacks, needles, 5]; none if not measured."""
        cells = [one["digits"].get(method, {}) for one in self.of_length(tokens).values()]
        right = [cell[str(capacity)] for cell in cells if str(capacity) in cell]
        return np.array(right).reshape(len(right), -1, DIGITS)

    def exact(self, tokens: int, method: str, capacity: int) -> np.ndarray:
        """Returns the share of exact answers of each haystack."""
        return self.digits(tokens, method, capacity).all(-1).mean(-1)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Decoding times.

    Attributes:
      settings: of the measurement.
      batches: batch size -> method -> length of the prompt -> numbers.
      prefill_seconds: method -> length -> seconds, at batch 1.
      longest: method -> tokens of the longest prompt within the limit of bytes.
    """

    settings: Mapping[str, Any]
    batches: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
    prefill_seconds: Mapping[str, Mapping[str, float]]
    longest: Mapping[str, int]

    def slopes(self, batch: str, method: str) -> np.ndarray:
        """Returns, for each repeat, milliseconds per token and 1,024 tokens of prompts that exceed the capacity or equal it."""
        every = self.batches[batch][method]
        cells = {int(n): cell for n, cell in every.items() if int(n) >= self.settings["capacity"]}
        at = [length / 1024 for length in cells]
        ms = np.array([cell["ms"] for cell in cells.values()])
        return np.polyfit(at, ms, 1)[0]


READERS = {
    "retrieval": Retrieval.of,
    "needles": lambda measured: Needles(**measured),
    "latency": lambda measured: Latency(**measured),
}


def read(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results of each part from what `measure.run` returns."""
    return {part: READERS[part](value) for part, value in measured.items()}
