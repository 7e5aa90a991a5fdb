"""What files of JSON lines with a prompt in each row have in common as SeqIO sources of tokens.

They satisfy `seqio.DataSourceInterface` without deriving from it, so that this module imports no TensorFlow, and
declare a `digest` of everything that decides their examples.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from data.cache import fingerprint
from data.preference import tokens
from data.preference.records import Record
from data.text import splits

_SHUFFLE_BUFFER = 10_000  # only for those who iterate the task themselves


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedFiles(abc.ABC):
    """Files of rows, in two splits.

    Attributes:
      name: of the task.
      files: split -> its files, in order. Where a fraction is held out, both splits name the same.
      tokeniser: what makes ids of records.
      validation_fraction: share held out, by the hash of the prompt.
      root: directory that ids of rows are relative to.
      cache: directory where checksums and counts are remembered.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    tokeniser: tokens.Tokeniser
    validation_fraction: float
    root: str
    cache: str

    caching_permitted = True
    supports_arbitrary_sharding = False
    performs_internal_shuffling = False

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decides the examples and their order."""
        digests = fingerprint.FileDigests(pathlib.Path(self.cache) / "file_digests.json")
        files = {
            split: [[os.path.relpath(path, self.root), digests.digest(path)] for path in paths]
            for split, paths in self.files.items()
        }
        digests.save()
        template = self.tokeniser.template
        content = {
            "validation_fraction": self.validation_fraction,
            "vocabulary": fingerprint.vocabulary(self.tokeniser.vocabulary),
            "template": fingerprint.describe(template and [template.templates, template.variables]),
            "files": files,
            **self._decides(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def list_shards(self, split: str) -> list[str]:
        return list(self.files[split])

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """The examples of a split as a `tf.data.Dataset`; problems with files are raised here."""
        import tensorflow as tf

        # Reads every file once, unless that was done before. An error raised later, inside of
        # TensorFlow, would reach people as a C++ stack trace.
        self.num_input_examples(split)
        paths = self.list_shards(split)
        if shard_info is not None:
            paths = paths[shard_info.index :: shard_info.num_shards]

        def examples():
            for path in paths:
                yield from self.read_file(path, split)

        signature = {
            **{name: tf.TensorSpec(*spec) for name, spec in self._features().items()},
            "document_id": tf.TensorSpec((), tf.string),
        }
        dataset = tf.data.Dataset.from_generator(examples, output_signature=signature)
        return dataset.shuffle(_SHUFFLE_BUFFER, seed=seed) if shuffle else dataset

    @abc.abstractmethod
    def num_input_examples(self, split: str) -> int:
        """Examples of a split, for which all files are read once; raises DataError for what is wrong with them."""

    @abc.abstractmethod
    def read_file(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        """The examples of one file that are in a split, as features."""

    @abc.abstractmethod
    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """Shape and dtype of each feature beside `document_id`."""

    @abc.abstractmethod
    def _decides(self) -> dict[str, Any]:
        """What of this kind of files decides the examples, by names of its own."""

    def _split_of(self, record: Record, path: str) -> str:
        if self.validation_fraction:
            held_out = splits.in_validation(record.prompt_text, self.validation_fraction)
            return "validation" if held_out else "train"
        return next(split for split, files in self.files.items() if path in files)
