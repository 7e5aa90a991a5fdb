"""The measurements by part, with the models and haystacks that can judge, and effects of them.

Effects are over retrieval models by seed, and over haystacks by a bootstrap. The needles of a haystack are not independent, so that
haystacks are resampled and not needles. `shuffle` makes measurements of which no claim is true.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared.claim import FEW_SEEDS, Effect
from espalier.launch.papers.snapkv import experiment, needles
from espalier.launch.papers.snapkv.needles import DIGITS
from espalier.launch.plots import intervals

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
        self, seed: int, method: str, capacity: int, lines: int = experiment.LINES
    ) -> Mapping[str, Any] | None:
        """Returns {'exact', 'tokens', 'depths'} of a method; the full cache has no capacity. None if not measured."""
        key = "accuracy" if lines == experiment.LINES else f"accuracy_{lines}"
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
    """Returns the results of each part from what `experiment.run` returns."""
    return {part: READERS[part](value) for part, value in measured.items()}


Values = dict[int, float]  # by seed, or by haystack
Measures = dict[str, list[Any]]  # part -> functions that return its effects


def over_models(runs: Retrieval, where: str, what: str, by_seed: Values, **settings: Any) -> Effect:
    """Returns an effect over retrieval models; the seeds that cannot judge are named."""
    left_out = "; ".join(f"seed {seed} {why}" for seed, why in runs.excluded.items())
    notes = [settings.pop("note", ""), f"left out: {left_out}" if left_out else ""]
    note = ", ".join(filter(None, notes))
    settings = {"seeds": FEW_SEEDS, "note": note, **settings}
    return Effect(where=where, what=what, by_seed=by_seed, **settings)


def over_haystacks(
    results: Needles, where: str, what: str, tops: Any, bottoms: Any, **settings: Any
) -> Effect:
    """Returns an effect over haystacks: the ratio of sums, with a bootstrap over haystacks."""
    tops, bottoms = np.asarray(tops, float), np.asarray(bottoms, float)
    numbers = results.of_length(needles.JUDGED.tokens)
    mean = max(float(bottoms.mean()), 1e-9)
    by_haystack = {number: float(top / mean) for number, top in zip(numbers, tops, strict=True)}
    settings = {"interval": intervals.ratio(tops, bottoms), **settings}
    place = f"{where}, {len(numbers)} haystacks of {needles.JUDGED.tokens} tokens"
    return Effect(where=place, what=what, by_seed=by_haystack, **settings)


def pair(ones: Values, others: Values, of: Callable[[float, float], float]) -> Values:
    return {seed: of(ones[seed], others[seed]) for seed in ones if seed in others}


def means(*named: tuple[str, Any]) -> str:
    """Returns the means of named values as text."""
    return ", ".join(f"{name} {np.mean(list(values)):.2f}" for name, values in named)


def compared(
    one: str, other: str, names: tuple[str, str], *, relative: bool = False, **settings: Any
) -> Measures:
    """Returns measures of the exact answers of a method less those of another at a fifth of the prompt.

    Args:
      one, other: short names of the methods.
      names: as the report has them.
      relative: whether the difference is a share of the full cache's exact answers.
      **settings: of Effect.
    """
    of = " as a share of the full cache's" if relative else ""
    what = f"exact answers, {names[0]} less {names[1]}{of}"

    def small(runs: Retrieval, where: str) -> list[Effect]:
        ones, others, full = (
            runs.exact(name, experiment.CAPACITY) for name in (one, other, "full")
        )
        gaps = pair(ones, others, lambda a, b: a - b)
        if relative:
            gaps = pair(gaps, full, lambda gap, share: gap / share)
        note = means((names[0], ones.values()), (names[1], others.values())) if ones else ""
        place = f"{where}, C = {experiment.CAPACITY}"
        return [over_models(runs, place, what, gaps, note=note, **settings)]

    def chat(results: Needles, where: str) -> list[Effect]:
        ones, others, full = (on_haystacks(results, name) for name in (one, other, "full"))
        if not (ones.size and others.size):
            return []
        bottoms = full if relative else np.ones_like(ones)
        settings_here = {"note": means((names[0], ones), (names[1], others)), **settings}
        place = f"{where}, C = {needles.JUDGED.fifth}"
        unmet = chat_unmet(results)
        return [
            over_haystacks(
                results, place, what, ones - others, bottoms, unmet=unmet, **settings_here
            )
        ]

    return {"retrieval": [small], "needles": [chat]}


def on_haystacks(results: Needles, method: str) -> np.ndarray:
    grid = needles.JUDGED
    return results.exact(grid.tokens, method, 0 if method == "full" else grid.fifth)


def chat_unmet(results: Needles) -> str:
    full = on_haystacks(results, "full")
    share = float(full.mean()) if full.size else 0.0
    return "" if share >= CHAT_BAR else f"the full cache answers {share:.2f}"


def together(*measures: Measures) -> Measures:
    """Returns the measures of several comparisons, by part."""
    return {part: [one for each in measures for one in each[part]] for part in measures[0]}


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns what `experiment.run` returns with methods, windows and questions exchanged at random within each model.

    Hit rates of the two positions of a question, which S6 says are similar, are made to differ.
    """
    out = copy.deepcopy(dict(measured))
    for model in out.get("retrieval", {}).get("models", {}).values():
        for name, one in model.items():
            if name.startswith("accuracy"):
                one["right"] = _exchanged(one["right"], rng)
        _swap(model["agnostic"], "before", "after", rng)
        _swap(model["overlaps"], "same", "different", rng)
        model["hits"]["hits"] = _moved(model["hits"]["hits"], rng)
        model["kept_first"] = [[rng.uniform() * hits, all_] for hits, all_ in model["kept_first"]]
    for haystack in out.get("needles", {}).get("haystacks", []):
        haystack["digits"] = _exchanged(haystack["digits"], rng)
        if "overlap" in haystack:  # of those that judge
            _swap(haystack["overlap"], "same", "different", rng)
            haystack["hits"] = _moved(haystack["hits"], rng)
    for batch in out.get("latency", {}).get("batches", {}).values():
        one, other = batch.values()
        repeats = len(next(iter(one.values()))["ms"])
        for at in np.flatnonzero(rng.integers(2, size=repeats)):
            for length in one:
                mine, yours = one[length]["ms"], other[length]["ms"]
                mine[at], yours[at] = yours[at], mine[at]
    return out


def _exchanged(cells: Mapping[str, Mapping[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """Returns method -> capacity -> cell with the methods exchanged; the full cache's cell is of any capacity."""
    names = list(cells)
    taken = dict(zip(names, rng.permutation(names), strict=True))

    def cell(name: str, capacity: str) -> Any:
        theirs = cells[taken[name]]
        return theirs.get(capacity) or next(iter(theirs.values()))

    return {
        name: {capacity: cell(name, capacity) for capacity in mine} for name, mine in cells.items()
    }


def _swap(cells: dict[str, Any], one: str, other: str, rng: np.random.Generator) -> None:
    if rng.integers(2):
        cells[one], cells[other] = cells[other], cells[one]


def _moved(hits_LW2: Any, rng: np.random.Generator) -> list[Any]:
    """Returns the hits with windows exchanged, alike in all layers."""
    hits = np.asarray(hits_LW2)
    return hits[:, rng.permutation(hits.shape[1])].tolist()
