"""Files of prompts as a SeqIO source of tokens, each with what its row says for those who judge completions.

    {"prompt": "3 + 4 = ", "answer": "7"}
    {"prompt": [{"role": "user", "content": "3 + 4?"}], "answer": "7"}

The source satisfies `seqio.DataSourceInterface` without deriving from it, so that this module imports no
TensorFlow. It declares a `digest` of everything that decides its examples.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data import documents, fingerprint, splits
from data.documents import DataError
from data.preferences import tokens
from data.preferences.records import Record
from data.preferences.texts import text_of

# Part of the digest of a source: raise it when the same rows are read as other examples.
VERSION = 1
EXAMPLE = '{"prompt": "...", "answer": "..."}'
INFO = "info"  # bytes of the whole row as JSON
_SHUFFLE_BUFFER = 10_000  # only for those who iterate the task themselves


@dataclasses.dataclass(frozen=True)
class PromptFiles:
    """Prompts in files of JSON lines, in two splits.

    Attributes:
      name: of the task.
      files: split -> its files, in order. Where a fraction is held out, both splits name the same.
      tokeniser: what makes ids of prompts.
      validation_fraction: share held out, by the hash of the prompt.
      root: directory that ids of rows are relative to.
      cache: directory where checksums are remembered.
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
            "version": [VERSION, documents.VERSION, splits.VERSION, tokens.VERSION],
            "validation_fraction": self.validation_fraction,
            "vocabulary": fingerprint.vocabulary(self.tokeniser.vocabulary),
            "template": fingerprint.describe(template and [template.templates, template.variables]),
            "add_bos": self.tokeniser.add_bos,
            "files": files,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def num_input_examples(self, split: str) -> int:
        return self._counted[split]

    def list_shards(self, split: str) -> list[str]:
        return list(self.files[split])

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """The examples of a split as a `tf.data.Dataset`; problems with files are raised here."""
        import tensorflow as tf

        # Reads every file once: an error raised later, inside of TensorFlow, would be a C++ stack trace.
        _ = self._counted
        paths = self.list_shards(split)
        if shard_info is not None:
            paths = paths[shard_info.index :: shard_info.num_shards]

        def examples():
            for path in paths:
                yield from self.read_file(path, split)

        ids = tf.TensorSpec((None,), tf.int32)
        signature = {"prompt": ids, INFO: ids, "document_id": tf.TensorSpec((), tf.string)}
        dataset = tf.data.Dataset.from_generator(examples, output_signature=signature)
        return dataset.shuffle(_SHUFFLE_BUFFER, seed=seed) if shuffle else dataset

    def read_file(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        """The examples of one file that are in a split, as features.

        Raises:
          DataError: a row that is malformed; names its line.
        """
        name = os.path.relpath(path, self.root)
        for number, row in documents.read_json_lines(pathlib.Path(path), example=EXAMPLE):
            record = self._record(row, f"{path}, line {number}", f"{name}:{number}")
            if self._split_of(record, path) != split:
                continue
            prompt, _ = self.tokeniser(record)
            said = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
            yield {
                "prompt": np.array(prompt, np.int32),
                INFO: np.frombuffer(said, np.uint8).astype(np.int32),
                "document_id": record.id,
            }

    def _record(self, row: Mapping[str, Any], where: str, id: str) -> Record:
        if "prompt" not in row:
            raise DataError(
                f"{where}: no key 'prompt'; present are {', '.join(map(repr, row)) or 'none'}. A row is {EXAMPLE}"
            )
        prompt = text_of(row["prompt"], "prompt", where)
        if not prompt:
            raise DataError(f"{where}: 'prompt' is empty: drop the line")
        return Record(where=where, id=id, prompt=prompt, completions=())

    def _split_of(self, record: Record, path: str) -> str:
        if self.validation_fraction:
            held_out = splits.in_validation(record.prompt_text, self.validation_fraction)
            return "validation" if held_out else "train"
        return next(split for split, files in self.files.items() if path in files)

    @functools.cached_property
    def _counted(self) -> dict[str, int]:
        """Examples of each split.

        Raises:
          DataError: for a malformed file, or a split without an example.
        """
        counted = {
            split: sum(1 for path in paths for _ in self.read_file(path, split))
            for split, paths in self.files.items()
        }
        for split, count in counted.items():
            if not count:
                raise DataError(
                    f"{self.name}: {self.files[split][0]}: no prompt for the {split} split. Add prompts, or change "
                    "validation_fraction"
                )
        return counted
