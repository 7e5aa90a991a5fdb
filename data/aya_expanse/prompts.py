"""Prompts of several languages, for a pool of teachers.

Rows are {"prompt": ..., "language": "tr"}; "prompt" is a text, or the messages of a conversation that ends with a turn of
the user. "text" and "messages" mean the same, as in files for `launch.generate`. Other columns, such as "id", the "source_id" of
the prompt that a translation is of, or the "answer" that an exact reward reads, are copied to the outputs.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from espalier.data.languages import table
from espalier.data.rows.records import check_unicode, is_empty, text_of
from espalier.data.text.documents import DataError
from espalier.data.text.splits import stable_hash

EXAMPLE = '{"prompt": "...", "language": "tr"}'
UNKNOWN = "unknown"
_KEYS = ("prompt", "messages", "text")
# Columns that the outputs write themselves.
_OWN = (
    *_KEYS,
    "chosen",
    "rejected",
    "completion",
    "ended",
    "sample",
    "tokens",
    "teacher",
    "reward",
)

LanguageOf = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt.

    Attributes:
      id: the row's "id", or a digest of the prompt.
      language: a code such as "tr".
      prompt: a text, or messages.
      columns: the row's other columns.
      where: its place, for errors.
    """

    id: str
    language: str
    prompt: str | Sequence[Mapping[str, Any]]
    columns: Mapping[str, Any]
    where: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a conversation."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.prompt]

    @property
    def digest(self) -> str:
        """A digest of the prompt's text or messages, without the id."""
        return f"{stable_hash(json.dumps(self.prompt, sort_keys=True)):016x}"


def read(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    language_of: LanguageOf | None = None,
    languages: Sequence[str] | None = None,
    per_language: int | None = None,
) -> list[Prompt]:
    """Returns the prompts of rows, each prompt once.

    Args:
      rows: (place, row); see `launch.inference.row_files.read`.
      language_of: returns the language of a text, for rows without "language".
      languages: the languages to read; None for all.
      per_language: the number of prompts of each language, its first ones; None for all.

    Raises:
      DataError: a malformed row, two prompts with one id, or a language without enough prompts.
    """
    by_id: dict[str, Prompt] = {}
    counts: dict[str, int] = dict.fromkeys(map(table.code_of, languages or ()), 0)
    for where, row in rows:
        prompt = _prompt(where, row, language_of)
        code = table.code_of(prompt.language)
        if languages is not None and code not in counts:
            continue
        count = counts.setdefault(code, 0)
        if (other := by_id.get(prompt.id)) is not None:
            if (other.prompt, other.language) != (prompt.prompt, prompt.language):
                raise DataError(
                    f"{where} and {other.where} have the same id {prompt.id!r}. Rename one"
                )
            continue
        if per_language is not None and count >= per_language:
            continue
        by_id[prompt.id] = prompt
        counts[code] = count + 1
    for language, count in counts.items():
        if not count or (per_language is not None and count < per_language):
            wanted = f"; {per_language} are needed" if per_language else ""
            raise DataError(
                f"The language {language!r} has {count} prompts{wanted}. Add prompts, or leave it out of --languages"
            )
    if not by_id:
        raise DataError(f"There is no prompt: give rows such as {EXAMPLE}")
    return list(by_id.values())


def _prompt(where: str, row: Mapping[str, Any], language_of: LanguageOf | None) -> Prompt:
    keys = [key for key in _KEYS if key in row]
    if not keys:
        raise DataError(f"{where}: no 'prompt'. A row is {EXAMPLE}")
    check_unicode(row[keys[0]], keys[0], where)
    prompt = text_of(row[keys[0]], keys[0], where)
    messages = () if isinstance(prompt, str) else prompt
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise DataError(f"{where}: a message of {keys[0]!r} has no text as 'content'")
    if is_empty(prompt) or not prompt:
        raise DataError(f"{where}: {keys[0]!r} is empty. Remove the row")
    if messages and messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: {keys[0]!r} ends with the assistant's turn. Remove that turn")
    language = row.get("language")
    if language is None and language_of is not None:
        language = language_of(messages[-1]["content"] if messages else prompt)
    language = UNKNOWN if language is None else language
    if not isinstance(language, str) or not language:
        raise DataError(f"{where}: 'language' is {language!r}; it must be a code such as \"tr\"")
    columns = {k: v for k, v in row.items() if k not in (*_OWN, "id", "language")}
    made = Prompt(id="", language=language, prompt=prompt, columns=columns, where=where)
    id = row.get("id")
    if id is not None and not isinstance(id, str | int):
        raise DataError(f"{where}: 'id' is {id!r}; it must be a text or a whole number")
    return dataclasses.replace(made, id=made.digest if id is None else str(id))


def same_language(one: str, other: str) -> bool:
    """Returns whether two codes are of one language: pt and pt-BR are, and he and iw."""
    return table.code_of(one) == table.code_of(other)
