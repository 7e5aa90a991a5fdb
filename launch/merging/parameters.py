"""The value of a parameter for a tensor."""

from collections.abc import Sequence
from typing import Any

from launch.merging.settings import Condition
from model.transforms.merge import Job
from model.transforms.merge_methods import METHODS


def problem_of(job: Job) -> str | None:
    """Returns the problem of a job's parameters, such as weights that cancel out; None if there is none."""
    values = job.values
    weights = values.get("weight")
    divides = values.get("normalize_weights") or (job.method == "linear" and values["normalize"])
    if weights and divides and abs(sum(weights)) < 1e-12:
        return (
            "the weights sum to 0, by which they are normalised: change them, or do not normalise."
        )
    if METHODS[job.method].random and "epsilon" in values:
        for d, eps in zip(values["density"], values["epsilon"], strict=True):
            if 0 < d < 1 and not (d - eps > 0 and d + eps < 1):
                return (
                    f"density {d:g} with epsilon {eps:g} leaves (0, 1): choose a smaller epsilon."
                )
    return None


def evaluate(
    conditions: Sequence[Condition], names: Sequence[str], u: float, *, outside: bool = False
) -> Any:
    """Returns the value of the first condition that matches a tensor; None if none does.

    A list of numbers is interpolated at u from 0 (its first value) to 1 (its last), and of other values the entry is taken.
    """
    for condition in conditions:
        if condition.matches(names):
            if outside and condition.non_layer is not None:
                return condition.non_layer
            value = condition.value
            if not isinstance(value, list):
                return value
            if any(isinstance(x, bool | str) for x in value):
                return value[int(u * (len(value) - 1))]
            place = u * (len(value) - 1)
            low = int(place)
            high = min(len(value) - 1, low + 1)
            return (1 - (place - low)) * value[low] + (place - low) * value[high]
    return None
