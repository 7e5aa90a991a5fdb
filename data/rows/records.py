"""Rows of prompts, completions and conversations as records, and their texts."""

import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.data.text import documents
from espalier.data.text.documents import DataError

Message = Mapping[str, Any]
Text = str | Sequence[Message]

# Characters without a glyph: soft hyphens and joiners, direction marks, invisible operators, tags. With them, a text
# can hide words that models read and people do not see.
_INVISIBLE_RANGES = (
    *((0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x180E, 0x180E), (0x200B, 0x200F)),
    *((0x202A, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xE0001, 0xE007F)),
)
INVISIBLE = frozenset(
    chr(code) for first, last in _INVISIBLE_RANGES for code in range(first, last + 1)
)
_WITHOUT_INVISIBLE = dict.fromkeys(map(ord, INVISIBLE))
# Invisible characters that do not change the look of other characters: line breaks (soft hyphen, zero-width space, word
# joiner, byte order mark) and invisible operators. The others have an effect: joiners choose letter forms and emoji,
# direction marks the order of letters, and tags flags.
_WITHOUT_EFFECT = dict.fromkeys((0xAD, 0x200B, *range(0x2060, 0x2065), 0xFEFF))
# First words of the Unicode names of characters in scripts without spaces between words.
_UNSPACED = {
    *("CJK", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "HIRAGANA", "KATAKANA", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
}


# Roles of messages {"from": role, "value": content}, as in sets that follow ShareGPT.
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
}
_FORM = '{"role": "user", "content": "..."}'


def text_of(value: Any, key: str, where: str) -> Text:
    """Returns a text or a tuple of messages; raises DataError, with place and key, for anything else.

    Messages are objects with a role, objects {"from": "human" or "gpt", "value": text}, or, as columns of nested lists hold
    them, one object with a list of all roles and lists of the other keys.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = _divided(value)
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {key!r} is a {type(value).__name__}; write a text, or a list of messages {_FORM}"
        )
    return tuple(_message(each, number, key, where) for number, each in enumerate(value, 1))


def _divided(value: dict[str, Any]) -> Any:
    """Returns the messages of an object of lists; the object itself if it is none."""
    columns = [column for column in value.values() if isinstance(column, list)]
    if len(columns) < len(value) or len({len(column) for column in columns}) != 1:
        return value
    rows = zip(*columns, strict=True)
    return [{key: x for key, x in zip(value, row, strict=True) if x is not None} for row in rows]


def _message(message: Any, number: int, key: str, where: str) -> Message:
    if isinstance(message, dict) and isinstance(message.get("role"), str):
        return message
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        raise DataError(f"{where}: message {number} of {key!r} is not of the form {_FORM}")
    speaker, content = message["from"], message["value"]
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(content, str):
        raise DataError(
            f"{where}: message {number} of {key!r} is from {speaker!r}, with a {type(content).__name__}; known are texts "
            f"from {', '.join(_ROLES)}. Write messages {_FORM}"
        )
    return {"role": _ROLES[speaker], "content": content}


def as_seen(value: Any) -> Any:
    """Returns the value without the invisible characters of no effect in its texts; equal for texts that look equal."""
    if isinstance(value, str):
        return value.translate(_WITHOUT_EFFECT)
    if isinstance(value, Mapping):
        return {key: as_seen(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_seen(inner) for inner in value]
    return value


def is_empty(completion: Text) -> bool:
    """Returns whether a completion has only white space, invisible characters, and messages with empty parts."""
    texts = (
        [completion] if isinstance(completion, str) else strings(list(map(_content, completion)))
    )
    return all(map(is_blank, texts))


def _content(message: Message) -> list[Any]:
    """Returns the values of a message without its role; for a part {"type": "text", "text": ...} only the text."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("type") == "text":
            return value.get("text")
        return [of(inner) for inner in value] if isinstance(value, list) else value

    return [of(value) for key, value in message.items() if key != "role"]


def strings(value: Any) -> Iterator[str]:
    """Yields all strings in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def check_unicode(value: Any, key: str, where: str) -> None:
    """Raises DataError, with place and key, if a string of the value is not valid Unicode."""
    for text in strings(value):
        documents.check_unicode(text, key, where)


def is_blank(text: str) -> bool:
    """Returns whether a text has only white space and invisible characters, with or without effect."""
    return not text.translate(_WITHOUT_INVISIBLE).strip()


def shared_words(one: str, other: str) -> int:
    """Returns the length in characters of the words that both texts begin with.

    Both texts are longer than this. The space after the last shared word is not counted, since tokenizers attach a
    space to the word after it.
    """
    size = len(os.path.commonprefix([one, other]))
    size = min(size, *(len(text.rstrip()) - 1 for text in (one, other)))
    while size > 0 and any(_divides_word(one[size - 1], text[size]) for text in (one, other)):
        size -= 1
    if size > 0 and one[size - 1] == " ":
        size -= 1
    return max(size, 0)


def _divides_word(before: str, after: str) -> bool:
    """Returns whether no word can end between two adjacent characters of a text."""
    if before.isspace() or after.isspace():
        return False
    if unicodedata.category(after).startswith("M"):  # a mark, which belongs to the letter before it
        return True
    names = (unicodedata.name(one, "").replace("-", " ") for one in (before, after))
    return _UNSPACED.isdisjoint(name.partition(" ")[0] for name in names)


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
        parts = strings([self.prompt, *self.completions])
        return any(not INVISIBLE.isdisjoint(part) for part in parts)

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


def template_variables(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the variables of the chat template besides the messages: the row's "tools" and "chat_template_kwargs"."""
    for key in ("tools", "chat_template_kwargs"):
        check_unicode(row.get(key), key, where)
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
