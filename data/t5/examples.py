"""Files of inputs with targets, for encoder-decoders: a SeqIO source of tokens, and the task that it becomes.

    {"inputs": "translate English to German: The house is wonderful.", "targets": "Das Haus ist wunderbar."}

Texts end with EOS. Lists of ids are taken as they are; "loss_weights" may then have a weight for each id of the targets, 0
for one that is read but not learnt. Other keys are ignored.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from espalier.data import tasks
from espalier.data.cache import fingerprint
from espalier.data.pieces import Piece
from espalier.data.rows import sentences
from espalier.data.rows.files import ExactSplit, PromptedSettings
from espalier.data.rows.records import DegenerateError
from espalier.data.stream import rows
from espalier.data.stream.stream import with_settings
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows, Row

# Part of the digest of a source: raise it when the same rows become other examples.
VERSION = 1
EXAMPLE = '{"inputs": "...", "targets": "..."}'
_WEIGHTS = "loss_weights"


class _Example(NamedTuple):
    key: str  # examples with equal inputs are in one split
    id: str
    inputs: list[int]
    targets: list[int]
    weights: list[float]  # of the targets
    sentence: Mapping[str, np.ndarray]  # its embedding, if there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleFiles(ExactSplit):
    """Inputs with targets in JSON lines or Parquet, by split; the held-out share is exact.

    Attributes:
      vocabulary: a SeqIO vocabulary.
      keys: the keys of inputs and targets in a row.
      inputs_eos: whether inputs that are texts end with EOS. Targets always do.
      sentences: whether rows have embeddings, see data/rows/sentences.py.
    """

    MACRO: ClassVar[str] = "EXAMPLES"

    vocabulary: Any
    keys: tuple[str, str]
    inputs_eos: bool
    sentences: bool = False

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        for example in self._examples(piece, split, self._bad_rows()):
            yield {
                "inputs": np.array(example.inputs, np.int32),
                "targets": np.array(example.targets, np.int32),
                _WEIGHTS: np.array(example.weights, np.float32),
                "document_id": example.id,
                **example.sentence,
            }

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        ids = ((None,), "int32")
        weights = {_WEIGHTS: ((None,), "float32")}
        return {"inputs": ids, "targets": ids, **weights, **sentences.features(self.sentences)}

    def _settings(self) -> dict[str, Any]:
        return {
            "version": [VERSION, splits.VERSION, documents.VERSION],
            "vocabulary": fingerprint.vocabulary(self.vocabulary),
            "keys": self.keys,
            "inputs_eos": self.inputs_eos,
            **({"sentences": True} if self.sentences else {}),
        }

    def _examples(
        self,
        piece: Piece,
        split: str | None,
        bad: BadRows,
        dropped: tasks.Tally | None = None,
    ) -> Iterator[_Example]:
        def use(row: Row) -> Iterator[_Example]:
            id = f"{self.relative(piece.path)}:{row.number}"
            try:
                example = self._example(row.content, row.where, id)
            except DegenerateError as error:
                if dropped is not None:
                    dropped.add(error.reason, id)
                return
            if split is None or self._split_of(example.key, piece.path) == split:
                yield example

        read = documents.read_rows(piece, example=EXAMPLE, bad=bad)
        return self._usable(piece, read, use, bad)

    def _example(self, row: Mapping[str, Any], where: str, id: str) -> _Example:
        """Returns the tokens of a row; raises DataError if it is malformed, DegenerateError if nothing can be learnt."""
        read, learnt = self.keys
        inputs = self._ids(row, read, where, eos=self.inputs_eos)
        targets = self._ids(row, learnt, where, eos=True)
        weights = self._weights(row, targets, where)
        if not any(weights):
            raise DegenerateError("no_weight", f"no id of {learnt!r} has a weight above 0")
        sentence = {rows.SENTENCE: sentences.of_row(row, where)} if self.sentences else {}
        return _Example(f"{row[read]!r}", id, inputs, targets, weights, sentence)

    def _ids(self, row: Mapping[str, Any], key: str, where: str, *, eos: bool) -> list[int]:
        value = row.get(key)
        if isinstance(value, str):
            documents.check_unicode(value, key, where)
            if not value.strip():
                raise DegenerateError(f"empty_{key}", f"{key!r} is empty")
            return [*self.vocabulary.encode(value), *([self.vocabulary.eos_id] if eos else [])]
        if value is None:
            raise DataError(
                f"{where}: no key {key!r}; present are {', '.join(map(repr, row)) or 'none'}. A row is {EXAMPLE}: rename "
                "its keys, or set INPUTS_KEY and TARGETS_KEY"
            )
        if not isinstance(value, list) or not all(type(x) is int for x in value):
            raise DataError(f"{where}: {key!r} is neither a text nor a list of ids; write one")
        size = self.vocabulary.vocab_size
        if wrong := [x for x in value if not 0 <= x < size]:
            raise DataError(
                f"{where}: {key!r} has the id {wrong[0]}, and the vocabulary {size} entries: give ids of this vocabulary"
            )
        if not value:
            raise DegenerateError(f"empty_{key}", f"{key!r} is empty")
        return value

    def _weights(self, row: Mapping[str, Any], targets: Sequence[int], where: str) -> list[float]:
        if _WEIGHTS not in row:
            return [1.0] * len(targets)
        weights, key = row[_WEIGHTS], self.keys[1]
        if not isinstance(row[key], list):
            raise DataError(
                f"{where}: {_WEIGHTS!r} weighs ids, and {key!r} is a text: write a list of ids, or remove the weights"
            )
        numbers = isinstance(weights, list) and all(type(x) in (int, float) for x in weights)
        if not numbers or not all(0 <= x < math.inf for x in weights):
            raise DataError(
                f"{where}: {_WEIGHTS!r} is no list of numbers from 0 on; write one for each id of {key!r}"
            )
        if len(weights) != len(targets):
            raise DataError(
                f"{where}: {_WEIGHTS!r} has {len(weights)} numbers, and {key!r} {len(targets)} ids; write one for each"
            )
        return [float(x) for x in weights]


@with_settings(
    PromptedSettings,
    *("vocabulary", "validation_fraction", "on_bad_row", "data_root", "cache_dir"),
)
def register_examples(
    *,
    name: str,
    files: str | Sequence[str],
    settings: PromptedSettings,
    validation_files: str | Sequence[str] | None = None,
    inputs_key: str = "inputs",
    targets_key: str = "targets",
    inputs_eos: bool = True,
    with_sentences: bool = False,
) -> None:
    """Registers a task over files of inputs with targets: JSON lines (also .gz and .zst) or Parquet.

    The features are the ids `inputs` and `targets`, and `loss_weights` of the targets. Malformed rows are an error, see
    `on_bad_row`. Rows from which nothing can be learnt are dropped and counted by reason.

    Args:
      name: name of the task.
      files: one glob pattern or several.
      validation_files: one glob pattern or several, of held-out files.
      inputs_key, targets_key: keys of a row.
      inputs_eos: end inputs that are texts with EOS. Targets that are texts always end with it.
      with_sentences: read an embedding of each row for routers, see data/rows/sentences.py.

    `data.rows.files.PromptedSettings` describes the other arguments; rows with equal inputs are in one split.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ValueError: the vocabulary has no EOS.
    """
    vocabulary = settings.vocabulary
    tasks.check_special_ids(name, vocabulary, add_bos=False, add_eos=True)
    source = ExampleFiles.find(
        name=name,
        files=files,
        validation_files=validation_files,
        validation_fraction=settings.validation_fraction,
        on_bad_row=settings.on_bad_row,
        data_root=settings.data_root,
        cache_dir=settings.cache_dir,
        vocabulary=vocabulary,
        keys=(inputs_key, targets_key),
        inputs_eos=inputs_eos,
        sentences=with_sentences,
    )
    embedded = dict.fromkeys(sentences.features(with_sentences))
    tasks.register_rows(
        source,
        origin="register_examples",
        features={"inputs": vocabulary, "targets": vocabulary, _WEIGHTS: None, **embedded},
        facts={"vocabulary": str(vocabulary), "inputs_eos": inputs_eos},
    )
