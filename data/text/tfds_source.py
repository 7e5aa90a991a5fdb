"""Prepared TFDS sets as SeqIO data sources of `{"text", "document_id"}`."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.data import cpu_tensorflow
from espalier.data.cache import fingerprint
from espalier.data.data_source import DataSource
from espalier.data.pieces import Piece
from espalier.data.text.documents import DataError, Document, take
from espalier.data.text.splits import SPLITS


@dataclasses.dataclass(frozen=True)
class TfdsSource(DataSource):
    """Reads a prepared TFDS set; never downloads. Also provides texts to train a vocabulary from."""

    tfds_name: str  # name, config and version: `name/config:1.2.3`
    text_key: str | None  # feature that holds the text; None if only `as_dataset` is used
    # split of the task -> split or slice of the set; None for `train` and `validation`, if the set
    # has them
    wanted_splits: Mapping[str, str] | None
    data_dir: str | None  # directory of prepared TFDS sets; None for the TFDS default
    cache: str  # directory that stores checksums

    @functools.cached_property
    def builder(self) -> Any:
        cpu_tensorflow.load()  # before TFDS imports it
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.tfds_name, data_dir=self.data_dir, try_gcs=False)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"TFDS has no set {self.tfds_name!r} ({reason}). Check the name, or set data_dir to the "
                "directory of the prepared set"
            ) from None

    @functools.cached_property
    def split_map(self) -> Mapping[str, str]:
        """Split of the task -> split or slice of the set."""
        if self.wanted_splits is not None:
            return self.wanted_splits
        # A mocked set has no split info, and accepts any split.
        available = self.builder.info.splits or SPLITS
        return {split: split for split in SPLITS if split in available}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.split_map)

    def _wanted(self, split: str) -> str:
        if split not in self.split_map:
            raise ValueError(
                f"TFDS set {self.tfds_name!r}: no split {split!r}; present are "
                f"{', '.join(map(repr, self.split_map)) or 'none'}. Set splits to map {split!r} to a split "
                "or slice of the set"
            )
        return self.split_map[split]

    def check(self) -> None:
        """Raises ValueError if the set, the feature or a split does not exist."""
        info = self.builder.info
        if self.text_key is not None and self.text_key not in info.features:
            raise ValueError(
                f"TFDS set {self.tfds_name!r} has no feature {self.text_key!r}; present are "
                f"{', '.join(map(repr, sorted(info.features)))}. Correct text_key"
            )
        for wanted in self.split_map.values():
            base = wanted.partition("[")[0]
            if info.splits and "+" not in wanted and base not in info.splits:
                raise ValueError(
                    f"TFDS set {self.tfds_name!r} has no split {base!r}; present are "
                    f"{', '.join(map(repr, info.splits))}. Set splits to map the task's splits to these"
                )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the set's name and version, its splits, and the bytes of its local files."""
        digests = fingerprint.FileDigests(pathlib.Path(self.cache) / "file_digests.json")
        files = {
            split: [
                [os.path.basename(path), digests.digest(path) if os.path.isfile(path) else None]
                for path in self.list_shards(split)
            ]
            for split in self.splits
        }
        digests.save()
        content = [self.builder.info.full_name, self.text_key, dict(self.split_map), files]
        return fingerprint.of_json(content)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.tfds_name,)

    def size(self, source: str) -> int | None:
        wanted = self._wanted("train")
        splits = self.builder.info.splits
        return (splits[wanted].num_bytes or None) if splits else None  # 0 for a slice: unknown

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        """Yields the first documents, of about `num_bytes` bytes; TFDS prepares sets shuffled."""
        return take(self.documents(source, "train"), num_bytes)

    def documents(self, source: str, split: str) -> Iterator[Document]:
        for example in self.read_examples(Piece(split), split):
            yield Document(example["document_id"], example["text"])

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, str]]:
        """Yields the texts of a split, which is one piece.

        Raises:
          FileNotFoundError: the set is not prepared.
          DataError: a text is not UTF-8.
        """
        for example in self.get_dataset(split, shuffle=False).as_numpy_iterator():
            try:
                yield {name: value.decode() for name, value in example.items()}
            except UnicodeDecodeError as error:
                place = f"TFDS set {self.tfds_name!r}, {example['document_id'].decode()}"
                raise DataError(f"{place}: {self.text_key!r} is not UTF-8 ({error})") from None

    def num_input_examples(self, split: str) -> int | None:
        wanted = self._wanted(split)
        return self.builder.info.splits[wanted].num_examples if self.builder.info.splits else None

    def list_shards(self, split: str) -> list[str]:
        if not self.builder.info.splits:  # a mocked set has no files
            return [split]
        instructions = self.builder.info.splits[self._wanted(split)].file_instructions
        return [str(instruction.filename) for instruction in instructions]

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """Returns the texts of a split as a `tf.data.Dataset`.

        Raises:
          FileNotFoundError: the set is not prepared.
        """
        text_key = self.text_key
        return self.as_dataset(split, shuffle, seed, shard_info).map(
            lambda example: {"text": example[text_key], "document_id": example["tfds_id"]}
        )

    def as_dataset(self, split: str, shuffle=True, seed=None, shard_info=None):
        """Returns the examples of a split with all features and `tfds_id`; raises the errors of `get_dataset`."""
        import tensorflow as tf
        import tensorflow_datasets as tfds

        config = tfds.ReadConfig(add_tfds_id=True, shuffle_seed=seed)
        if shard_info is not None:
            config.input_context = tf.distribute.InputContext(
                num_input_pipelines=shard_info.num_shards, input_pipeline_id=shard_info.index
            )
        try:
            return self.builder.as_dataset(
                split=self._wanted(split), shuffle_files=shuffle, read_config=config
            )
        except AssertionError:
            raise FileNotFoundError(
                f"TFDS set {self.tfds_name!r} is not prepared in {self.builder.data_dir}. Prepare it "
                f"on a machine with access to its source: tfds build {self.tfds_name}, then set "
                "data_dir"
            ) from None
