"""Rows of a dataset with a prompt template as a SeqIO source: files of JSON lines or Parquet, or a prepared TFDS set.

An example has vectors of ids, and what ranking and loss need.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from espalier.data.cache import fingerprint
from espalier.data.data_source import Counted, DataSource, FileSource
from espalier.data.instructions import templates
from espalier.data.instructions.templates import Rendered, Row, Template
from espalier.data.pieces import Piece
from espalier.data.rows import columns
from espalier.data.rows.columns import Columns
from espalier.data.tasks import Tally
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows
from espalier.data.text.tfds_source import TfdsSource

Form = Literal["encoder_decoder", "decoder"]

# Part of the digest of a source: raise it when the same texts become other examples.
VERSION = 1
RIGHT = "is_right"  # feature of an example for ranking: whether its choice is the row's target


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """Converts inputs and targets to ids, separately, so that all answers follow the same ids.

    Attributes:
      vocabulary: a SeqIO vocabulary.
      form: 'encoder_decoder' for inputs and targets; 'decoder' for both in `targets`, with loss on the answer alone.
      separator: between the input and the answer of a decoder.
      add_bos: begin the input of a decoder with BOS.
      inputs_eos: end the inputs of an encoder with EOS. Targets always end with it.
    """

    vocabulary: Any
    form: Form
    separator: str
    add_bos: bool
    inputs_eos: bool

    def inputs(self, text: str) -> list[int]:
        """Returns the ids of an input, of a decoder with the separator and without BOS."""
        if self.form == "decoder":
            return list(self.vocabulary.encode(text + self.separator))
        return [*self.vocabulary.encode(text), *([self.vocabulary.eos_id] * self.inputs_eos)]

    def target(self, text: str) -> list[int]:
        return [*self.vocabulary.encode(text), self.vocabulary.eos_id]

    @property
    def facts(self) -> dict[str, Any]:
        """Settings for the record of a run."""
        fields = ("form", "separator", "add_bos", "inputs_eos")
        return {"vocabulary": str(self.vocabulary), **{key: getattr(self, key) for key in fields}}


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The examples that a template makes of rows.

    Attributes:
      template: the prompt template.
      tokeniser: converts texts to ids.
      ranking: whether each answer choice of a row is an example, instead of its target.
    """

    template: Template
    tokeniser: Tokeniser
    ranking: bool

    def examples(self, rows: Iterable[Row], dropped: Tally | None = None) -> Iterator[dict]:
        """Yields the features of examples; counts rows for which the template renders nothing."""
        for row, texts in self.template.render(rows):
            if texts is None:
                if dropped is not None:
                    dropped.add("not_rendered", row.id)
                continue
            where = f"{self.template.where}, {row.where}"
            for text in (texts.inputs, texts.target, *texts.choices):
                documents.check_unicode(text, "the text", where)
            examples = self._options(texts) if self.ranking else [self._example(texts)]
            for example in examples:
                yield example | {"document_id": row.id}

    def _example(self, texts: Rendered) -> dict[str, Any]:
        tokeniser = self.tokeniser
        inputs, target = tokeniser.inputs(texts.inputs), tokeniser.target(texts.target)
        if tokeniser.form == "encoder_decoder":
            return {"inputs": _ids(inputs), "targets": _ids(target)}
        if tokeniser.add_bos:
            inputs = [tokeniser.vocabulary.bos_id, *inputs]
        learnt = np.repeat(np.float32([0, 1]), [len(inputs), len(target)])
        return {"targets": _ids([*inputs, *target]), "loss_weights": learnt}

    def _options(self, texts: Rendered) -> Iterator[dict[str, Any]]:
        inputs = _ids(self.tokeniser.inputs(texts.inputs))
        for choice in texts.choices:
            targets = _ids(self.tokeniser.target(choice))
            yield {"inputs": inputs, "targets": targets, RIGHT: _ids([choice == texts.target])}

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features of an example, besides `document_id`."""
        if self.ranking:
            return ("inputs", "targets", RIGHT)
        decoder = self.tokeniser.form == "decoder"
        return ("targets", "loss_weights") if decoder else ("inputs", "targets")

    def specs(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """Returns shape and dtype of each feature."""
        return {
            name: ((None,), "float32" if name == "loss_weights" else "int32")
            for name in self.features
        }

    def settings(self) -> Mapping[str, Any]:
        """Returns everything that determines the examples of rows, as JSON, for a digest."""
        template = self.template
        return {
            "version": [VERSION, templates.VERSION, documents.VERSION],
            "template": [template.name, template.jinja, template.answer_choices],
            "ranking": self.ranking,
            **self.tokeniser.facts,
            "vocabulary": fingerprint.vocabulary(self.tokeniser.vocabulary),
        }


def _ids(values: Any) -> np.ndarray:
    return np.array(values, np.int32)


ROW = '{"premise": "...", "hypothesis": "...", "label": 0}'


class _Lengths(NamedTuple):
    """What is counted of a part of a split."""

    examples: int
    tokens: int  # of the targets
    dropped: Tally

    @classmethod
    def of(cls, encoding: Encoding, rows: Iterable[Row]) -> "_Lengths":
        dropped = Tally()
        lengths = [len(example["targets"]) for example in encoding.examples(rows, dropped)]
        return cls(len(lengths), sum(lengths), dropped)


class _Counted(Counted):
    """Counts of examples and tokens; a mixin for sources with `encoding`."""

    def tokens(self, split: str) -> int:
        """Returns the number of target tokens of a split."""
        return self._counted["tokens"][split]

    def _counted_splits(self, parts: Mapping[str, Sequence[_Lengths]]) -> dict[str, Any]:
        """Returns the counts of splits from those of their parts."""
        dropped = Tally()
        counted: dict[str, Any] = {"examples": {}, "tokens": {}}
        for split, lengths in parts.items():
            for part in lengths:
                dropped.merge(part.dropped)
            counted["examples"][split] = sum(part.examples for part in lengths)
            counted["tokens"][split] = sum(part.tokens for part in lengths)
            if not counted["examples"][split]:
                raise DataError(
                    f"{self.name}: the {split} split has no example ({str(dropped) or 'it has no row'}). Add rows, "
                    "or correct the template"
                )
        return {**counted, "dropped": dropped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionFiles(_Counted, FileSource):
    """Rows in files; the rows that are held out are the same for all templates."""

    encoding: Encoding
    columns: Columns | None = None  # of the keys of a row, see `data.rows.columns`

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        return self.encoding.examples(self._rows_of(piece, split, self._bad_rows()))

    def _rows_of(self, piece: Piece, split: str, bad: BadRows) -> Iterator[Row]:
        for row in columns.read(piece, example=ROW, columns=self.columns, bad=bad):
            text = json.dumps(row.content, sort_keys=True, default=str)
            if self._split_of(text, piece.path) == split:
                id = f"{self.relative(piece.path)}:{row.number}"
                yield Row(id, row.where, json.loads(text))

    def _count_piece(self, piece: Piece, bad: BadRows) -> dict[str, _Lengths]:
        counts = {}
        for split in self.splits:
            rows = self._rows_of(piece, split, bad)
            counts[split] = _Lengths.of(self.encoding, rows)
            bad = None if bad is None else []  # those of the first reading count
        return counts

    def _total(self, counts: Mapping[Piece, Mapping[str, _Lengths]]) -> dict[str, Any]:
        return self._counted_splits(
            {split: [count[split] for count in counts.values()] for split in self.splits}
        )

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        return self.encoding.specs()

    def _settings(self) -> dict[str, Any]:
        return {
            **self.encoding.settings(),
            "splits": splits.VERSION,
            **columns.settings(self.columns),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionTfds(_Counted, DataSource):
    """Rows of a prepared TFDS set, in its order."""

    name: str
    rows: TfdsSource
    encoding: Encoding

    @property
    def splits(self) -> tuple[str, ...]:
        return self.rows.splits

    @functools.cached_property
    def digest(self) -> str:
        return fingerprint.of_json([self.rows.digest, self.encoding.settings()])

    @property
    def _counts_file(self) -> pathlib.Path:
        return pathlib.Path(self.rows.cache) / "counted" / f"{self.digest}.json"

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """Returns the examples of a split as a `tf.data.Dataset`; token caches read without shuffling.

        Raises:
          FileNotFoundError: the set is not prepared.
          DataError: a row cannot be rendered.
        """
        import tensorflow as tf

        del shuffle, seed, shard_info  # there is one shard
        self.num_input_examples(split)  # an error inside TensorFlow would be a C++ stack trace
        signature = {name: tf.TensorSpec(*spec) for name, spec in self.encoding.specs().items()}
        signature["document_id"] = tf.TensorSpec((), tf.string)
        return tf.data.Dataset.from_generator(
            lambda: self.read_examples(split, split), output_signature=signature
        )

    def _count(self) -> dict[str, Any]:
        return self._counted_splits(
            {split: [_Lengths.of(self.encoding, self._rows(split))] for split in self.splits}
        )

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        """Yields the examples of a split, which is one piece."""
        yield from self.encoding.examples(self._rows(split))

    def _rows(self, split: str) -> Iterator[Row]:
        for example in self.rows.as_dataset(split, shuffle=False).as_numpy_iterator():
            id = example.pop("tfds_id").decode()
            yield Row(id, f"TFDS set {self.rows.tfds_name!r}, {id}", _plain(example))


def _plain(value: Any) -> Any:
    """Returns a value of TFDS as JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
