"""The values of a configuration, which are literals, references and macros; and its problems with their places."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from espalier.launch.input_errors import shortened

_SHOWN = 1000  # characters of a message or statement that an error shows


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a statement: a file and line, or a command-line flag (line 0)."""

    source: str
    line: int = 0
    text: str = ""

    def __str__(self):
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of a configuration: its place, the message and the remedy."""

    place: Place
    message: str
    remedy: str = ""

    def __str__(self):
        lines = [f"{shortened(str(self.place), _SHOWN)}: {shortened(self.message, _SHOWN)}"]
        if self.place.line and self.place.text.strip():
            lines.append(f"    {shortened(self.place.text.strip(), _SHOWN)}")
        if self.remedy:
            lines.append(f"  {self.remedy}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` or, evaluated, `@scope/name()`.

    Attributes:
      name: as written.
      evaluate: whether it is a call.
      target: the function or class that it means (a gin_reader.Target); None as long as it is not resolved.
    """

    name: str
    evaluate: bool
    target: Any = dataclasses.field(default=None, compare=False)

    @property
    def scope(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def selector(self) -> str:
        return self.name.rpartition("/")[2]

    def renamed(self, selector: str) -> "Reference":
        """Returns the same reference by another name of its function or class."""
        return dataclasses.replace(self, name=scoped(self.scope, selector))

    def __repr__(self):
        return f"@{self.name}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str

    @property
    def required(self) -> bool:
        return self.name in ("gin.REQUIRED", "REQUIRED")

    def __repr__(self):
        return f"%{self.name}"


def leaves(value: Any) -> Iterator[Any]:
    """Yields the literals, references and macros in a value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Returns a value with what `leaf` returns instead of each literal, reference and macro in it."""
    if isinstance(value, dict):
        return {mapped(key, leaf): mapped(item, leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, leaf) for item in value)
    return leaf(value)


def scoped(scope: str, name: str) -> str:
    """Returns `scope/name`, or `name` without a scope."""
    return f"{scope}/{name}" if scope else name
