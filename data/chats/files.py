"""Files of supervised data as a SeqIO source of tokens with a loss weight each."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from espalier.data.chats import records, spans
from espalier.data.chats.records import Kind
from espalier.data.rows.files import TOKENS_VERSION, ExactSplit, PromptedFiles
from espalier.data.rows.records import DegenerateError, Record, Tally
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError

# Part of the digest of a source: raise it when the same records become other tokens.
VERSION = 1


class _Example(NamedTuple):
    """A tokenised row."""

    kind: Kind
    record: Record
    key: str  # examples with equal keys are in one split
    ids: list[int]
    learnt: list[bool]  # whether each id is learnt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFiles(TOKENS_VERSION, ExactSplit, PromptedFiles):
    """Rows of one form in JSON lines or Parquet, by split; the held-out share is exact."""

    MACRO: ClassVar[str] = "CHATS"

    turns: spans.Turns  # the turns of the assistant that are learnt

    def read_examples(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        for example in self._examples(path, split):
            yield {
                "targets": np.array(example.ids, np.int32),
                "loss_weights": np.array(example.learnt, np.float32),
                "document_id": example.record.id,
            }

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        return {"targets": ((None,), "int32"), "loss_weights": ((None,), "float32")}

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "version": [
                VERSION,
                records.VERSION,
                splits.VERSION,
                documents.VERSION,
                TOKENS_VERSION,
            ],
            "turns": self.turns,
            "special": [self.tokeniser.add_bos, self.tokeniser.add_eos],
        }

    def _examples(
        self, path: str, split: str | None = None, dropped: Tally | None = None
    ) -> Iterator[_Example]:
        """Yields the tokenised rows of a file in one split, or in all; counts rows from which nothing can be learnt."""
        for number, where, row in documents.read_rows(pathlib.Path(path), example=records.EXAMPLE):
            id = self._id(path, number)
            try:
                kind, record = records.parse(row, where, id)
                key = records.prompt_key(kind, record)
                if split is None or self._split_of(key, path) == split:
                    yield _Example(kind, record, key, *self._tokenised(kind, record))
            except DegenerateError as error:
                if dropped is not None:
                    dropped.add(error.reason, id)

    def _tokenised(self, kind: Kind, record: Record) -> tuple[list[int], list[bool]]:
        """Returns the ids of a row, and whether each is learnt; raises DegenerateError if none is."""
        if kind == "text":
            ids = self.tokeniser.text(record.prompt)
            return ids, [True] * len(ids)
        if kind == "prompt" and not record.is_chat:
            prompt, (completion,) = self.tokeniser(record)
            return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)
        if kind == "prompt":
            ids, learnt = self._completed(record)
        else:
            rendered = spans.rendered_turns(self.tokeniser, record, self.turns)
            ids, learnt = self.tokeniser.encode_marked(rendered)
        if not any(learnt):
            raise DegenerateError("not_rendered", "the template renders nothing of the assistant")
        return ids, learnt

    def _completed(self, record: Record) -> tuple[list[int], list[bool]]:
        """Returns the ids of a prompt of messages with its completion, learnt from where they leave the prompt's ids."""
        prompt = self.tokeniser.render(record, record.prompt, add_generation_prompt=True)
        whole = self.tokeniser.continued(record, prompt.text, record.completions[0])
        before, ids = (self.tokeniser.encode_marked(r.after(0))[0] for r in (prompt, whole))
        start = len(os.path.commonprefix([before, ids]))
        return ids, [place >= start for place in range(len(ids))]

    def _check_form(self, example: _Example, first: _Example) -> None:
        if example.kind != first.kind or example.record.is_chat != first.record.is_chat:
            raise DataError(
                f"{example.record.where}: the row has {_form(example)}, but {first.record.where} has {_form(first)}. "
                "Put rows of different forms into different sets (CHATS = {'name': 'files', ...})"
            )


def _form(example: _Example) -> str:
    if example.kind != "prompt":
        return repr(example.kind)
    content = "messages" if example.record.is_chat else "texts"
    return f"'prompt' and 'completion' with {content}"
