"""Base classes of data sources: of files, and of generated documents.

The sources satisfy `seqio.DataSourceInterface` without deriving from it, so that they can be imported
without TensorFlow. Each has a `digest` of everything that determines its examples.
"""

import abc
import dataclasses
import functools
import glob
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np

from espalier.common import spelling
from espalier.common.ranges import check_choice
from espalier.common.storage import paths, ranges
from espalier.data import pieces as pieces_lib
from espalier.data.cache import cache_dir as cache
from espalier.data.cache import fingerprint
from espalier.data.counting import ReadByPieces
from espalier.data.pieces import Piece
from espalier.data.text import documents, hf_datasets, splits, tables
from espalier.data.text.row_files import OnBadRow

Patterns = str | Sequence[str]
Files = Patterns | Mapping[str, Patterns]  # one set of files, or several by name
_SHUFFLE_BUFFER = 10_000  # token caches read without shuffling; for direct iteration of a task


class DataSource:
    """What tasks ask of a source, and the flags of SeqIO's interface.

    `read_examples` yields dicts: of strings, `text` and `document_id`, or of arrays by feature with `document_id`.
    """

    caching_permitted = True
    supports_arbitrary_sharding = False
    performs_internal_shuffling = False

    def pieces(self, split: str) -> tuple[Piece, ...]:
        """Returns what can be read alone, in order: by default the whole split."""
        return pieces_lib.parts(split, 1)


class Counted(abc.ABC):
    """A source whose examples are counted once; the counts are stored in `_counts_file`."""

    @property
    @abc.abstractmethod
    def _counts_file(self) -> pathlib.Path: ...

    def num_input_examples(self, split: str) -> int:
        """Returns the number of examples of a split; checks all files, and raises DataError."""
        return self._counted["examples"][split]

    @property
    def dropped(self) -> Mapping[str, Any]:
        """Reason -> number of dropped rows, and the place of the first."""
        return self._counted["dropped"]

    @functools.cached_property
    def _counted(self) -> dict[str, Any]:
        counted = cache.recall(self._counts_file)
        if counted is None or not self._suffices(counted):
            counted = self._count()
            cache.remember(self._counts_file, counted, shared=True)
        return counted

    def _suffices(self, counted: Mapping[str, Any]) -> bool:
        """Returns whether stored counts stand for a reading of the files."""
        del counted
        return True

    @abc.abstractmethod
    def _count(self) -> dict[str, Any]:
        """Reads all examples; returns 'examples' by split, 'dropped', and what else is stored; raises DataError."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSource(ReadByPieces, Counted, DataSource):
    """Examples in files, which are read by pieces (data/pieces.py)."""

    name: str  # name of the task that reads the files
    # split -> its files, in order. If a fraction is held out, both splits have the same files
    files: Mapping[str, tuple[str, ...]]
    validation_fraction: float  # share of examples held out, by the hash of a text
    root: str  # directory to which the ids of examples are relative, see `paths.as_path`
    cache: str  # directory that stores checksums and counts
    # the objects of a store among the files, which are read where they are: address -> its size and version
    objects: Mapping[str, paths.Entry] = dataclasses.field(default_factory=dict)
    # whether a row that cannot be used is an error, or is left out, counted and listed
    on_bad_row: OnBadRow = "error"

    def __post_init__(self):
        check_choice(f"{self.name}: on_bad_row", self.on_bad_row, OnBadRow)

    @classmethod
    def of(
        cls,
        name: str,
        files: Mapping[str, Sequence[str]],
        *,
        validation_fraction: float = 0.0,
        objects: Mapping[str, paths.Entry] = MappingProxyType({}),
        cache_dir: str | os.PathLike | None = None,
        **fields: Any,
    ) -> Self:
        """Returns the source of the files of each split; `fields` are fields of the subclass, for `objects` see there."""
        every = {path for each in files.values() for path in each}
        folders = [os.path.dirname(paths.as_path(path)) for path in every]
        return cls(
            name=name,
            files={split: tuple(each) for split, each in files.items()},
            objects={
                path: objects.get(path) or paths.entry(path)
                for path in sorted(every)
                if paths.is_remote(path)
            },
            validation_fraction=validation_fraction,
            root=os.path.commonpath(folders),
            cache=str(cache.cache_dir("files", override=cache_dir)),
            **fields,
        )

    @classmethod
    def find(
        cls,
        *,
        name: str,
        files: Patterns,
        validation_files: Patterns | None,
        validation_fraction: float,
        data_root: str | None,
        **fields: Any,
    ) -> Self:
        """Returns the source of the files that match patterns; `fields` are the fields of the source, as in `of`.

        `data.text.document_files.find` describes the arguments and errors.
        """
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"{name}: validation_fraction is {validation_fraction}; it must be in [0, 1)"
            )
        found = {"train": _expand(name, "files", files, data_root)}
        if validation_files is None and _have_validation(files, data_root):
            validation_files = files
        if validation_files is not None:
            validation_fraction = 0.0
            found["validation"] = _expand(
                name, "validation_files", validation_files, data_root, split="validation"
            )
            if both := sorted(set(found["train"]) & set(found["validation"])):
                raise ValueError(
                    f"{name}: {spelling.few(both, 3)} is matched by files and by validation_files; make the "
                    "patterns disjoint"
                )
        elif validation_fraction:
            found["validation"] = found["train"]
        objects = {
            path: entry
            for each in found.values()
            for path, entry in each.items()
            if entry is not None
        }
        return cls.of(
            name,
            {split: tuple(each) for split, each in found.items()},
            objects=objects,
            validation_fraction=validation_fraction,
            **fields,
        )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """File -> SHA-256 of its bytes; stored, and valid while size, times and inode match."""
        return {path: digest for path, (digest, _) in self._scanned.items()}

    def pieces(self, split: str) -> tuple[Piece, ...]:
        """Returns what can be read alone, in the order of the examples; raises DataError if a file is not readable."""
        return self._pieces_of(self.files[split])

    def _pieces_of(self, files: Iterable[str]) -> tuple[Piece, ...]:
        return tuple(piece for path in files for piece in self._scanned[path][1])

    @functools.cached_property
    def _scanned(self) -> dict[str, tuple[str, tuple[Piece, ...]]]:
        """File -> its checksum and its pieces, which other processes are given with the source."""
        files = dict.fromkeys(path for each in self.files.values() for path in each)
        wholes = [self.whole(path) for path in files]
        digests = fingerprint.FileDigests(
            pathlib.Path(self.cache) / "file_digests.json", self.objects
        )
        unit = self._document_per
        grouped = {
            whole.path: functools.partial(tables.groups, whole)
            for whole in wholes
            if whole.size > pieces_lib.BLOCK_BYTES and documents.is_table(whole.path)
        }
        digests.read(
            files, [x for x in files if documents.is_by_line(x, document_per=unit)], grouped
        )
        return {
            whole.path: (
                digests.digest(whole.path),
                documents.divided(whole, digests, document_per=unit),
            )
            for whole in wholes
        }

    def whole(self, path: str) -> Piece:
        """Returns a file as one piece."""
        if (entry := self.objects.get(path)) is not None:
            return Piece(path, size=entry.size, version=entry.version)
        return Piece(path, size=os.path.getsize(path), version=ranges.version(path))

    @property
    def local_folders(self) -> tuple[str, ...]:
        """The folder of the files that are no objects of a store, which whoever reads them must see; () if there are none."""
        every = [path for each in self.files.values() for path in each if path not in self.objects]
        return (os.path.commonpath(list(map(os.path.dirname, every))),) if every else ()

    def relative(self, path: str) -> str:
        """Returns the name of a file in ids and digests."""
        return os.path.relpath(paths.as_path(path), self.root)

    @property
    def _document_per(self) -> str:
        """The unit of an example in a text file."""
        return "file"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over everything that determines the examples and their order."""
        files = {
            split: [[self.relative(path), self.checksums[path]] for path in each]
            for split, each in self.files.items()
        }
        content = {
            "validation_fraction": self.validation_fraction,
            "files": files,
            **self._settings(),
            # absent by default, so that older digests remain valid
            **({"on_bad_row": self.on_bad_row} if self.on_bad_row != "error" else {}),
        }
        return fingerprint.of_json(content)

    def list_shards(self, split: str) -> list[str]:
        """Returns a name for each shard of a build."""
        return [f"{split} {i}" for i in range(len(pieces_lib.grouped(self.pieces(split))))]

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """Returns the examples of a split as a `tf.data.Dataset`.

        Raises:
          DataError: a file is malformed, or a split has no example.
        """
        import tensorflow as tf

        # Reads every file once, unless the counts are stored. An error raised later, inside
        # TensorFlow, would appear as a C++ stack trace.
        self.num_input_examples(split)
        shards = pieces_lib.grouped(self.pieces(split))
        if shard_info is not None:
            shards = shards[shard_info.index :: shard_info.num_shards]

        def examples():
            for shard in shards:
                for piece in shard:
                    yield from self.read_examples(piece, split)

        signature = {name: tf.TensorSpec(*spec) for name, spec in self._features().items()}
        signature["document_id"] = tf.TensorSpec((), tf.string)
        dataset = tf.data.Dataset.from_generator(examples, output_signature=signature)
        return dataset.shuffle(_SHUFFLE_BUFFER, seed=seed) if shuffle else dataset

    @abc.abstractmethod
    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        """Yields the features of the examples of one piece that are in a split."""

    @abc.abstractmethod
    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """Returns shape and dtype of each feature besides `document_id`."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Returns everything else that determines the examples, as JSON, for the digest."""

    @property
    def bad_rows(self) -> Mapping[str, Any]:
        """Number of rows that cannot be used and are left out, the first ones, and the file that lists all; {} if they are errors."""
        return self._counted["bad_rows"] if self.on_bad_row == "skip" else {}

    def _split_of(self, text: str, path: str) -> str:
        if self.validation_fraction:
            held_out = splits.in_validation(text, self.validation_fraction)
            return "validation" if held_out else "train"
        return next(split for split, paths in self._file_sets.items() if path in paths)

    @functools.cached_property
    def _file_sets(self) -> dict[str, frozenset[str]]:
        return {split: frozenset(paths) for split, paths in self.files.items()}

    @property
    def _counts_file(self) -> pathlib.Path:
        return pathlib.Path(self.cache) / "counted" / f"{self.digest}.json"


def named_sets(
    name: str, files: Files, validation_files: Files | None
) -> dict[str, tuple[Patterns, Patterns | None]]:
    """Returns {set: (patterns of its files, patterns of its held-out files)}; a single set has the given name.

    Raises:
      ValueError: `files` and `validation_files` name different sets.
    """
    if not isinstance(files, Mapping) and not isinstance(validation_files, Mapping):
        return {name: (files, validation_files)}
    sets = files if isinstance(files, Mapping) else {name: files}
    held_out = dict.fromkeys(sets) if validation_files is None else validation_files
    if not sets or not isinstance(held_out, Mapping) or held_out.keys() != sets.keys():
        raise ValueError(
            f"{name}: files and validation_files must name the same sets. validation_files is {validation_files!r}; "
            f"the sets are {', '.join(sets)}"
        )
    return {each: (patterns, held_out[each]) for each, patterns in sets.items()}


def _expand(
    name: str, argument: str, patterns: Patterns, data_root: str | None, split: str = "train"
) -> dict[str, paths.Entry | None]:
    """Returns all files that match, sorted, without directories, with the entries of objects; of data sets those of a split."""
    files: dict[str, paths.Entry | None] = {}
    matches: Mapping[str, paths.Entry | None]
    for pattern, full in _absolute(patterns, data_root).items():
        if hf_datasets.is_address(full) or not glob.has_magic(full) and hf_datasets.is_set(full):
            matches = dict.fromkeys(hf_datasets.files(full, split))
        elif paths.is_remote(full):
            matches = paths.matches(full)
            hf_datasets.check_outside(list(matches))
        else:
            found = glob.glob(full, recursive=True)
            sets = [path for path in found if os.path.isdir(path) and hf_datasets.is_set(path)]
            plain = [path for path in found if os.path.isfile(path)]
            hf_datasets.check_outside(plain)
            of_sets = (path for each in sets for path in hf_datasets.files(each, split))
            matches = dict.fromkeys([*plain, *of_sets])
        if not matches:
            raise FileNotFoundError(
                f"{name}: {argument}={pattern!r} matches no file ({full}). Check the path; a "
                f"relative one starts at {'data_root' if data_root else 'the working directory'}"
            )
        files.update(matches)
    if not files:
        raise ValueError(f"{name}: {argument} is empty; give a glob such as 'data/*.jsonl.zst'")
    for path in sorted(files):
        documents.check_suffix(path)
    return dict(sorted(files.items()))


def _have_validation(files: Patterns, data_root: str | None) -> bool:
    """Returns whether all are data sets that have a split for validation."""
    every = _absolute(files, data_root).values()
    return bool(every) and all(
        not glob.has_magic(path) and hf_datasets.has_split(path, "validation") for path in every
    )


def _absolute(patterns: Patterns, data_root: str | None) -> dict[str, str]:
    """Returns {pattern: its absolute path or address}."""
    found = {}
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        address = hf_datasets.is_address(pattern) or paths.is_remote(pattern)
        root = "" if address else _expanded(data_root or "")
        full = paths.join(root, _expanded(pattern))
        found[pattern] = full if hf_datasets.is_address(full) else paths.absolute(full)
    return found


def _expanded(path: str | os.PathLike) -> str:
    return os.path.expandvars(os.path.expanduser(path))


@dataclasses.dataclass(frozen=True)
class GeneratedSource(DataSource, abc.ABC):
    """Documents drawn at random, the same for the same fields."""

    name: str
    train_documents: int
    seed: int

    splits: ClassVar[tuple[str, ...]] = splits.SPLITS
    validation_documents: ClassVar[int] = 1024

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """Everything that determines the documents."""

    def texts(self, split: str) -> list[str]:
        """Returns all documents of a split."""
        raise NotImplementedError

    def examples(self, split: str) -> dict[str, Sequence[str] | np.ndarray]:
        """Returns {feature: values of all documents}; by default `text` and `document_id`."""
        texts = self.texts(split)
        ids = [f"{self.name}/{split}/{i}" for i in range(len(texts))]
        return {"text": texts, "document_id": ids}

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        """Yields the examples of a split, which is one piece."""
        columns = self.examples(split)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))

    def num_input_examples(self, split: str) -> int:
        return self.train_documents if split == "train" else self.validation_documents

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """Returns a `tf.data.Dataset`; the documents are already in random order, in one shard."""
        import tensorflow as tf

        del shuffle, shard_info
        return tf.data.Dataset.from_tensor_slices(self.examples(split))
