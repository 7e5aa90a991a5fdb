"""The assistant's turns in a rendered conversation, as spans of characters.

A template marks them itself with `{% generation %}`. Without such blocks, a turn is the text that the template adds
when it renders one message more: it begins after the generation prompt, where the model begins to write, and includes
all that closes the turn. A template that renders earlier messages otherwise once later ones follow has no such spans.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from espalier.data.chats.records import ASSISTANT
from espalier.data.rows.files import Tokeniser
from espalier.data.rows.records import Record
from espalier.data.text.documents import DataError
from espalier.data.tokenizers.chat_sandbox import Rendered

Turns = Literal["all", "last"]


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
