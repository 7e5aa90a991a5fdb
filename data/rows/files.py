"""Base classes of sources that read files of rows: with an exact share held out, and with a prompt in each row."""

import abc
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, Self

from espalier.common.bars import Bar
from espalier.data import tasks
from espalier.data.cache import fingerprint
from espalier.data.data_source import FileSource, shorten
from espalier.data.rows import tokens
from espalier.data.rows.records import Tally
from espalier.data.text import splits
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import chat_template as templates


class Example(Protocol):
    """A row of a file; rows with equal keys are in one split."""

    @property
    def key(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSplit(FileSource, abc.ABC):
    """Rows in files, by split: an exact share is held out, also of few. Numbers and hashes are counted once, and stored on disk."""

    MACRO: ClassVar[str]  # of the files; the macros of the held-out ones begin with it

    @abc.abstractmethod
    def _examples(
        self, path: str, split: str | None = None, dropped: Tally | None = None
    ) -> Iterator[Any]:
        """Yields each `Example` of a file in one split, or in all; counts rows from which nothing can be learnt."""

    def _check_form(self, example: Any, first: Any) -> None:
        """Raises DataError if a row has another form than the first row of its set."""

    def _split_of(self, text: str, path: str) -> str:
        if not self.validation_fraction:
            return super()._split_of(text, path)
        return "validation" if _hash(text) in self._held_out else "train"

    @functools.cached_property
    def _held_out(self) -> frozenset[int]:
        return frozenset(self._counted["held_out"])

    def _count(self) -> dict[str, Any]:
        """Returns the numbers of examples, dropped rows, and the hashes of held-out keys."""
        dropped, hashes = Tally(), {path: [] for path in self.checksums}
        first = None
        for path in Bar(hashes, desc=f"checking {self.name}", file=sys.stderr):
            for example in self._examples(path, None, dropped):
                first = first or example
                self._check_form(example, first)
                hashes[path].append(_hash(example.key))
        train = [value for path in self.files["train"] for value in hashes[path]]
        held_out = splits.held_out_hashes(train, fraction=self.validation_fraction)
        held = sum(value in held_out for value in train)
        examples = {"train": len(train) - held}
        if self.validation_fraction:
            examples["validation"] = held
        elif "validation" in self.files:
            examples["validation"] = sum(len(hashes[path]) for path in self.files["validation"])
        for split, count in examples.items():
            if not count:
                raise self._empty(split, len(train), dropped)
        return {"examples": examples, "dropped": dropped, "held_out": sorted(held_out)}

    def _empty(self, split: str, total: int, dropped: Tally) -> DataError:
        where = f"{self.name}: {shorten(self.files[split])}"
        if total:
            return DataError(
                f"{where}: validation_fraction={self.validation_fraction} of {total} rows leaves none for the {split} "
                f"split. Change validation_fraction ({self.MACRO}_VALIDATION_FRACTION; 0 holds none out), or give "
                f"validation_files ({self.MACRO}_VALIDATION)"
            )
        return DataError(
            f"{where}: there is no row to learn ({str(dropped) or 'every file is empty'})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedFiles(FileSource, abc.ABC):
    """Rows of JSON lines with a prompt each, by split; equal prompts are in the same split."""

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


def _hash(text: str) -> int:
    return splits.stable_hash(text, salt="split")
