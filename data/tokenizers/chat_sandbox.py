"""Renders chat templates in a child process with limits of time and memory.

A template is a program. It runs in jinja2's sandbox (data/tokenizers/chat_renderer.py) in a process of its own
(data/limited_process.py), so that whatever it does ends, and its memory is not this process's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from espalier.data.limited_process import LimitedProcess, LimitError

MAX_SOURCE = 1 << 20  # bytes of a template
MAX_STEPS = 1_000_000  # total length of all `range` calls of one rendering
MAX_LENGTH = 10_000_000  # characters of a rendered conversation
CPU_SECONDS = 3.0  # of compiling a template and rendering one conversation
WALL_SECONDS = 20.0
MEMORY_BYTES = 512 << 20

_process = LimitedProcess(
    "espalier.data.tokenizers.chat_renderer:answer", memory_bytes=MEMORY_BYTES
)


class RenderError(ValueError):
    """A template that fails, refuses the conversation, or exceeds a limit."""


@dataclasses.dataclass(frozen=True)
class Written:
    """The control tokens of a text, which may also have their spellings as text.

    Attributes:
      tokens: the spellings of all control tokens.
      places: (start, end) in characters of those that are tokens; all others are text.
      spelled: whether there are others.
    """

    tokens: frozenset[str]
    places: tuple[tuple[int, int], ...]
    spelled: bool


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    text: str  # the whole text
    # (start, end) in characters of each assistant text, marked by `{% generation %}`; None if the template changes
    # or removes a text after that
    spans: tuple[tuple[int, int], ...] | None
    # the template's control tokens; None if every spelling in the text is a control token
    written: Written | None = None

    def after(self, start: int) -> "Rendered":
        """Returns what follows the first `start` characters, without spans."""
        written = self.written
        if written is not None:
            places = tuple((a - start, b - start) for a, b in written.places if a >= start)
            written = dataclasses.replace(written, places=places)
        return Rendered(self.text[start:], None, written)


def render(source: str, values: Mapping[str, Any]) -> Rendered:
    """Renders a template from its jinja2 source and its variables, which are JSON values.

    Raises:
      RenderError: the template fails, refuses the conversation, or exceeds a limit.
    """
    if len(source) > MAX_SOURCE:
        raise RenderError(f"it is longer than {MAX_SOURCE:,} characters")
    try:
        answer = _process.call(
            {"source": source, "values": values},
            cpu_seconds=CPU_SECONDS,
            wall_seconds=WALL_SECONDS,
        )
    except LimitError as error:
        raise RenderError(f"the template {error} to render a conversation") from None
    if "error" in answer:
        raise RenderError(answer["error"])
    spans = answer["spans"]
    return Rendered(answer["text"], None if spans is None else tuple(map(tuple, spans)))
