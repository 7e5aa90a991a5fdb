"""Texts and messages of preference data: what they hold, what is seen of them, and whether they say anything."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.preference import characters
from data.text.documents import DataError

Message = Mapping[str, Any]
Text = str | Sequence[Message]


def text_of(value: Any, key: str, where: str) -> Text:
    """A text, or messages; DataError, which names place and key, for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {key!r} holds a {type(value).__name__}; give a text, or a list of messages "
            '{"role": "user", "content": "..."}'
        )
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: message {number} of {key!r} is not of the form "
                '{"role": "user", "content": "..."}'
            )
    return tuple(value)


def as_seen(value: Any) -> Any:
    """The value with its texts as they are seen, without invisible characters of no effect."""
    if isinstance(value, str):
        return characters.as_seen(value)
    if isinstance(value, Mapping):
        return {key: as_seen(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_seen(inner) for inner in value]
    return value


def is_empty(completion: Text) -> bool:
    """Whether nothing is said: white space, invisible characters, messages with a role and empty parts alone."""
    said = [completion] if isinstance(completion, str) else strings(list(map(_content, completion)))
    return all(map(characters.is_blank, said))


def _content(message: Message) -> list[Any]:
    """What a message holds beside its role; of a part {"type": "text", "text": ...} the text alone."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("type") == "text":
            return value.get("text")
        return [of(inner) for inner in value] if isinstance(value, list) else value

    return [of(value) for key, value in message.items() if key != "role"]


def strings(value: Any) -> Iterator[str]:
    """All strings in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def check_unicode(value: Any, key: str, where: str) -> None:
    """Raises DataError, which names place and key, where a string of the value is no valid Unicode."""
    for text in strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {key!r} is not valid Unicode at character {error.start} (half of a "
                "surrogate pair). Repair or drop the line"
            ) from None
