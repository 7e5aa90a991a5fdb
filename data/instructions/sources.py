"""Rows of a dataset with a prompt template as a SeqIO source: files of JSON lines or Parquet, or a prepared TFDS set."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from espalier.data.cache import fingerprint
from espalier.data.data_source import Counted, DataSource, FileSource
from espalier.data.instructions.encoding import Encoding
from espalier.data.instructions.templates import Row
from espalier.data.rows.records import Tally
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.tfds_source import TfdsSource

ROW = '{"premise": "...", "hypothesis": "...", "label": 0}'


class _Counted(Counted):
    """Counts of examples and tokens; a mixin for sources with `_rows` and `encoding`."""

    def tokens(self, split: str) -> int:
        """Returns the number of target tokens of a split."""
        return self._counted["tokens"][split]

    def _count(self) -> dict[str, Any]:
        dropped = Tally()
        counted: dict[str, Any] = {"examples": {}, "tokens": {}}
        for split in self.splits:
            examples = self.encoding.examples(self._rows(split), dropped)
            lengths = [len(example["targets"]) for example in examples]
            if not lengths:
                raise DataError(
                    f"{self.name}: the {split} split has no example ({str(dropped) or 'it has no row'}). Add rows, "
                    "or correct the template"
                )
            counted["examples"][split] = len(lengths)
            counted["tokens"][split] = sum(lengths)
        return {**counted, "dropped": dropped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionFiles(_Counted, FileSource):
    """Rows in files; the rows that are held out are the same for all templates."""

    encoding: Encoding

    def read_examples(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        yield from self.encoding.examples(self._rows_of(path, split))

    def _rows(self, split: str) -> Iterator[Row]:
        for path in self.files[split]:
            yield from self._rows_of(path, split)

    def _rows_of(self, path: str, split: str) -> Iterator[Row]:
        for number, where, row in documents.read_rows(pathlib.Path(path), example=ROW):
            text = json.dumps(row, sort_keys=True, default=str)
            if self._split_of(text, path) == split:
                id = f"{pathlib.Path(path).relative_to(self.root)}:{number}"
                yield Row(id, where, json.loads(text))

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        return self.encoding.specs()

    def _settings(self) -> dict[str, Any]:
        return {**self.encoding.settings(), "splits": splits.VERSION}


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
            lambda: self.encoding.examples(self._rows(split)), output_signature=signature
        )

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
