"""Rows of prompts, completions and conversations as records, and counts of those from which nothing can be learnt."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from espalier.data.rows import texts
from espalier.data.rows.texts import Text
from espalier.data.text.documents import DataError

_NOT_FOR_KWARGS = ("messages", "tools", "add_generation_prompt", "name")


class DegenerateError(ValueError):
    """Raised for a well-formed row that teaches nothing; it is counted under `reason`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Record:
    """A pair, or one completion with its label."""

    where: str  # file and line, for errors
    id: str  # name of the record in caches and reports
    prompt: Text  # a text, or messages
    # chosen and rejected, or a single completion; texts or messages, like the prompt
    completions: tuple[Text, ...]
    label: bool | None = None  # whether a single completion is desirable; None for a pair
    margin: float = 0.0  # margin of a pair; 0 if the row has none
    # variables of the chat template besides the messages
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def prompt_text(self) -> str:
        """Returns the prompt as one string, the same for equal prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return json.dumps(self.prompt, ensure_ascii=False, sort_keys=True)

    @property
    def has_invisible(self) -> bool:
        """Returns whether a text of the record has characters without a glyph."""
        parts = texts.strings([self.prompt, *self.completions])
        return any(not texts.INVISIBLE.isdisjoint(part) for part in parts)

    def unpaired(self) -> tuple["Record", ...]:
        """Returns the two completions of a pair as labelled records; the record itself if it has a label."""
        if self.label is not None:
            return (self,)
        return tuple(
            dataclasses.replace(
                self, id=f"{self.id}/{name}", completions=(text,), label=label, margin=0.0
            )
            for name, text, label in zip(
                ("chosen", "rejected"), self.completions, (True, False), strict=True
            )
        )


class Tally(dict[str, dict[str, Any]]):
    """Counts of events during reading: reason -> {'rows': number of rows, 'first': place of the first one}."""

    def add(self, reason: str, where: str) -> None:
        self.setdefault(reason, {"rows": 0, "first": where})["rows"] += 1

    def __str__(self) -> str:
        return ", ".join(
            f"{x['rows']:,} {reason} (first: {x['first']})" for reason, x in self.items()
        )


def template_variables(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the variables of the chat template besides the messages: the row's "tools" and "chat_template_kwargs"."""
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):  # typed columns of data sets hold tools as JSON
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}: 'tools' is a text that is not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' holds a {type(tools).__name__}; give a list of schemas")
    if variables is not None and not isinstance(variables, dict):
        raise DataError(
            f"{where}: 'chat_template_kwargs' holds a {type(variables).__name__}; give an object"
        )
    if taken := sorted(set(variables or {}) & set(_NOT_FOR_KWARGS)):
        raise DataError(
            f"{where}: 'chat_template_kwargs' sets {', '.join(map(repr, taken))}, which other keys of the "
            "row determine; remove it"
        )
    # A column without a value in this row is null.
    present = {key: value for key, value in (variables or {}).items() if value is not None}
    return {**present, **({"tools": tools} if tools else {})}
