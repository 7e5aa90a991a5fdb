"""Base class of SeqIO sources that read JSON lines with a prompt in each row: preference pairs and prompts.

The sources satisfy `seqio.DataSourceInterface` without deriving from it, so that this module imports no TensorFlow, and
declare a `digest` of everything that decides their examples.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from data import tasks
from data.cache import fingerprint
from data.preference import tokens
from data.preference.records import Record
from data.text import document_files, document_source, splits

_SHUFFLE_BUFFER = 10_000  # only used by code that iterates the SeqIO task directly


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedFiles(abc.ABC):
    """Files of rows, by split.

    Attributes:
      name: name of the task.
      files: split -> files, in order. If `validation_fraction` is above 0, both splits have the same files.
      tokeniser: converts records to ids.
      validation_fraction: share of prompts to hold out, by hash.
      root: directory to which ids of rows are relative.
      cache: directory of remembered checksums and counts.
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

    @classmethod
    def open(
        cls,
        *,
        name: str,
        files: str | Sequence[str],
        vocabulary: Any,
        validation_files: str | Sequence[str] | None,
        validation_fraction: float,
        chat_template: str | None,
        add_bos: bool,
        add_eos: bool,
        data_root: str | None,
        cache_dir: str | os.PathLike | None,
        **fields: Any,
    ) -> Self:
        """Returns the source of a task; arguments and errors as in `data.preference.tasks.register_pairs`.

        `fields` are further fields of the subclass.
        """
        tasks.check_special_ids(name, vocabulary, add_bos=add_bos, add_eos=add_eos)
        by_split, validation_fraction = document_files.split_files(
            name=name,
            files=files,
            validation_files=validation_files,
            validation_fraction=validation_fraction,
            data_root=data_root,
        )
        return cls(
            name=name,
            files=by_split,
            tokeniser=tokens.Tokeniser(
                vocabulary=vocabulary,
                template=tokens.find_template(chat_template, vocabulary),
                add_bos=add_bos,
                add_eos=add_eos,
            ),
            validation_fraction=validation_fraction,
            root=document_files.common_root(by_split),
            cache=document_source.source_cache(cache_dir),
            **fields,
        )

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

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    @functools.cached_property
    def digest(self) -> str:
        """Returns the SHA-256 of everything that determines the examples and their order."""
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
        """Returns the examples of a split as a `tf.data.Dataset`; errors in files are raised here."""
        import tensorflow as tf

        # Checks all files, unless counts are remembered: inside TensorFlow an error would be a C++ stack trace.
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
        """Returns the number of examples of a split; reads all files once, and raises DataError for a malformed one."""

    @abc.abstractmethod
    def read_file(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        """Yields the features of the examples of one file and one split."""

    @abc.abstractmethod
    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """Returns shape and dtype of each feature besides `document_id`."""

    @abc.abstractmethod
    def _decides(self) -> dict[str, Any]:
        """Returns everything else that determines the examples of this kind of files, for the digest."""

    def _split_of(self, record: Record, path: str) -> str:
        if self.validation_fraction:
            held_out = splits.in_validation(record.prompt_text, self.validation_fraction)
            return "validation" if held_out else "train"
        return next(split for split, files in self.files.items() if path in files)
