"""The measurements by part, with the models and haystacks that can judge, and effects of them.

Effects are numbers by seed of a retrieval model, by haystack or by context of the chat model, and by process of the time of decoding:
what is asked of one of these is not independent, so that it counts once. `shuffle` makes measurements of which no claim is true.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.papers.snapkv import experiment, needles, sentences
from espalier.launch.papers.snapkv.needles import DIGITS

BAR = 0.9  # exact answers with the full cache, below which a retrieval model judges nothing
CHAT_BAR = 0.4  # of the chat model, which is not trained here
WORTH = 0.5  # nats per token that a context must be worth to an answer
SMALL, CHAT = "retrieval model", "SmolLM2-135M"
PLACES = {
    "retrieval": f"{SMALL}, C = {experiment.CAPACITY}",
    "needles": f"{CHAT}, numbers, C = {needles.CAPACITY}",
    "sentences": f"{CHAT}, sentences, C = {sentences.MAIN.capacity}",
    "latency": "random weights, 4 layers",
}


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


Case = str | tuple[str, int]  # a method, at the capacity where all are compared or at another
Values = dict[int, float]  # by seed, haystack or context
LOSS, EXACT, OVERLAP = "loss", "exact answers", "ROUGE-L"
UNITS = {LOSS: "nats per token", EXACT: "", OVERLAP: ""}


def _later(losses: Sequence[Sequence[float]]) -> float:
    """Returns the mean over answers of their mean loss from the second token on: the first follows from the whole prompt."""
    return float(np.mean([np.mean(one[1:]) for one in losses]))


@dataclasses.dataclass(frozen=True)
class Needles:
    """The chat model's answers of numbers, by haystack."""

    haystacks: Sequence[Mapping[str, Any]]

    def digits(self, case: Case) -> np.ndarray:
        """Returns the right digits [haystacks, needles, 5] of a method; none if not measured."""
        cells = [self._cell(one, "digits", case) for one in self.haystacks]
        right = [cell for cell in cells if cell is not None]
        return np.array(right).reshape(len(right), -1, DIGITS)

    def scores(self, score: str, case: Case) -> Values:
        """Returns the mean of LOSS or EXACT by haystack."""
        key, of = ("losses", _later) if score == LOSS else ("digits", _exact)
        cells = {one["haystack"]: self._cell(one, key, case) for one in self.haystacks}
        return {number: of(cell) for number, cell in cells.items() if cell is not None}

    def _cell(self, one: Mapping[str, Any], key: str, case: Case) -> Any:
        name, capacity = (case, needles.CAPACITY) if isinstance(case, str) else case
        return one[key].get(name, {}).get("0" if name == "full" else str(capacity))

    @property
    def unmet(self) -> str:
        """Why it judges nothing: the full cache does not reach CHAT_BAR."""
        full = list(self.scores(EXACT, "full").values())
        share = float(np.mean(full)) if full else 0.0
        return "" if share >= CHAT_BAR else f"the full cache answers {share:.2f}"


def _exact(digits: Any) -> float:
    return float(np.all(digits, axis=-1).mean())


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The chat model's answers of sentences, by context."""

    contexts: Sequence[Mapping[str, Any]]

    def of(self, size: sentences.Size) -> dict[int, Mapping[str, Any]]:
        """Returns the contexts of a length by number."""
        return {one["context"]: one for one in self.contexts if one["size"] == size.tokens}

    def scores(self, score: str, name: str, size: sentences.Size = sentences.MAIN) -> Values:
        """Returns the mean of LOSS or OVERLAP by context; the method 'none' is without any context."""
        key, of = ("losses", _later) if score == LOSS else ("overlaps", np.mean)
        return {
            n: float(of(one[key][name])) for n, one in self.of(size).items() if name in one[key]
        }

    def kept(self, name: str, size: sentences.Size = sentences.MAIN) -> Values:
        """Returns the share of what the whole context is worth to the loss that a method keeps, by context."""
        none, full = self.scores(LOSS, "none", size), self.scores(LOSS, "full", size)
        mine = self.scores(LOSS, name, size)
        return {n: (none[n] - loss) / (none[n] - full[n]) for n, loss in mine.items()}

    @property
    def unmet(self) -> str:
        """Why it judges nothing: the context is worth less than WORTH to the full cache."""
        none, full = (list(self.scores(LOSS, name).values()) for name in ("none", "full"))
        worth = float(np.mean(none) - np.mean(full)) if full else 0.0
        return "" if worth >= WORTH else f"a context is worth {worth:.2f} nats per token"


@dataclasses.dataclass(frozen=True)
class Latency:
    """Decoding times.

    Attributes:
      settings: of the measurement.
      batches: batch size -> method -> length of the prompt -> numbers.
      prefill_seconds: method -> length -> seconds, at batch 1.
      longest: method -> tokens of the longest prompt within the limit of bytes.
      seconds: that each process took.
    """

    settings: Mapping[str, Any]
    batches: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
    prefill_seconds: Mapping[str, Mapping[str, float]]
    longest: Mapping[str, int]
    seconds: Sequence[float] = ()

    def slopes(self, batch: str, method: str) -> np.ndarray:
        """Returns, for each process, milliseconds per token and 1,024 tokens of prompts that exceed the capacity or equal it."""
        every = self.batches[batch][method]
        cells = {int(n): cell for n, cell in every.items() if int(n) >= self.settings["capacity"]}
        at = [length / 1024 for length in cells]
        ms = np.array([cell["ms"] for cell in cells.values()])
        return np.polyfit(at, ms, 1)[0]


READERS = {
    "retrieval": Retrieval.of,
    "needles": Needles,
    "sentences": Sentences,
    "latency": lambda measured: Latency(**measured),
}


def read(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results of each part from what `experiment.run` returns."""
    return {part: READERS[part](value) for part, value in measured.items()}


def over_models(runs: Retrieval, where: str, what: str, by_seed: Values, **settings: Any) -> Effect:
    """Returns an effect over retrieval models; the seeds that cannot judge are named."""
    left_out = "; ".join(f"seed {seed} {why}" for seed, why in runs.excluded.items())
    notes = [settings.pop("note", ""), f"left out: {left_out}" if left_out else ""]
    note = ", ".join(filter(None, notes))
    return Effect(where=where, what=what, by_seed=by_seed, note=note, **settings)


def pair(ones: Values, others: Values, of: Callable[[float, float], float]) -> Values:
    return {seed: of(ones[seed], others[seed]) for seed in ones if seed in others}


def less(ones: Values, others: Values) -> Values:
    return pair(ones, others, lambda a, b: a - b)


def means(*named: tuple[str, Any]) -> str:
    """Returns the means of named values as text."""
    return ", ".join(f"{name} {np.mean(list(values)):.2f}" for name, values in named)


LABELS = {
    "full": "full cache",
    "snapkv": "SnapKV",
    "kernel_7": "SnapKV with a kernel of 7",
    "kernel_1": "SnapKV without pooling",
    "window_1": "SnapKV with a window of 1",
    sentences.PAPER: "SnapKV with a kernel of 7",
    sentences.WIDE: "SnapKV with a kernel of 63",
    "snapkv_1": "SnapKV without pooling",
    "h2o": "H2O",
    "h2o_4": "H2O with 4 C",
    ("h2o", 4 * needles.CAPACITY): "H2O with 4 C",
    "tova": "TOVA",
    "streaming_llm": "StreamingLLM",
    "random": "a random choice",
    "before": "SnapKV before the question",
    "none": "no context",
}


def models_gain(one: str, other: str) -> Measure:
    """Returns a measure of the exact answers of a method minus those of another, over retrieval models."""

    def measure(runs: Retrieval, where: str) -> list[Effect]:
        scores = {name: runs.exact(name, experiment.CAPACITY) for name in (one, other)}
        if not all(scores.values()):
            return []
        what = f"{EXACT}, {LABELS[one]} minus {LABELS[other]}"
        note = means(*((LABELS[name], values.values()) for name, values in scores.items()))
        return [over_models(runs, where, what, less(*scores.values()), note=note)]

    return measure


def chat_gain(score: str, one: Case, other: Case, *size: sentences.Size) -> Measure:
    """Returns a measure of how much better a score of the chat model is with a method than with another.

    Args:
      score: LOSS, EXACT (of numbers) or OVERLAP (of sentences).
      one, other: the methods: the effect is positive where the first is better.
      *size: of sentences, if not the main one.
    """

    def measure(results: Needles | Sentences, where: str) -> list[Effect]:
        scores = [results.scores(score, case, *size) for case in (one, other)]
        if not all(scores):
            return []
        gaps = less(*(scores[::-1] if score == LOSS else scores))
        labels = [LABELS[case] for case in (one, other)]
        note = ", ".join(
            f"{label} {np.mean(list(values.values())):.3f}"
            for label, values in zip(labels, scores, strict=True)
        )
        place = where + "".join(f", {one.tokens:,} tokens, C = {one.capacity:,}" for one in size)
        what = f"{score}, gain of {labels[0]} over {labels[1]}"
        facts = {"unit": UNITS[score], "note": note, "unmet": results.unmet}
        return [Effect(where=place, what=what, by_seed=gaps, **facts)]

    return measure


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
    for haystack in out.get("needles", []):
        haystack["digits"] = _exchanged(haystack["digits"], rng)
        haystack["losses"] = _exchanged(haystack["losses"], rng)
        _swap(haystack["overlap"], "same", "different", rng)
        haystack["hits"] = _moved(haystack["hits"], rng)
    for context in out.get("sentences", []):
        taken = _permuted(context["losses"], rng)
        context["losses"] = {name: context["losses"][other] for name, other in taken.items()}
        taken = _permuted(context["overlaps"], rng)
        context["overlaps"] = {name: context["overlaps"][other] for name, other in taken.items()}
    for batch in out.get("latency", {}).get("batches", {}).values():
        one, other = batch.values()
        processes = len(next(iter(one.values()))["ms"])
        for at in np.flatnonzero(rng.integers(2, size=processes)):
            for length in one:
                mine, yours = one[length]["ms"], other[length]["ms"]
                mine[at], yours[at] = yours[at], mine[at]
    return out


def _permuted(names: Mapping[str, Any], rng: np.random.Generator) -> dict[str, str]:
    return dict(zip(names, rng.permutation(list(names)).tolist(), strict=True))


def _exchanged(cells: Mapping[str, Mapping[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """Returns method -> capacity -> cell with the methods exchanged; one that has not the capacity lends its first cell."""
    taken = _permuted(cells, rng)

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
