"""Rows with "messages" as tokens: rendered with a chat template, and read by the vocabulary.

A template writes the special tokens of its model, BOS among them, so nothing is added to them.
"""

from collections.abc import Mapping
from typing import Any

from data.tokenizers import chat_template
from launch.run.load_run import LoadedRun, LoadError


def template(chosen: str | None, vocabulary: Any) -> chat_template.ChatTemplate:
    """The chat template to use.

    Args:
      chosen: a jinja file or the name of a built-in template; None for the vocabulary's own.
      vocabulary: a SeqIO vocabulary.

    Raises:
      LoadError: there is none.
    """
    if chosen is not None:
        files = getattr(vocabulary, "files", None)
        try:
            return chat_template.named(chosen, files.tokens if files else None)
        except chat_template.ChatTemplateError as error:
            raise LoadError(f"CHAT_TEMPLATE: {error}.") from None
    own = getattr(vocabulary, "chat_template", None)
    if own is None:
        raise LoadError(
            'The run\'s vocabulary has no chat template for "messages": name a jinja file or one of '
            f'{", ".join(chat_template.BUILT_IN)} with --gin.CHAT_TEMPLATE=\'"..."\', or give "text" '
            "as the model was trained on it."
        )
    return own


def prompt(run: LoadedRun, row: Mapping[str, Any], where: str) -> list[int]:
    """Tokens of a row's messages, up to where the assistant's next turn begins.

    Raises:
      LoadError: there is no template, or it refuses the messages.
    """
    text = _render(run, row, where, row["messages"], add_generation_prompt=True)
    return _encode(run, text, len(text))[0]


def scored(
    run: LoadedRun, row: Mapping[str, Any], where: str
) -> tuple[list[int], list[int] | None]:
    """Tokens of a row's messages, and those of the assistant's turn that ends them; see LoadedRun.

    Raises:
      LoadError: as `prompt`, or the template renders the turn in another place than a prompt has it.
    """
    messages = row["messages"]
    text = _render(run, row, where, messages)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        return _encode(run, text, len(text))[0], None
    before = _render(run, row, where, messages[:-1], add_generation_prompt=True)
    if not text.startswith(before):
        raise LoadError(
            f"{where}: the chat template renders the assistant's last turn otherwise than after a "
            'generation prompt, so that it cannot be told apart. Give "text" and "targets".'
        )
    context, targets = _encode(run, text, len(before))
    ends = [place for place, id in enumerate(targets, 1) if id in run.eos_ids]
    return context, targets[: ends[-1]] if ends else targets


def _render(
    run: LoadedRun,
    row: Mapping[str, Any],
    where: str,
    messages: Any,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return run.chat_template.render(
            messages,
            tools=row.get("tools"),
            documents=row.get("documents"),
            add_generation_prompt=add_generation_prompt,
        )
    except chat_template.ChatTemplateError as error:
        raise LoadError(f"{where}: {error}.") from None


def _encode(run: LoadedRun, text: str, start: int) -> tuple[list[int], list[int]]:
    """Ids of a rendered conversation, divided at a character."""
    if hasattr(run.vocabulary, "encode_parts"):
        return run.vocabulary.encode_parts(text, start)
    # A vocabulary whose texts cannot spell its special tokens.
    before, after = (run.encode(part, "messages") for part in (text[:start], text[start:]))
    return run.after_bos(before), after
