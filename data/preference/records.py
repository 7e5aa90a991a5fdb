"""Parses and checks rows of preference data in the formats of TRL.

    {"prompt": ..., "chosen": ..., "rejected": ...}          a pair
    {"chosen": ..., "rejected": ...}                         a pair; the common beginning is the prompt
    {"prompt": ..., "completion": ..., "label": true}        one completion, desirable or not

Prompt and completions are texts, or lists of messages {"role", "content"}. With messages, "tools" and
"chat_template_kwargs" are passed to the chat template. A pair may have a "margin": a number, how much better
the chosen completion is. Other keys are ignored.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from espalier.data.rows.records import (
    DegenerateError,
    Record,
    Text,
    as_seen,
    check_unicode,
    is_empty,
    shared_words,
    template_variables,
    text_of,
)
from espalier.data.text.documents import DataError

# Part of the digest of a source: raise it when the same rows are read as other records.
VERSION = 2
Kind = Literal["paired", "unpaired"]
PAIR = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
EXAMPLE = '{"prompt": "...", "completion": "...", "label": true}'


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
    for name in ("prompt", *names):
        check_unicode(row.get(name), name, where)
    completions = tuple(text_of(row[name], name, where) for name in names)
    chat = not isinstance(completions[0], str)
    if any(isinstance(text, str) == chat for text in completions):
        raise DataError(
            f"{where}: one of 'chosen' and 'rejected' is a text, the other has messages"
        )
    prompt = None if row.get("prompt") is None else text_of(row["prompt"], "prompt", where)
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
        if is_empty(completion):
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


def _divided(chosen: Text, rejected: Text) -> tuple[Text, tuple[Text, Text]]:
    """Returns prompt and completions of two texts, or two conversations, with a common beginning.

    The prompt of texts ends at the end of a word, and neither completion is empty.
    """
    if isinstance(chosen, str):
        assert isinstance(rejected, str)
        size = shared_words(chosen, rejected)
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
    if as_seen(chosen) == as_seen(rejected):
        raise DegenerateError(
            "identical_but_invisible",
            "'chosen' and 'rejected' differ only in invisible characters without effect",
        )
