"""A named set of data files, its documents, and their division into training and validation."""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import tqdm

from data.cache import cache_dir as cache
from data.cache import fingerprint
from data.text import document_filters, documents, splits
from data.text.document_filters import DocumentFilter, Sieve
from data.text.documents import DataError, Document, Format

Patterns = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class DocumentFiles:
    """Documents in files, in two splits.

    Attributes:
      name: name of the task that reads the files.
      files: split -> its files, in order. If a fraction is held out, both splits have the same
        files.
      format: how documents are stored in the files.
      validation_fraction: share of documents held out, by the hash of their text.
      root: directory that document ids are relative to.
      cache: directory that stores checksums and counts.
      filters: applied in order; each keeps or drops a document.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    format: Format
    validation_fraction: float
    root: str
    cache: str
    filters: tuple[DocumentFilter, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    @property
    def sources(self) -> tuple[str, ...]:
        """The one source from which a vocabulary can be trained."""
        return (self.name,)

    def documents(self, source: str, split: str) -> Iterator[Document]:
        """Yields the documents of a split, in order, without empty and filtered documents."""
        for path in self.files[split]:
            yield from self.read_file(path, split)

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        """Yields about `num_bytes` bytes of training documents; a file's share is by size on disk.

        Every file contributes at least one document while the bytes suffice. Files are read in the
        order of the hashes of their names, so that files skipped at the end are a random choice.
        """
        names = {path: os.path.relpath(path, self.root) for path in self.files["train"]}
        paths = sorted(names, key=lambda path: splits.stable_hash(names[path], salt="sample"))
        sizes = [max(os.path.getsize(path), 1) for path in paths]
        remaining, unread = num_bytes, sum(sizes)
        for path, size in zip(paths, sizes, strict=True):
            reserved = remaining * (unread - size) / unread  # for the files that follow
            unread -= size
            for number, document in enumerate(self.read_file(path, "train")):
                length = len(document.text.encode("utf-8"))
                # Only the last document of all may exceed its share, and the first of a file.
                if remaining <= reserved or (number and reserved and remaining - length < reserved):
                    break
                remaining -= length
                yield document
            if remaining <= 0:
                return

    def read_file(self, path: str, split: str) -> Iterator[Document]:
        """Yields the documents of one file that are in a split."""
        for document in self._read_all(path):
            if self._split_of(document, path) == split:
                yield document

    def _read_all(self, path: str, sieve: Sieve | None = None) -> Iterator[Document]:
        sieve = sieve or Sieve(self.filters)
        read = documents.read(
            pathlib.Path(path),
            self.format,
            name=os.path.relpath(path, self.root),
            metadata=document_filters.keys_of(self.filters),
        )
        for document in read:
            if document.text and sieve.keeps(document.text, document.metadata):
                yield document

    def _split_of(self, document: Document, path: str) -> str:
        if self.validation_fraction:
            held_out = splits.in_validation(document.text, self.validation_fraction)
            return "validation" if held_out else "train"
        return next(split for split, files in self._file_sets.items() if path in files)

    @functools.cached_property
    def _file_sets(self) -> dict[str, frozenset[str]]:
        return {split: frozenset(files) for split, files in self.files.items()}

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """File -> SHA-256 of its bytes; stored, and valid while size, times and inode match."""
        digests = fingerprint.FileDigests(pathlib.Path(self.cache) / "file_digests.json")
        paths = dict.fromkeys(path for files in self.files.values() for path in files)
        result = {path: digests.digest(path) for path in paths}
        digests.save()
        return result

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over everything that determines the documents and their order."""
        content = {
            "reading": documents.VERSION,
            "holding_out": splits.VERSION,
            "format": dataclasses.asdict(self.format),
            "validation_fraction": self.validation_fraction,
            "files": {
                split: [[os.path.relpath(path, self.root), self.checksums[path]] for path in files]
                for split, files in self.files.items()
            },
        }
        if self.filters:  # omitted when empty, so that older hashes remain valid
            content["filters"] = document_filters.described(self.filters)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> numbers of documents and bytes.

        Counting reads every document once and so checks every line. The counts are stored under the
        hash of the files.

        Raises:
          DataError: a file is malformed, or a split has no document.
        """
        return self._counted["splits"]

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Filter -> numbers of documents and bytes that it dropped; counted with `counts`."""
        return self._counted["dropped"]

    @functools.cached_property
    def _counted(self) -> dict[str, dict[str, dict[str, int]]]:
        counts_file = pathlib.Path(self.cache) / "counted" / f"{self.hash}.json"
        if counts_file.is_file():
            return json.loads(counts_file.read_text(encoding="utf-8"))
        counts = {split: {"documents": 0, "bytes": 0} for split in self.splits}
        sieve = Sieve(self.filters)
        paths = list(self.checksums)
        for path in tqdm.tqdm(paths, desc=f"checking {self.name}", file=sys.stderr, disable=None):
            for document in self._read_all(path, sieve):
                count = counts[self._split_of(document, path)]
                count["documents"] += 1
                count["bytes"] += len(document.text.encode("utf-8"))
        for split, count in counts.items():
            if not count["documents"]:
                raise self._empty(split, counts, sieve.dropped)
        counted = {"splits": counts, "dropped": sieve.dropped}
        cache.remember(counts_file, counted)
        return counted

    def size(self, source: str) -> int:
        """Returns the bytes of training text."""
        return self.counts["train"]["bytes"]

    def _empty(
        self,
        split: str,
        counts: Mapping[str, Mapping[str, int]],
        dropped: Mapping[str, Mapping[str, int]],
    ) -> DataError:
        total = sum(count["documents"] for count in counts.values())
        where = f"{self.name}: {_shorten(self.files[split])}"
        dropped_documents = {
            name: count["documents"] for name, count in dropped.items() if count["documents"]
        }
        if dropped_documents and total == 0:
            by_filter = ", ".join(f"{name} {count:,}" for name, count in dropped_documents.items())
            return DataError(
                f"{where}: no document is left; the filters dropped them all ({by_filter}). Check the "
                "filters' values against the files, which spell them exactly so"
            )
        if self.validation_fraction == 0 or total == 0:
            return DataError(f"{where}: no document; every file is empty")
        return DataError(
            f"{where}: validation_fraction={self.validation_fraction} of {total} documents leaves none "
            f"for the {split} split. Change validation_fraction, give validation_files, or set "
            "document_per='paragraph' for text files"
        )


def find(
    *,
    name: str,
    files: Patterns,
    validation_files: Patterns | None = None,
    validation_fraction: float = 0.01,
    text_key: str | Sequence[str] = "text",
    id_key: str | None = None,
    document_per: str = "file",
    data_root: str | None = None,
    filters: Sequence[DocumentFilter] = (),
    cache_dir: str | os.PathLike | None = None,
) -> DocumentFiles:
    """Returns the documents of the data files that match patterns.

    Args:
      name: name of the set.
      files: one or several globs (`**` includes subdirectories); `~` and variables are expanded.
      validation_files: one or several globs of held-out files; `validation_fraction` is then
        ignored.
      validation_fraction: share of documents to hold out, chosen by the hash of their text so that
        equal documents are never in both splits. 0 makes no validation split.
      text_key: key of the text in JSON, column in Parquet; several texts are joined by blank lines.
      id_key: key or column of a document's name.
      document_per: unit of a document in text files: `file`, `paragraph` or `line`.
      data_root: base directory of relative patterns; None for the working directory.
      filters: applied in order; each keeps or drops a document by text and metadata.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a pattern matches no file.
      DataError: a matching file is of an unknown kind.
      ValueError: the fraction is not in [0, 1), two filters have one name, or a file is matched by
        `files` and by `validation_files`.
    """
    document_filters.check_names(filters, name)
    paths, validation_fraction = split_files(
        name=name,
        files=files,
        validation_files=validation_files,
        validation_fraction=validation_fraction,
        data_root=data_root,
    )
    return DocumentFiles(
        name=name,
        files=paths,
        format=Format(
            text_key=text_key if isinstance(text_key, str) else tuple(text_key),
            id_key=id_key,
            document_per=document_per,
        ),
        validation_fraction=validation_fraction,
        root=common_root(paths),
        cache=str(cache.cache_dir("files", override=cache_dir)),
        filters=tuple(filters),
    )


def split_files(
    *,
    name: str,
    files: Patterns,
    validation_files: Patterns | None,
    validation_fraction: float,
    data_root: str | None,
) -> tuple[dict[str, tuple[str, ...]], float]:
    """Returns the files of each split, and the validation fraction of files that both splits read.

    `find` describes the arguments and errors.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"{name}: validation_fraction is {validation_fraction}; it must be in [0, 1)"
        )
    paths = {"train": _expand(name, "files", files, data_root)}
    if validation_files is not None:
        validation_fraction = 0.0
        paths["validation"] = _expand(name, "validation_files", validation_files, data_root)
        if both := sorted(set(paths["train"]) & set(paths["validation"])):
            raise ValueError(
                f"{name}: {_shorten(both)} is matched by files and by validation_files; make the "
                "patterns disjoint"
            )
    elif validation_fraction:
        paths["validation"] = paths["train"]
    return paths, validation_fraction


def common_root(found: Mapping[str, Sequence[str]]) -> str:
    """Returns the deepest directory that contains all files."""
    all_paths = sorted({path for paths in found.values() for path in paths})
    return os.path.commonpath([os.path.dirname(path) for path in all_paths])


def _expand(name: str, argument: str, patterns: Patterns, data_root: str | None) -> tuple[str, ...]:
    """Returns all files that match, sorted, without duplicates and directories."""
    paths: set[str] = set()
    root = _expanded(data_root or "")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        full = os.path.abspath(os.path.join(root, _expanded(pattern)))
        matches = [path for path in glob.glob(full, recursive=True) if os.path.isfile(path)]
        if not matches:
            raise FileNotFoundError(
                f"{name}: {argument}={pattern!r} matches no file ({full}). Check the path; a "
                f"relative one starts at {'data_root' if data_root else 'the working directory'}"
            )
        paths.update(matches)
    if not paths:
        raise ValueError(f"{name}: {argument} is empty; give a glob such as 'data/*.jsonl.zst'")
    for path in sorted(paths):
        documents.check_suffix(pathlib.Path(path))
    return tuple(sorted(paths))


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def _shorten(paths: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(paths[:limit])
    return shown if len(paths) <= limit else f"{shown} and {len(paths) - limit} more"
