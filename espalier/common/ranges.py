"""What code declares for the configuration: ranges of numbers, choices, arguments of factories, parts that a model's record may name.

A number's range is declared with its type, `beta: Positive = 0.1`. The check of configurations reads it
(launch/config/parameters.py): a value of a gin file that lies outside is an error before any work. Python does not check it.

Whether a value has an effect may depend on others: `refuse_set` is for settings that would be ignored.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args

from annotated_types import Ge, Gt, Interval

# Integers. The programs count in 32 bits.
Size = Annotated[int, Interval(ge=1, lt=2**31)]
Layers = Annotated[int, Interval(ge=1, le=10_000)]  # each is traced
Count = Annotated[int, Interval(ge=0, lt=2**31)]
Amount = Annotated[int, Interval(ge=1, lt=2**63)]  # of bytes or tokens of data
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
AxisSize = Annotated[int, Interval(ge=-1, lt=2**31)]  # of a mesh; -1 for the remaining devices

# Floats. The programs compute in 32 bits, so that larger numbers than theirs are refused for all.
Finite = Annotated[float, Interval()]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Resemblance = Annotated[float, Interval(ge=0.5, le=1)]  # data.text.dedup misses pairs of less
Decay = Annotated[float, Interval(ge=0, lt=1)]  # of a moving average
Tokens = Annotated[float, Interval(ge=1, le=1e18)]

_Part = TypeVar("_Part")


class CalledWith:
    """Declares the keywords that a factory is called with: `head: Annotated[Callable[..., Any], CalledWith("features")]`.

    A binding of such an argument would have no effect, so the check of configurations refuses it. It reads these keywords from
    the calls in the source of a field's owner; a field is declared in this way if other code calls the factory.
    """

    def __init__(self, *names: str):
        self.names = names


def recordable(part: _Part) -> _Part:
    """Marks a class or function that a run's model.json may name, as `<module>.<name>` (launch/config/model_file.py).

    It builds a part of a model or a number from its arguments, and neither reads or writes files nor starts anything. Files and
    names that runs have recorded stay.
    """
    return part


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Raises ValueError if `value` is not in `choices`, a `Literal` type or a collection."""
    choices = get_args(choices) or choices
    if value not in choices:
        raise ValueError(
            f"{argument} is {value!r}; it must be one of {', '.join(map(repr, choices))}."
        )


def refuse_set(settings: Any, names: Sequence[str], because: str) -> None:
    """Raises ValueError if a dataclass has another value than the default in a field that nothing reads.

    Args:
      settings: the instance of a dataclass.
      names: fields that have no effect.
      because: the setting for which they have none, such as "scaling = 'none'".
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != field.default:
            name = f"{type(settings).__name__}.{field.name}"
            raise ValueError(
                f"{name} = {value!r} has no effect with {because}: remove one of the two."
            )
