"""A task: a source of examples, and how they become records of token ids, without SeqIO and TensorFlow.

`data.tasks` registers tasks. A record has an array for each output feature, `document_id`, and for a task of texts also
`targets_pretokenized`, the text; all strings are UTF-8 bytes. Records are those that SeqIO makes of the same task
(`data.seqio_tasks`), to the byte.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Texts that are encoded with one call of the tokeniser's library: enough that calls cost nothing, few enough to hold.
_BATCH_TEXTS, _BATCH_CHARACTERS = 1024, 1 << 20
TEXT, TARGETS, DOCUMENT_ID = "text", "targets", "document_id"

Record = dict[str, np.ndarray | bytes]


@dataclasses.dataclass(frozen=True)
class Feature:
    """One output feature of a task: a vector of each record.

    Attributes:
      vocabulary: of its ids; of numbers a pass-through vocabulary, or None for some features of users' SeqIO tasks.
      add_eos: whether a task of texts ends its ids with EOS.
      dtype: name of the type of its values: 'int32' or 'float32', or others of users' SeqIO tasks.
      required: whether each record has it.
    """

    vocabulary: Any
    add_eos: bool = False
    dtype: str = "int32"
    required: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task of this project; can be pickled if its source can.

    Attributes:
      name: of the task.
      source: has `splits`, `pieces(split)` and `read_examples(piece, split)`; see `data.data_source`.
      output_features: by name, in the order of names.
      tokenises: whether the source yields `text`, which becomes `targets`; else it yields the features themselves.
      add_bos: whether a task of texts begins `targets` with BOS.
      evaluation: what SeqIO evaluates the task by: arguments of `seqio.Task`.
    """

    name: str
    source: Any
    output_features: Mapping[str, Feature]
    tokenises: bool = False
    add_bos: bool = False
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_features", dict(sorted(self.output_features.items())))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.source.splits)

    def pieces(self, split: str) -> tuple[Any, ...]:
        """Returns the pieces of a split that can be read alone, in the order of its records."""
        return tuple(self.source.pieces(split))

    def made_by(self) -> dict[str, Any]:
        """Describes the steps from the source's examples to records, and the libraries that take them, as JSON."""
        vocabularies = [feature.vocabulary for feature in self.output_features.values()]
        every = {getattr(each, "library", "seqio") for each in vocabularies} - {None}
        return {
            "version": None,
            "steps": ["tokenise"] * self.tokenises + ["bos"] * self.add_bos,
            "libraries": {name: importlib.metadata.version(name) for name in sorted(every)},
        }

    def examples(self, split: str, pieces: Sequence[Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yields what the source reads of some pieces of a split, or of all; raises DataError."""
        for piece in self.pieces(split) if pieces is None else pieces:
            yield from self.source.read_examples(piece, split)

    def records(self, split: str, pieces: Sequence[Any] | None = None) -> Iterator[Record]:
        """Yields the records of some pieces of a split, or of all of them, in their order.

        Raises:
          DataError: a piece is malformed.
        """
        examples = self.examples(split, pieces)
        if self.tokenises:
            return self._tokenised(examples)
        return ({name: _plain(value) for name, value in each.items()} for each in examples)

    def _tokenised(self, examples: Iterable[Mapping[str, str]]) -> Iterator[Record]:
        feature = self.output_features[TARGETS]
        vocabulary = feature.vocabulary
        before = [vocabulary.bos_id] if self.add_bos else []
        after = [vocabulary.eos_id] if feature.add_eos else []
        ends = [np.array(ids, np.int32) for ids in (before, after)]
        for batch in _batches(examples):
            encoded = _encoded(vocabulary, [example[TEXT] for example in batch])
            for example, ids in zip(batch, encoded, strict=True):
                yield {
                    TARGETS: np.concatenate([ends[0], ids, ends[1]]) if before or after else ids,
                    f"{TARGETS}_pretokenized": example[TEXT].encode(),
                    DOCUMENT_ID: example[DOCUMENT_ID].encode(),
                }


def _batches(examples: Iterable[Mapping[str, str]]) -> Iterator[list[Mapping[str, str]]]:
    batch, characters = [], 0
    for example in examples:
        batch.append(example)
        characters += len(example[TEXT])
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(vocabulary: Any, texts: Sequence[str]) -> Sequence[np.ndarray]:
    if hasattr(vocabulary, "encode_batch"):
        return vocabulary.encode_batch(texts)
    return [np.asarray(vocabulary.encode_tf(text), np.int32) for text in texts]  # a user's SeqIO's


def _plain(value: Any) -> np.ndarray | bytes:
    return value.encode() if isinstance(value, str) else np.asarray(value)
