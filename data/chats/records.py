"""Parses and checks rows of supervised data, and finds the assistant's turns in a rendered conversation.

    {"messages": [{"role": "user", "content": "..."}, ...]}      a conversation; the assistant's turns are learnt
    {"prompt": ..., "completion": ...}                           texts or messages; the completion is learnt
    {"text": "..."}                                              a text, which is learnt as a whole

The first of these forms that a row has counts, and its other keys are ignored. With messages, "tools" and
"chat_template_kwargs" are passed to the chat template.

A template marks the assistant's turns itself with `{% generation %}`. Without such blocks, a turn is the text that the template
adds when it renders one message more: it begins after the generation prompt, where the model begins to write, and includes
all that closes the turn. A template that renders earlier messages otherwise once later ones follow has no such spans.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from espalier.data.rows.files import Tokeniser
from espalier.data.rows.records import (
    DegenerateError,
    Record,
    check_unicode,
    is_empty,
    template_variables,
    text_of,
)
from espalier.data.text.documents import DataError
from espalier.data.tokenizers.chat_sandbox import Rendered

# Part of the digest of a source: raise it when the same rows are read as other records.
VERSION = 1
Kind = Literal["messages", "prompt", "text"]
Turns = Literal["all", "last"]
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)
_FORMS = f'{EXAMPLE}, {{"prompt": ..., "completion": ...}} or {{"text": "..."}}'
ASSISTANT = "assistant"


def parse(row: Mapping[str, Any], where: str, id: str) -> tuple[Kind, Record]:
    """Returns a row and its form: a conversation or text is the record's prompt, a completion its only completion.

    Raises:
      DataError: the row is malformed; the message names place, key and remedy.
      DegenerateError: there is nothing to learn: no turn of the assistant, or only empty texts.
    """
    kind = _kind(row, where)
    for key in (kind, "completion", "tools", "chat_template_kwargs"):
        check_unicode(row.get(key), key, where)
    content = text_of(row[kind], kind, where)
    variables = template_variables(row, where)
    if kind == "prompt":
        return kind, _with_completion(row, Record(where, id, content, (), template=variables))
    if isinstance(content, str) == (kind == "messages"):
        expected = "a list of messages" if kind == "messages" else "a text"
        raise DataError(f"{where}: {kind!r} is not {expected}. A row is {_FORMS}")
    if kind == "text":
        if is_empty(content):
            raise DegenerateError("empty_text", "'text' is empty")
        return kind, Record(where, id, content, ())
    answers = [message for message in content if message["role"] == ASSISTANT]
    if not answers:
        raise DegenerateError("no_assistant", "'messages' has no turn of the assistant")
    if is_empty(answers):
        raise DegenerateError("empty_answer", "all turns of the assistant are empty")
    return kind, Record(where, id, content, (), template=variables)


def prompt_key(kind: Kind, record: Record) -> str:
    """Returns the text by which a row is held out: equal for rows with the same prompt before the first answer."""
    content = record.prompt
    if kind == "messages":
        content = tuple(itertools.takewhile(lambda m: m["role"] != ASSISTANT, content))
    if kind == "text" or content:
        return Record("", "", content, ()).prompt_text
    # Without a prompt, the whole row decides.
    return Record("", "", [record.prompt, record.completions], ()).prompt_text


def _kind(row: Mapping[str, Any], where: str) -> Kind:
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if "text" in row:
        return "text"
    raise DataError(
        f"{where}: no key 'messages', no keys 'prompt' and 'completion', and no key 'text'; present are "
        f"{', '.join(map(repr, row)) or 'none'}. A row is {_FORMS}; rename its keys"
    )


def _with_completion(row: Mapping[str, Any], record: Record) -> Record:
    where = record.where
    completion = text_of(row["completion"], "completion", where)
    if isinstance(record.prompt, str) != isinstance(completion, str):
        raise DataError(
            f"{where}: one of 'prompt' and 'completion' is a text, the other has messages; write both in the "
            "same form"
        )
    if record.is_chat and not record.prompt:
        raise DataError(f"{where}: 'prompt' has no message; it needs at least one")
    if is_empty(completion):
        raise DegenerateError("empty_completion", "'completion' is empty")
    return Record(where, record.id, record.prompt, (completion,), template=record.template)


def rendered_turns(tokeniser: Tokeniser, record: Record, turns: Turns) -> Rendered:
    """Returns a conversation as text, with the spans of all turns of the assistant, or only of the last.

    Raises:
      DataError: there is no chat template, it rejects the messages, or a turn has no span.
    """
    whole = tokeniser.render(record, record.prompt)
    assert tokeniser.template is not None  # checked by `render`
    if tokeniser.template.marks_assistant(has_tools="tools" in record.template):
        spans = [(start, end) for start, end in whole.spans if start < end]
        return dataclasses.replace(whole, spans=tuple(spans[-1:] if turns == "last" else spans))
    places = [i for i, message in enumerate(record.prompt) if message["role"] == ASSISTANT]
    chosen = places[-1:] if turns == "last" else places
    turns_spans = tuple(_span(tokeniser, record, whole.text, place) for place in chosen)
    return dataclasses.replace(whole, spans=turns_spans)


def _span(tokeniser: Tokeniser, record: Record, whole: str, place: int) -> tuple[int, int]:
    """Returns the span of the assistant's message `place` in the whole text."""
    messages: Sequence = record.prompt
    if not place:  # no message comes before it that could be rendered alone
        raise DataError(
            f"{record.where}: 'messages' begins with the assistant, so the template cannot render what comes "
            "before. Begin with the user or a system message, or use a template with {% generation %}"
        )
    before = tokeniser.render(record, messages[:place], add_generation_prompt=True).text
    after = whole
    if place + 1 < len(messages):
        after = tokeniser.render(record, messages[: place + 1]).text
    if after.startswith(before) and whole.startswith(after):
        return len(before), len(after)
    only_last = "learn only the last turn (CHAT_TURNS = 'last'), or "
    later = any(message["role"] == ASSISTANT for message in messages[place + 1 :])
    raise DataError(
        f"{record.where}: 'messages': the chat template renders message {place + 1}, of the assistant, or the "
        "messages before it otherwise when more follow, so its tokens cannot be determined: "
        f"{only_last if later else ''}use a template with {{% generation %}} around the assistant's text "
        "(CHAT_TEMPLATE)"
    )
