"""Functions and classes of users' modules that have gin's own decorator.

`@gin.configurable` reads gin's own state, also where a user's code calls the function itself. The bindings of such functions
are therefore given to gin, and no others: without them, nothing of this project changes gin's state.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import gin

from espalier.launch.config.gin_reader import Target

_given = False  # whether gin has bindings of the last configuration


def is_decorated(target: Target) -> bool:
    """Returns whether gin's own decorator was applied to a function or class."""
    if target.value in (gin.config.macro, gin.config.singleton):
        return False
    try:
        gin.get_configurable(target.value)
    except (TypeError, ValueError):  # no hash, or not registered
        return False
    return True


def give(bindings: Sequence[tuple[str, Target, str, Callable[[], Any]]]) -> None:
    """Gives gin the bindings of a configuration, in place of those of the last one.

    Args:
      bindings: (scope, decorated function or class, argument, a function that returns the value).

    Raises:
      ValueError: the decorator excludes the argument.
    """
    global _given
    if bindings or _given:
        gin.clear_config()
    _given = bool(bindings)
    for scope, target, argument, value in bindings:
        name = f"{target.value.__module__}.{target.value.__qualname__}"
        with gin.unlock_config():
            gin.bind_parameter((scope, name, argument), _Late(value))


class _Late:
    """A value that is made when gin passes it to a call: gin passes a deep copy of what is bound."""

    def __init__(self, value: Callable[[], Any]):
        self._value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._value()


def scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """Context manager in which gin has a scope too, if it has bindings."""
    if not _given:
        return contextlib.nullcontext()
    return gin.config_scope(name.split("/") if name else None)
