"""Files of supervised data as a SeqIO source of tokens with a loss weight each."""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from data.cache import cache_dir as cache
from data.chats import records, spans
from data.chats.records import Kind
from data.data_source import shorten
from data.preference import tokens
from data.preference.prompted_files import PromptedFiles
from data.preference.records import DegenerateError, Record
from data.preference.tally import Tally
from data.text import documents, splits
from data.text.documents import DataError

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
class ChatFiles(PromptedFiles):
    """Rows of one form in JSON lines or Parquet, by split; the held-out share is exact."""

    turns: spans.Turns  # the turns of the assistant that are learnt

    @property
    def dropped(self) -> Mapping[str, Any]:
        """Reason -> number of dropped rows and the place of the first."""
        return self._counted["dropped"]

    def num_input_examples(self, split: str) -> int:
        return self._counted["examples"][split]

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
        versions = (records, splits, documents, tokens)
        return {
            **super()._settings(),
            "version": [VERSION, *(module.VERSION for module in versions)],
            "turns": self.turns,
            "special": [self.tokeniser.add_bos, self.tokeniser.add_eos],
        }

    def _split_of(self, text: str, path: str) -> str:
        if not self.validation_fraction:
            return super()._split_of(text, path)
        return "validation" if _hash(text) in self._held_out else "train"

    @functools.cached_property
    def _held_out(self) -> frozenset[int]:
        return frozenset(self._counted["held_out"])

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
        prompt = self.tokeniser.render(record, record.prompt, add_generation_prompt=True).text
        whole = self.tokeniser.continued(record, prompt, record.completions[0])
        before, ids = map(self.tokeniser.encode_rendered, (prompt, whole))
        start = len(os.path.commonprefix([before, ids]))
        return ids, [place >= start for place in range(len(ids))]

    @functools.cached_property
    def _counted(self) -> dict[str, Any]:
        """Returns the numbers of examples, dropped rows, and the hashes of held-out prompts; stored on disk."""
        if self._counts_file.is_file():
            return json.loads(self._counts_file.read_text(encoding="utf-8"))
        dropped, hashes = Tally(), {path: [] for path in self.checksums}
        first: _Example | None = None
        for path in tqdm.tqdm(hashes, desc=f"checking {self.name}", file=sys.stderr, disable=None):
            for example in self._examples(path, None, dropped):
                first = first or example
                _check_form(example, first)
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
        counted = {"examples": examples, "dropped": dropped, "held_out": sorted(held_out)}
        cache.remember(self._counts_file, counted)
        return counted

    def _empty(self, split: str, total: int, dropped: Tally) -> DataError:
        where = f"{self.name}: {shorten(self.files[split])}"
        if total:
            return DataError(
                f"{where}: validation_fraction={self.validation_fraction} of {total} rows leaves none for the {split} "
                "split. Change validation_fraction (CHATS_VALIDATION_FRACTION; 0 holds none out), or give "
                "validation_files (CHATS_VALIDATION)"
            )
        return DataError(
            f"{where}: there is no row to learn ({str(dropped) or 'every file is empty'})"
        )


def _check_form(example: _Example, first: _Example) -> None:
    """Raises DataError if a row has another form than the first row of its set."""
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


def _hash(text: str) -> int:
    return splits.stable_hash(text, salt="split")
