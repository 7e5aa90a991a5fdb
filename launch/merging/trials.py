"""The search for weights of a linear merge: trials, their choice, and the part of each model.

A loss is of one domain, such as a language; lower is better. Trials are in a file, so that a search that was stopped repeats none.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.merging.settings import MergeError

LEVELS = (0.0, 0.3, 0.5, 0.7, 1.0)
_DIGITS = 6  # of normalised weights, by which trials are compared

Weights = tuple[float, ...]
# Weights -> mean loss and its standard error by domain.
Evaluate = Callable[[Weights], Mapping[str, tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Weights that sum to 1, and the loss and its standard error by domain."""

    weights: Weights
    losses: Mapping[str, float]
    errors: Mapping[str, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))

    @property
    def worst(self) -> float:
        return max(self.losses.values())


def normalised(weights: Sequence[float]) -> Weights:
    """Returns weights that sum to 1, rounded."""
    total = sum(weights)
    return tuple(round(w / total, _DIGITS) + 0.0 for w in weights)


class Trials:
    """Evaluated weights, stored in a file.

    Args:
      path: JSON lines; the first is `facts`.
      facts: the causes of the losses, such as the models and texts.
      evaluate: returns losses of new weights.
      budget: largest number of trials, those in the file included.

    Raises:
      MergeError: the file has trials of other models or texts.
    """

    def __init__(self, path: str, facts: Mapping[str, Any], evaluate: Evaluate, *, budget: int):
        self._path, self._evaluate, self.budget = path, evaluate, budget
        self.done: dict[Weights, Trial] = {}
        self.new = 0
        if not os.path.exists(path):
            self._append(facts)
            return
        lines = pathlib.Path(path).read_text("utf-8").splitlines()
        try:
            rows = [json.loads(line) for line in lines[:1]]
            if rows != [json.loads(json.dumps(facts))]:
                raise MergeError(
                    f"{path} has trials of other models, texts or settings: give another --out, or remove it."
                )
            for line in lines[1:]:
                row = json.loads(line)
                trial = Trial(tuple(row["weights"]), row["losses"], row["errors"])
                self.done[trial.weights] = trial
        except MergeError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            if len(lines) > 1 and line == lines[-1]:  # cut short when the process was killed
                text = "\n".join(lines[:-1]) + "\n"
                pathlib.Path(path).write_text(text, encoding="utf-8")
                return
            raise MergeError(f"{path} is damaged ({error}): remove it.") from None

    @property
    def spent(self) -> bool:
        return len(self.done) >= self.budget

    def __call__(self, weights: Sequence[float]) -> Trial | None:
        """Returns the trial of weights, which need not sum to 1; None if it is new and the budget is spent."""
        key = normalised(weights)
        if key not in self.done:
            if self.spent:
                return None
            results = self._evaluate(key)
            losses = {name: loss for name, (loss, _) in results.items()}
            errors = {name: error for name, (_, error) in results.items()}
            self.done[key] = Trial(key, losses, errors)
            self.new += 1
            self._append({"weights": key, "losses": losses, "errors": errors})
        return self.done[key]

    def _append(self, row: Mapping[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def coordinate(trials: Trials, count: int, *, delta: float | None) -> None:
    """Changes one weight at a time to each of LEVELS, from equal weights on, until nothing gets better."""
    current: list[float] = [1.0] * count
    if trials(current) is None:
        return
    while True:
        best = current
        for i in range(count):
            for level in LEVELS:
                candidate = [*current[:i], level, *current[i + 1 :]]
                if not sum(candidate):
                    continue
                if trials(candidate) is None:
                    return
                pair = [trials.done[normalised(x)] for x in (best, candidate)]
                if choose(pair, delta=delta) is pair[1] and pair[1].weights != pair[0].weights:
                    best = candidate
        if best is current:
            return
        current = best


def random(trials: Trials, count: int, *, seed: int) -> None:
    """Tries equal weights and then weights that are drawn uniformly, until the budget is spent."""
    rng = np.random.default_rng(seed)
    trials([1.0] * count)
    while not trials.spent:
        trials(rng.dirichlet(np.ones(count)))


def choose(trials: Sequence[Trial], *, delta: float | None) -> Trial:
    """Returns the trial with the lowest mean loss, of those whose worst loss is at most `delta` above the lowest worst one.

    Args:
      trials: in order; of equal ones the first is chosen.
      delta: None for the standard error of the lowest worst loss.
    """
    safest = min(trials, key=lambda trial: trial.worst)
    if delta is None:
        delta = safest.errors[max(safest.losses, key=safest.losses.__getitem__)]
    return min((x for x in trials if x.worst <= safest.worst + delta), key=lambda trial: trial.mean)


def best_with_table(
    trials: Trials, *, delta: float | None
) -> tuple[Trial, list[tuple[int, Trial]]]:
    """Returns the chosen trial and the trials without one of its models, which can be chosen too."""
    while True:
        best = choose(list(trials.done.values()), delta=delta)
        without = list(without_each(trials, best))
        if choose(list(trials.done.values()), delta=delta) is best:
            return best, without


def without_each(trials: Trials, best: Trial) -> Iterator[tuple[int, Trial]]:
    """Yields the trials of all models but one, beyond the budget; a model of weight 0 changes nothing."""
    trials.budget += len(best.weights)
    for i, weight in enumerate(best.weights):
        rest = [*best.weights[:i], 0.0, *best.weights[i + 1 :]]
        if not weight:
            yield i, best
        elif sum(rest):
            trial = trials(rest)
            assert trial is not None  # the budget has room
            yield i, trial


def table(names: Sequence[str], best: Trial, without: Sequence[tuple[int, Trial]]) -> list[str]:
    """Returns lines of losses by domain, and of the gain of leaving out each model: a positive number is a collision."""
    from model.transforms.base import aligned

    domains = list(best.losses)
    rows = [("", "weight", *domains, "mean", "worst")]
    losses = [f"{best.losses[domain]:.4f}" for domain in domains]
    rows.append(("merged", "", *losses, f"{best.mean:.4f}", f"{best.worst:.4f}"))
    for i, trial in without:
        gains = [f"{best.losses[x] - trial.losses[x]:+.4f}" for x in domains]
        mean, worst = best.mean - trial.mean, best.worst - trial.worst
        weight = f"{best.weights[i]:.3f}"
        rows.append((f"without {names[i]}", weight, *gains, f"{mean:+.4f}", f"{worst:+.4f}"))
    return aligned(rows, right=range(1, len(rows[0])))
