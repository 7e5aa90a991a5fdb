"""Tokenises records: prompt and completions separately, so that no token spans the boundary.

With a chat template, the prompt ends with the opening of the assistant's turn (the generation prompt). A completion
is the text that the template adds to the prompt when it also renders the completion's messages. The template writes
BOS and ends of turns; no further special tokens are added.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from espalier.data.rows.records import Record
from espalier.data.rows.texts import Message
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import chat_sandbox, chat_template, control_tokens

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
    prompt_eos: bool = False  # end prompts with EOS, as an encoder's inputs

    def __call__(self, record: Record) -> tuple[list[int], list[list[int]]]:
        """Returns the ids of the prompt, and of each completion.

        Raises:
          DataError: the chat template is missing, rejects the messages, or renders the prompt differently when a
            completion follows.
        """
        if record.is_chat:
            return self._conversation(record)
        encode = self.vocabulary.encode
        return (
            [*self._bos, *encode(record.prompt), *self._prompt_eos],
            [[*encode(completion), *self._eos] for completion in record.completions],
        )

    def text(self, text: str) -> list[int]:
        """Returns the ids of a text that is not a prompt: with BOS and EOS, but only one EOS if the text ends with it."""
        ids = self.vocabulary.encode(text)
        return [*self._bos, *ids, *([] if ids[-1:] == self._eos else self._eos)]

    def encode_marked(self, rendered: chat_sandbox.Rendered) -> tuple[list[int], list[bool]]:
        """Returns the ids of a rendered conversation, and for each whether it overlaps one of the spans."""
        ids, marked = control_tokens.encode(self.vocabulary, rendered)
        bos = (
            [] if hasattr(self.vocabulary, "encode_marked") else self._bos
        )  # the template writes its own
        return [*bos, *ids], [*([False] * len(bos)), *marked]

    @property
    def _bos(self) -> list[int]:
        return [self.vocabulary.bos_id] if self.add_bos else []

    @property
    def _eos(self) -> list[int]:
        return [self.vocabulary.eos_id] if self.add_eos else []

    @property
    def _prompt_eos(self) -> list[int]:
        return [self.vocabulary.eos_id] if self.prompt_eos else []

    def _conversation(self, record: Record) -> tuple[list[int], list[list[int]]]:
        def encode(rendered: chat_sandbox.Rendered) -> list[int]:
            return control_tokens.encode(self.vocabulary, rendered)[0]

        prompt = self.render(record, record.prompt, add_generation_prompt=True)
        return [*encode(prompt.after(0)), *self._prompt_eos], [
            encode(self.continued(record, prompt.text, messages).after(len(prompt.text)))
            for messages in record.completions
        ]

    def continued(
        self, record: Record, prompt: str, completion: Sequence[Message]
    ) -> chat_sandbox.Rendered:
        """Returns a record's prompt with a completion; raises DataError if its text does not begin with `prompt`."""
        rendered = self.render(record, [*record.prompt, *completion])
        whole = rendered.text
        if not whole.startswith(prompt):
            place = len(os.path.commonprefix([prompt, whole]))
            raise DataError(
                f"{record.where}: the chat template renders the prompt differently when a completion "
                f"follows, from character {place} on ({prompt[place : place + 30]!r} before, "
                f"{whole[place : place + 30]!r} after), so prompt and completion cannot be separated. "
                "Write texts, or use a template that begins each turn of the assistant with its "
                "generation prompt"
            )
        return rendered

    def render(
        self, record: Record, messages: Sequence[Message], **options: Any
    ) -> chat_sandbox.Rendered:
        """Returns messages rendered with the record's tools, see `ChatTemplate.render_spans`.

        Raises:
          DataError: there is no chat template, or it rejects the messages.
        """
        if self.template is None:
            raise DataError(
                f"{record.where}: messages need a chat template, and the vocabulary has none. Set "
                f"chat_template to a jinja file or one of {', '.join(chat_template.BUILT_IN)}, or write "
                "texts"
            )
        try:
            return self.template.render_spans(messages, **record.template, **options)
        except chat_template.ChatTemplateError as error:
            raise DataError(f"{record.where}: {error}") from None
