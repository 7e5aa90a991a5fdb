"""The check of arguments that have a few valid values."""

from typing import Any, get_args


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Raises ValueError if `value` is not in `choices`, a `Literal` type or a collection."""
    choices = get_args(choices) or choices
    if value not in choices:
        raise ValueError(
            f"{argument} is {value!r}; it must be one of {', '.join(map(repr, choices))}."
        )
