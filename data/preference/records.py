"""Parses and checks rows of preference data in the formats of TRL.

    {"prompt": ..., "chosen": ..., "rejected": ...}          a pair
    {"chosen": ..., "rejected": ...}                         a pair; the common beginning is the prompt
    {"prompt": ..., "completion": ..., "label": true}        one completion, desirable or not

Prompt and completions are texts, or lists of messages {"role", "content"}. With messages, "tools" and
"chat_template_kwargs" are passed to the chat template. A pair may have a "margin": a number, how much better
the chosen completion is. Other keys are ignored.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from espalier.data.preference import texts
from espalier.data.preference.texts import Text
from espalier.data.text.documents import DataError

# Part of the digest of a source: raise it when the same rows are read as other records.
VERSION = 2
Kind = Literal["paired", "unpaired"]
PAIR = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
EXAMPLE = '{"prompt": "...", "completion": "...", "label": true}'

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


def parse(row: Mapping[str, Any], where: str, id: str) -> Record:
    """Returns a row of JSON as a record.

    Raises:
      DataError: the row is malformed; the message names place, key and remedy.
      DegenerateError: a completion is empty, a pair's completions are the same, or a pair has no prompt.
    """
    paired = "chosen" in row or "completion" not in row
    names = ("chosen", "rejected") if paired else ("completion",)
    for name in (*names, *(() if paired else ("prompt", "label"))):
        if name not in row:
            raise DataError(
                f"{where}: no key {name!r}; present are {', '.join(map(repr, row)) or 'none'}. A row is "
                f"{PAIR} or {EXAMPLE}; rename its keys"
            )
    for name in ("prompt", *names, "tools", "chat_template_kwargs"):
        texts.check_unicode(row.get(name), name, where)
    completions = tuple(texts.text_of(row[name], name, where) for name in names)
    chat = not isinstance(completions[0], str)
    if any(isinstance(text, str) == chat for text in completions):
        raise DataError(
            f"{where}: one of 'chosen' and 'rejected' is a text, the other has messages"
        )
    prompt = None if row.get("prompt") is None else texts.text_of(row["prompt"], "prompt", where)
    # Sets of conversations often repeat their first message as a text under "prompt".
    repeats = paired and chat and isinstance(prompt, str)
    if prompt is None or repeats:
        if not paired:
            raise DataError(
                f"{where}: 'prompt' is null. {EXAMPLE} needs a prompt, which may be \"\""
            )
        _check_differ(completions)
        prompt, completions = _divided(*completions)
    if chat == isinstance(prompt, str):
        raise DataError(
            f"{where}: 'prompt' {'has messages' if not chat else 'is a text'} and {names[0]!r} "
            f"{'has messages' if chat else 'is a text'}; write both in the same form"
        )
    if chat and not prompt:
        raise DataError(f"{where}: 'prompt' has no message; it needs at least one")
    for name, completion in zip(names, completions, strict=True):
        if texts.is_empty(completion):
            raise DegenerateError("empty_completion", f"{name!r} is empty")
    if paired:
        _check_differ(completions)
    return Record(
        where=where,
        id=id,
        prompt=prompt,
        completions=completions,
        label=None if paired else _label(row["label"], where),
        margin=_margin(row.get("margin"), where) if paired else 0.0,
        template=template_variables(row, where),
    )


def _label(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{where}: 'label' is {value!r}; it must be true or false")
    return value


def _margin(value: Any, where: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: 'margin' is {value!r}; it must be a finite number or absent")
    return float(value)


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


def _divided(chosen: Text, rejected: Text) -> tuple[Text, tuple[Text, Text]]:
    """Returns prompt and completions of two texts, or two conversations, with a common beginning.

    The prompt of texts ends at the end of a word, and neither completion is empty.
    """
    if isinstance(chosen, str):
        assert isinstance(rejected, str)
        size = texts.shared_words(chosen, rejected)
    else:
        both = zip(chosen, rejected, strict=False)
        size = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], both))
    if not size:
        raise DegenerateError(
            "no_prompt",
            "there is no 'prompt', and 'chosen' and 'rejected' do not begin with the same "
            f"{'words' if isinstance(chosen, str) else 'messages'}",
        )
    return chosen[:size], (chosen[size:], rejected[size:])


def _check_differ(completions: Sequence[Text]) -> None:
    chosen, rejected = completions
    if chosen == rejected:
        raise DegenerateError("identical", "'chosen' and 'rejected' are the same")
    if texts.as_seen(chosen) == texts.as_seen(rejected):
        raise DegenerateError(
            "identical_but_invisible",
            "'chosen' and 'rejected' differ only in invisible characters without effect",
        )
