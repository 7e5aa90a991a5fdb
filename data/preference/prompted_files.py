"""Base class of sources that read JSON lines with a prompt in each row: preference pairs and prompts."""

import abc
import dataclasses
import os
from typing import Any, Self

from espalier.data import tasks
from espalier.data.cache import fingerprint
from espalier.data.data_source import FileSource
from espalier.data.preference import tokens
from espalier.data.tokenizers import chat_template as templates


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedFiles(FileSource, abc.ABC):
    """Files of rows, by split; equal prompts are in the same split."""

    tokeniser: tokens.Tokeniser  # converts records to ids

    @classmethod
    def open(
        cls,
        *,
        name: str,
        vocabulary: Any,
        chat_template: str | None,
        special_in_contents: bool,
        add_bos: bool,
        add_eos: bool,
        prompt_eos: bool = False,
        **fields: Any,
    ) -> Self:
        """Returns the source of a task, with `fields` as for `FileSource.find`.

        `data.preference.tasks.register_pairs` describes the arguments and errors.
        """
        tasks.check_special_ids(name, vocabulary, add_bos=add_bos, add_eos=add_eos or prompt_eos)
        template = templates.of(chat_template, vocabulary, special_in_contents=special_in_contents)
        tokeniser = tokens.Tokeniser(vocabulary, template, add_bos, add_eos, prompt_eos)
        return cls.find(name=name, tokeniser=tokeniser, **fields)

    @property
    def facts(self) -> dict[str, Any]:
        """Returns facts for the record of a run."""
        template = self.tokeniser.template
        return {
            "vocabulary": str(self.tokeniser.vocabulary),
            "chat_template": template and template.origin,
            "add_bos": self.tokeniser.add_bos,
            "add_eos": self.tokeniser.add_eos,
        }

    def _settings(self) -> dict[str, Any]:
        template = self.tokeniser.template
        described = template and [template.templates, template.variables]
        if template and template.added:  # absent by default, so that older caches remain valid
            described = [*described, sorted(template.added.items())]
        return {
            "vocabulary": fingerprint.vocabulary(self.tokeniser.vocabulary),
            "template": fingerprint.describe(described),
        }

    def _id(self, path: str, line: int) -> str:
        return f"{os.path.relpath(path, self.root)}:{line}"
