"""The search for weights of a merge: trials, their choice, and the part of each model.

A loss is of one domain, such as a language; lower is better. Domains have unlike entropy, so a loss is compared as its ratio to that
of the best single model in the domain. Of scores, higher is better, and they may be negative: one is compared as the gap between it
and that of the best single model. Trials are in a file, so that a search that was stopped repeats none.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.inference import row_files
from espalier.launch.merge.settings import MergeError

LEVELS = (0.0, 0.3, 0.5, 0.7, 1.0)
_DIGITS = 6  # of weights, by which trials are compared
_LEAST = 1e-6  # nats: a smaller loss is no measure of others

Weights = tuple[float, ...]
Losses = Mapping[str, float]  # by domain
# Weights -> mean loss and its standard error by domain.
Evaluate = Callable[[Weights], Mapping[str, tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """The weights of a merge, and its loss and standard error by domain.

    With `higher`, the losses are scores, of which higher is better, and what is called a ratio is a gap.
    """

    weights: Weights
    losses: Mapping[str, float]
    errors: Mapping[str, float]
    higher: bool = False

    def ratios(self, single: Losses) -> dict[str, float]:
        """Returns the losses over those of the best single model by domain, or what scores are below its scores."""
        if self.higher:
            return {name: single[name] - score for name, score in self.losses.items()}
        return {name: loss / max(single[name], _LEAST) for name, loss in self.losses.items()}

    def mean(self, single: Losses) -> float:
        """Returns the mean ratio over domains."""
        return float(np.mean(list(self.ratios(single).values())))

    def worst(self, single: Losses) -> float:
        """Returns the largest ratio of a domain."""
        return max(self.ratios(single).values())


class Trials:
    """Evaluated weights, stored in a file.

    Args:
      path: JSON lines; the first is `facts`.
      facts: the causes of the losses, such as the models and texts.
      evaluate: returns losses of new weights.
      budget: largest number of trials, those in the file included.
      higher: whether they are scores, see `Trial`.
      absolute: whether weights with the same ratios but another sum are another merge; by default they are scaled to sum to 1.

    Raises:
      MergeError: the file has trials of other models or texts.
    """

    def __init__(
        self,
        path: str,
        facts: Mapping[str, Any],
        evaluate: Evaluate,
        *,
        budget: int,
        higher: bool = False,
        absolute: bool = False,
    ):
        self._path, self._evaluate, self.budget, self._higher = path, evaluate, budget, higher
        self.absolute = absolute
        self.done: dict[Weights, Trial] = {}
        self.new = 0
        with row_files.resumed(path, sync=True) as file:
            if not file.rows:
                file.add(facts)
                return
            (_, first), *rest = file.rows
        if first != json.loads(json.dumps(facts)):
            raise MergeError(
                f"{path} has trials of other models, texts or settings: give another --out, or remove it."
            )
        try:
            for _, row in rest:
                trial = Trial(tuple(row["weights"]), row["losses"], row["errors"], higher)
                self.done[trial.weights] = trial
        except (KeyError, TypeError) as error:
            raise MergeError(f"{path} is damaged ({error}): remove it.") from None

    @property
    def spent(self) -> bool:
        return len(self.done) >= self.budget

    def key(self, weights: Sequence[float]) -> Weights:
        """Returns the weights of a trial, rounded; they sum to 1 unless they are absolute."""
        total = 1.0 if self.absolute else sum(weights)
        return tuple(round(w / total, _DIGITS) + 0.0 for w in weights)

    def __call__(self, weights: Sequence[float]) -> Trial | None:
        """Returns the trial of weights; None if it is new and the budget is spent."""
        key = self.key(weights)
        if key not in self.done:
            if self.spent:
                return None
            results = self._evaluate(key)
            # A merge whose loss is not a number is the worst one.
            worst = -math.inf if self._higher else math.inf
            losses = {x: loss if math.isfinite(loss) else worst for x, (loss, _) in results.items()}
            errors = {
                x: error if math.isfinite(error) else 0.0 for x, (_, error) in results.items()
            }
            self.done[key] = Trial(key, losses, errors, self._higher)
            self.new += 1
            shown = " ".join(f"{weight:.3g}" for weight in key)
            parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            print(f"trial {len(self.done)}, weights {shown}: {parts}", file=sys.stderr, flush=True)
            with row_files.resumed(self._path, sync=True) as file:
                file.add({"weights": key, "losses": losses, "errors": errors})
        return self.done[key]


def frontier(trials: Sequence[Trial], first: str, second: str) -> list[Trial]:
    """Returns the trials that no other dominates in two domains, from the best in the first to the best in the second.

    A trial dominates another if it is at least as good in both domains, and better in one.
    """

    def losses(trial: Trial) -> tuple[float, float]:
        sign = -1 if trial.higher else 1
        return sign * trial.losses[first], sign * trial.losses[second]

    chosen: list[Trial] = []
    for trial in sorted(trials, key=losses):
        last = losses(chosen[-1]) if chosen else None
        if last is None or losses(trial)[1] < last[1] or losses(trial) == last:
            chosen.append(trial)
    return chosen


def best_single(alone: Sequence[Trial]) -> Losses:
    """Returns the lowest loss of a single model, by domain; of scores, the highest. Raises MergeError if no model has a number."""
    best = max if alone[0].higher else min
    single = {name: best(trial.losses[name] for trial in alone) for name in alone[0].losses}
    if without := [name for name, loss in single.items() if not math.isfinite(loss)]:
        raise MergeError(
            f"{without[0]}: the loss of every model alone is not a number: give other texts or models."
        )
    return single


def begin(trials: Trials, count: int) -> tuple[Trial, list[Trial]]:
    """Returns the trials of equal weights and of each single model, which do not count against the budget."""
    trials.budget += count + 1
    first, *alone = (trials(row) for row in [[1.0] * count, *np.eye(count).tolist()])
    assert first is not None  # the budget has room
    return first, [trial for trial in alone if trial is not None]


def coordinate(trials: Trials, count: int, *, delta: float | None, single: Losses) -> None:
    """Changes one weight at a time to each of LEVELS, from equal weights on, until nothing gets better.

    Absolute weights that are equal are first tried at each of LEVELS.
    """
    best: list[float] = [1.0] * count
    candidates = [[level] * count for level in reversed(LEVELS)] if trials.absolute else [best]
    begun: set[Weights] = set()
    while True:
        for candidate in candidates:
            if not any(candidate):
                continue
            if trials(candidate) is None:
                return
            pair = [trials.done[trials.key(x)] for x in (best, candidate)]
            better = choose(pair, delta=delta, single=single) is pair[1]
            if better and pair[1] is not pair[0]:
                best = candidate
        if trials.key(best) in begun:  # nothing was better, or the choices go in a circle
            return
        begun.add(trials.key(best))
        candidates = [[*best[:i], level, *best[i + 1 :]] for i in range(count) for level in LEVELS]


def random(trials: Trials, count: int, *, seed: int) -> None:
    """Tries equal weights and then weights that are drawn uniformly, until the budget is spent.

    Absolute weights are drawn from 0 to 1, others from all that sum to 1.
    """
    rng = np.random.default_rng(seed)
    trials([1.0] * count)
    while not trials.spent:
        trials(rng.uniform(size=count) if trials.absolute else rng.dirichlet(np.ones(count)))


def choose(trials: Sequence[Trial], *, delta: float | None, single: Losses) -> Trial:
    """Returns the trial with the lowest mean ratio among trials with a worst ratio at most `delta` above the lowest worst one.

    Args:
      trials: in order; of equal ones the first is chosen.
      delta: a share of the best single model's loss, or a difference of scores; None for the standard error of the lowest worst ratio.
      single: losses of the best single model by domain.
    """
    safest = min(trials, key=lambda trial: trial.worst(single))
    if delta is None:
        ratios = safest.ratios(single)
        domain = max(ratios, key=ratios.__getitem__)
        unit = 1.0 if safest.higher else max(single[domain], _LEAST)
        delta = safest.errors[domain] / unit
    most = safest.worst(single) + delta
    near = (trial for trial in trials if trial.worst(single) <= most)
    return min(near, key=lambda trial: trial.mean(single))


def best_with_table(
    trials: Trials, *, delta: float | None, single: Losses
) -> tuple[Trial, list[tuple[int, Trial]]]:
    """Returns the chosen trial and the trials without one of its models, which can be chosen too."""
    while True:
        best = choose(list(trials.done.values()), delta=delta, single=single)
        without = list(without_each(trials, best))
        if choose(list(trials.done.values()), delta=delta, single=single) is best:
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


def table(
    names: Sequence[str],
    best: Trial,
    equal: Trial,
    alone: Sequence[Trial],
    without: Sequence[tuple[int, Trial]],
) -> list[str]:
    """Returns lines of losses by domain, of the gain of leaving out each model, and warnings of models with the weight 0.

    A positive gain is a collision.
    """
    from espalier.model.transforms.base import aligned

    domains, single = list(best.losses), best_single(alone)
    word, sign = ("gap", -1) if best.higher else ("ratio", 1)
    rows = [("", "weight", *domains, f"mean {word}", f"worst {word}")]
    singles = [(f"{name} alone", trial) for name, trial in zip(names, alone, strict=True)]
    for title, trial in (("merged", best), ("equal weights", equal), *singles):
        ratios = [f"{ratio:.4f}" for ratio in (trial.mean(single), trial.worst(single))]
        rows.append((title, "", *(f"{trial.losses[x]:.4f}" for x in domains), *ratios))
    for i, trial in without:
        gains = [f"{sign * (best.losses[x] - trial.losses[x]):+.4f}" for x in domains]
        mean = best.mean(single) - trial.mean(single)
        worst = best.worst(single) - trial.worst(single)
        weight = f"{best.weights[i]:.3f}"
        rows.append((f"without {names[i]}", weight, *gains, f"{mean:+.4f}", f"{worst:+.4f}"))
    absent = [name for name, weight in zip(names, best.weights, strict=True) if not weight]
    warning = (
        f"warning: {', '.join(absent)} got the weight 0 and would be no part of the merge: compare the losses with those of equal "
        "weights, and set the weights in merge.yml yourself if these serve you better."
    )
    return [*aligned(rows, right=range(1, len(rows[0]))), *([warning] if absent else [])]


def frontier_table(
    names: Sequence[str], some: Sequence[Trial], best: Trial, lower: Collection[str] = ()
) -> list[str]:
    """Returns lines of the weights and numbers of a frontier's trials; numbers of domains in `lower` were negated."""
    from espalier.model.transforms.base import aligned

    domains = list(best.losses)
    rows = [("frontier", *names, *domains)]
    for trial in some:
        weights = [f"{weight:.3f}" for weight in trial.weights]
        numbers = [f"{_shown(trial, domain, lower):.4f}" for domain in domains]
        rows.append(("merged" if trial is best else "", *weights, *numbers))
    return aligned(rows, right=range(1, len(rows[0])))


def plot_frontier(
    path: pathlib.Path,
    trials: Sequence[Trial],
    some: Sequence[Trial],
    best: Trial,
    alone: Mapping[str, Trial],
    lower: Collection[str] = (),
) -> None:
    """Writes a figure of all trials by two domains, and of the trials on their frontier as a line."""
    from espalier.launch.plots import panels

    figure, (axes,) = panels.panels(1, (6.0, 4.2))
    domains = list(best.losses)

    def draw(which: Sequence[Trial], style: str, colour: str, label: str, **more: Any) -> None:
        places = [[_shown(trial, domain, lower) for trial in which] for domain in domains]
        axes.plot(*places, style, color=colour, label=label, **more)

    draw(trials, "o", panels.GREY, "merges", ms=4, alpha=0.5)
    draw(some, "o-", panels.BLUE, "frontier", ms=5)
    draw([best], "*", panels.ORANGE, "chosen", ms=13)
    for name, trial in alone.items():
        place = tuple(_shown(trial, domain, lower) for domain in domains)
        axes.annotate(name, place, xytext=(6, 6), textcoords="offset points", fontsize=8)
    for domain, name in zip(domains, (axes.set_xlabel, axes.set_ylabel), strict=True):
        better = "higher" if best.higher and domain not in lower else "lower"
        name(f"{domain} ({better} is better)")
    axes.margins(0.12)  # for the names of models
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=panels.DPI)


def _shown(trial: Trial, domain: str, lower: Collection[str]) -> float:
    """Returns the number of a domain as its measure has it."""
    return (-1 if domain in lower else 1) * trial.losses[domain] + 0.0
