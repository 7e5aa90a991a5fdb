"""SeqIO tasks of preference data: files as a source of tokenised pairs, registered by a function that gin binds."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from espalier.common.ranges import check_choice
from espalier.data import tasks
from espalier.data.pieces import Piece
from espalier.data.preference import records
from espalier.data.preference.records import Kind
from espalier.data.rows.files import TOKENS_VERSION, PromptedFiles, PromptedSettings
from espalier.data.rows.records import DegenerateError, Record
from espalier.data.stream.stream import with_settings
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows, Row

Invalid = Literal["drop", "error"]
CACHED_AS = "data.preference.files"  # the name by which caches know the source
# Features of an example besides `document_id`: ids, and one float32 number.
TOKENS = ("prompt", "chosen", "rejected")
NUMBER = {"paired": "margin", "unpaired": "labels"}


class _Example(NamedTuple):
    """A tokenised record."""

    record: Record
    prompt: list[int]
    completions: list[list[int]]


class _Counts(NamedTuple):
    """What is counted of the rows of a piece, or of all."""

    examples: dict[str, int]  # split -> number
    prompts: dict[str, list[list[int]]]  # split -> the first two
    dropped: tasks.Tally
    noted: tasks.Tally

    @classmethod
    def of(cls, splits: Sequence[str]) -> "_Counts":
        prompts: dict[str, list[list[int]]] = {split: [] for split in splits}
        return cls(dict.fromkeys(splits, 0), prompts, tasks.Tally(), tasks.Tally())

    def add_prompt(self, split: str, prompt: list[int]) -> None:
        if len(self.prompts[split]) < 2 and prompt not in self.prompts[split]:
            self.prompts[split].append(prompt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceFiles(PromptedFiles):
    """Preference data in files, by split."""

    MACRO: ClassVar[str] = "PAIRS"
    EXAMPLE: ClassVar[str] = records.PAIR

    # 'paired', or 'unpaired' for completions with labels; a pair then becomes one completion of
    # each label
    kind: Kind
    invalid: Invalid  # 'drop' drops degenerate rows and counts them, 'error' raises

    @property
    def noted(self) -> Mapping[str, Any]:
        """Reason -> number and first place of rows that are used but reported, such as for invisible characters."""
        return self._counted["noted"]

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        examples = self._examples(piece, split, self._bad_rows())
        if self.kind == "paired":
            for example in examples:
                yield self._encoded(example, example.completions[1], example.record.margin)
            return
        pieces = self.pieces(split)
        after = pieces[pieces.index(piece) + 1 :] + pieces[: pieces.index(piece) + 1]

        def others() -> Iterator[_Example]:
            return itertools.chain.from_iterable(
                self._examples(other, split, self._bad_rows()) for other in after
            )

        for example, other in _mismatched(examples, others):
            yield self._encoded(example, other.completions[0], float(example.record.label or 0))

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        ids = dict.fromkeys(TOKENS, ((None,), "int32"))
        return {**ids, NUMBER[self.kind]: ((1,), "float32")}

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "version": [documents.VERSION, splits.VERSION, records.VERSION, TOKENS_VERSION],
            "kind": self.kind,
            "special": [self.tokeniser.add_bos, self.tokeniser.add_eos],
            **({"prompt_eos": True} if self.tokeniser.prompt_eos else {}),
        }

    def _encoded(self, example: _Example, rejected: list[int], number: float) -> dict[str, Any]:
        return {
            "prompt": np.array(example.prompt, np.int32),
            "chosen": np.array(example.completions[0], np.int32),
            "rejected": np.array(rejected, np.int32),
            NUMBER[self.kind]: np.array([number], np.float32),
            "document_id": example.record.id,
        }

    def _examples(
        self,
        piece: Piece,
        split: str | None,
        bad: BadRows,
        dropped: tasks.Tally | None = None,
        noted: tasks.Tally | None = None,
    ) -> Iterator[_Example]:
        """Yields the examples of a piece in one split, or in all; counts dropped and reported rows.

        Rows of other splits are not tokenised, since that takes most of the time.
        """

        def use(row: Row) -> Iterator[_Example]:
            id = self._id(piece.path, row.number)
            try:
                record = records.parse(row.content, row.where, id)
                if split is not None and self._split_of(record.prompt_text, piece.path) != split:
                    return
                if noted is not None and record.has_invisible:
                    noted.add("invisible_characters", id)
                yield from self._tokenised(record)
            except DegenerateError as error:
                if self.invalid == "error":
                    raise DataError(
                        f"{row.where}: {error}. Repair or delete the line, or set invalid='drop' to skip such "
                        "rows"
                    ) from None
                if dropped is not None:
                    dropped.add(error.reason, id)

        return self._usable(piece, self._rows(piece, bad), use, bad)

    def _tokenised(self, record: Record) -> Iterator[_Example]:
        if self.kind == "paired" and record.label is not None:
            raise DataError(
                f"{record.where}: the row has one completion with a label, not a pair; set "
                f"kind='unpaired', or write {records.PAIR}"
            )
        for part in record.unpaired() if self.kind == "unpaired" else (record,):
            prompt, completions = self.tokeniser(part)
            if not all(completions):
                raise DegenerateError("empty_completion", "a completion has no tokens")
            if self.kind == "paired" and completions[0] == completions[1]:
                raise DegenerateError(
                    "identical_tokens", "'chosen' and 'rejected' are the same tokens"
                )
            yield _Example(part, prompt, completions)

    def _suffices(self, counted: Mapping[str, Any]) -> bool:
        return self.invalid == "drop" or not counted["dropped"]  # else read on, to raise the error

    def _count_piece(self, piece: Piece, bad: BadRows) -> _Counts:
        counts = _Counts.of(self.splits)
        for example in self._examples(piece, None, bad, counts.dropped, counts.noted):
            split = self._split_of(example.record.prompt_text, piece.path)
            counts.examples[split] += 1
            counts.add_prompt(split, example.prompt)
        return counts

    def _total(self, counts: Mapping[Piece, _Counts]) -> dict[str, Any]:
        """Returns the numbers of examples of each split, and of dropped and reported rows."""
        total = _Counts.of(self.splits)
        for count in counts.values():
            for split, number in count.examples.items():
                total.examples[split] += number
                for prompt in count.prompts[split]:
                    total.add_prompt(split, prompt)
            total.dropped.merge(count.dropped)
            total.noted.merge(count.noted)
        examples, prompts, dropped, noted = total
        for split, count in examples.items():
            if not count:
                raise self._empty(split, sum(examples.values()), dropped)
            if self.kind == "unpaired" and len(prompts[split]) < 2:
                raise DataError(
                    f"{self.name}: all examples of the {split} split have one prompt. Unpaired data need "
                    "at least two prompts, since each completion is also scored after another prompt. "
                    "Add data, or change validation_fraction"
                )
        return {"examples": examples, "dropped": dropped, "noted": noted}


def _mismatched(
    examples: Iterable[_Example], others: Callable[[], Iterator[_Example]]
) -> Iterator[tuple[_Example, _Example]]:
    """Yields each example with the next one that has another prompt; `others()` follow after the last."""
    waiting: list[_Example] = []
    for example in examples:
        if waiting and example.prompt != waiting[0].prompt:
            yield from ((candidate, example) for candidate in waiting)
            waiting = []
        waiting.append(example)
    if waiting:
        other = next(candidate for candidate in others() if candidate.prompt != waiting[0].prompt)
        yield from ((candidate, other) for candidate in waiting)


@with_settings(PromptedSettings)
def register_pairs(
    *,
    name: str,
    files: str | Sequence[str],
    settings: PromptedSettings,
    kind: records.Kind = "paired",
    validation_files: str | Sequence[str] | None = None,
    invalid: Invalid = "drop",
) -> None:
    """Registers a task over files of rows in TRL's formats; see `records`.

    The files are JSON lines (also .gz and .zst), Parquet or Arrow, or data sets of Hugging Face.

    For 'paired' data, the features are the ids `prompt`, `chosen` and `rejected`, and `margin` (one float32; 0 if
    the row has none). For 'unpaired' data, `chosen` is the completion, and `labels` (one float32) is 1 if it is
    desirable and 0 if not. `rejected` is then the completion of the next example, in the order of the files, with
    another prompt: KTO uses these to estimate the policy's KL divergence (arXiv 2402.01306).

    Malformed rows are an error. Degenerate pairs are dropped and counted by reason, or are an error too (see
    `invalid`): completions that are equal as texts, equal without invisible characters, or equal as tokens; empty
    completions; and, in a row without a prompt, completions without a common beginning.

    Args:
      name: name of the task.
      files: one glob pattern or several.
      kind: 'paired', or 'unpaired'; a pair is then a desirable and an undesirable completion.
      validation_files: one glob pattern or several, of held-out files.
      invalid: 'drop' drops degenerate pairs, 'error' raises at the first one.

    `data.rows.files.PromptedSettings` describes the other arguments.

    Raises:
      FileNotFoundError: a pattern matches no file.
      DataError: a matching file is not of rows.
      ChatTemplateError: the chat template does not exist.
      ValueError: `kind` or `invalid` has an unknown value, or the vocabulary lacks the BOS or EOS to add.
    """
    check_choice(f"{name}: kind", kind, records.Kind)
    check_choice(f"{name}: invalid", invalid, Invalid)
    source = PreferenceFiles.open(
        settings,
        name=name,
        files=files,
        validation_files=validation_files,
        kind=kind,
        invalid=invalid,
    )
    tasks.register_rows(
        source,
        origin="register_pairs",
        features=dict.fromkeys(TOKENS, settings.vocabulary) | {NUMBER[kind]: None},
        facts={"kind": kind, **source.facts},
    )
