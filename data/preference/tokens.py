"""Tokenises records: prompt and completions separately, so that no token spans the boundary.

With a chat template, the prompt ends with the opening of the assistant's turn (the generation prompt). A completion
is the text that the template adds to the prompt when it also renders the completion's messages. The template writes
BOS and ends of turns; no further special tokens are added.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from data.preference.records import Record
from data.preference.texts import Message
from data.text.documents import DataError
from data.tokenizers import chat_template

# Part of the digest of a source: raise it when the same records become other tokens.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """Converts records to ids."""

    vocabulary: Any  # a SeqIO vocabulary
    # chat template of records with messages; None if all records are texts
    template: chat_template.ChatTemplate | None
    add_bos: bool  # begin prompts that are texts with BOS
    add_eos: bool  # end completions that are texts with EOS

    def __call__(self, record: Record) -> tuple[list[int], list[list[int]]]:
        """Returns the ids of the prompt, and of each completion.

        Raises:
          DataError: the chat template is missing, rejects the messages, or renders the prompt differently when a
            completion follows.
        """
        if record.is_chat:
            return self._conversation(record)
        bos = [self.vocabulary.bos_id] if self.add_bos else []
        eos = [self.vocabulary.eos_id] if self.add_eos else []
        encode = self.vocabulary.encode
        return (
            [*bos, *encode(record.prompt)],
            [[*encode(completion), *eos] for completion in record.completions],
        )

    def _conversation(self, record: Record) -> tuple[list[int], list[list[int]]]:
        # Special tokens in a rendered template are meant as such, so they are encoded as special tokens.
        encode = getattr(self.vocabulary, "encode_special", self.vocabulary.encode)
        prompt = self._render(record, record.prompt, add_generation_prompt=True)
        completions = []
        for messages in record.completions:
            whole = self._render(record, [*record.prompt, *messages])
            if not whole.startswith(prompt):
                place = len(os.path.commonprefix([prompt, whole]))
                raise DataError(
                    f"{record.where}: the chat template renders the prompt differently when a completion "
                    f"follows, from character {place} on ({prompt[place : place + 30]!r} before, "
                    f"{whole[place : place + 30]!r} after), so prompt and completion cannot be separated. "
                    "Write texts, or use a template that begins each turn of the assistant with its "
                    "generation prompt"
                )
            completions.append(encode(whole[len(prompt) :]))
        return encode(prompt), completions

    def _render(self, record: Record, messages: Sequence[Message], **options: Any) -> str:
        if self.template is None:
            raise DataError(
                f"{record.where}: messages need a chat template, and the vocabulary has none. Set "
                f"chat_template to a jinja file or one of {', '.join(chat_template.BUILT_IN)}, or write "
                "texts"
            )
        try:
            return self.template.render(messages, **record.template, **options)
        except chat_template.ChatTemplateError as error:
            raise DataError(f"{record.where}: {error}") from None


def find_template(name_or_file: str | None, vocabulary: Any) -> chat_template.ChatTemplate | None:
    """Returns the chat template of a file or built-in name; by default the vocabulary's own, if it has one.

    Named templates render with the vocabulary's special tokens.

    Raises:
      ChatTemplateError: the template does not exist.
    """
    if name_or_file is None:
        return getattr(vocabulary, "chat_template", None)
    files = getattr(vocabulary, "files", None)
    return chat_template.named(name_or_file, files.tokens if files else None)
