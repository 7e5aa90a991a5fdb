"""Documents in data files: a SeqIO source, and texts to train a vocabulary from."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common.ranges import Fraction
from espalier.common.spelling import few
from espalier.data.cache import fingerprint
from espalier.data.data_source import Files, FileSource, named_sets
from espalier.data.pieces import Piece
from espalier.data.text import document_filters, documents, splits
from espalier.data.text.document_filters import DocumentFilter, Sieve
from espalier.data.text.documents import DataError, Document, Format
from espalier.data.text.row_files import BadRows, OnBadRow

_Counts = dict[str, dict[str, dict[str, int]]]  # 'splits' and 'dropped' -> name -> documents, bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentFiles(FileSource):
    """Documents in files, in one or two splits."""

    format: Format  # how documents are stored in the files
    filters: tuple[DocumentFilter, ...] = ()  # applied in order; each keeps or drops a document

    @property
    def sources(self) -> tuple[str, ...]:
        """The one source from which a vocabulary can be trained."""
        return (self.name,)

    def documents(self, source: str, split: str) -> Iterator[Document]:
        """Yields the documents of a split, in order, without empty and filtered documents."""
        for piece in self.pieces(split):
            yield from self.read_piece(piece, split)

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        """Yields about `num_bytes` bytes of training documents; a file's share is by size on disk.

        Every file contributes at least one document while the bytes suffice. Files are read in the
        order of the hashes of their names, so that files skipped at the end are a random choice.
        """
        names = {path: self.relative(path) for path in self.files["train"]}
        paths = sorted(names, key=lambda path: splits.stable_hash(names[path], salt="sample"))
        files = [self.whole(path) for path in paths]
        sizes = [max(file.size, 1) for file in files]
        remaining, unread = num_bytes, sum(sizes)
        for file, size in zip(files, sizes, strict=True):
            reserved = remaining * (unread - size) / unread  # for the files that follow
            unread -= size
            for number, document in enumerate(self.read_piece(file, "train")):
                length = len(document.text.encode("utf-8"))
                # Only the last document of all may exceed its share, and the first of a file.
                if remaining <= reserved or (number and reserved and remaining - length < reserved):
                    break
                remaining -= length
                yield document
            if remaining <= 0:
                return

    def read_piece(self, piece: Piece, split: str) -> Iterator[Document]:
        """Yields the documents of one piece that are in a split."""
        for document in self._read_all(piece, Sieve(self.filters), self._bad_rows()):
            if self._split_of(document.text, piece.path) == split:
                yield document

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        for document in self.read_piece(piece, split):
            yield {"text": document.text, "document_id": document.id}

    @property
    def _document_per(self) -> str:
        return self.format.document_per

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        return {"text": ((), "string")}

    def _read_all(self, piece: Piece, sieve: Sieve, bad: BadRows) -> Iterator[Document]:
        read = documents.read(
            piece,
            self.format,
            name=self.relative(piece.path),
            metadata=sieve.keys,
            bad=bad,
        )
        for document in read:
            if document.text and sieve.keeps(document.text, document.metadata):
                yield document

    def _settings(self) -> dict[str, Any]:
        format = dataclasses.asdict(self.format)
        if self.on_bad_row == "error":
            del format["max_document_bytes"]  # It refuses documents, and changes none.
        content: dict[str, Any] = {
            "reading": documents.VERSION,
            "holding_out": splits.VERSION,
            "format": format,
        }
        if self.filters:  # omitted when empty, so that older digests remain valid
            content["filters"] = document_filters.described(self.filters)
        return content

    def num_input_examples(self, split: str) -> int:
        return self.counts[split]["documents"]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> numbers of documents and bytes.

        Counting reads every document once and so checks every line. The counts are stored under the
        digest of the files.

        Raises:
          DataError: a file is malformed, or a split has no document.
        """
        return self._counted["splits"]

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Filter -> numbers of documents and bytes that it dropped; counted with `counts`."""
        return self._counted["dropped"] if self.filters else {}

    def _count_piece(self, piece: Piece, bad: BadRows) -> _Counts:
        counts = {split: {"documents": 0, "bytes": 0} for split in self.splits}
        sieve = Sieve(self.filters)
        for document in self._read_all(piece, sieve, bad):
            count = counts[self._split_of(document.text, piece.path)]
            count["documents"] += 1
            count["bytes"] += len(document.text.encode("utf-8"))
        return {"splits": counts, "dropped": sieve.dropped}

    def _total(self, counts: Mapping[Piece, _Counts]) -> _Counts:
        total: _Counts = {
            "splits": {split: {"documents": 0, "bytes": 0} for split in self.splits},
            "dropped": Sieve(self.filters).dropped,
        }
        for count in counts.values():
            for part, of_part in count.items():
                for name, numbers in of_part.items():
                    for unit, number in numbers.items():
                        total[part][name][unit] += number
        for split, numbers in total["splits"].items():
            if not numbers["documents"]:
                raise self._empty(split, total["splits"], total["dropped"])
        return total

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
        where = f"{self.name}: {few(self.files[split], 3)}"
        by_filter = ", ".join(
            f"{name} {count['documents']:,}"
            for name, count in dropped.items()
            if count["documents"]
        )
        if by_filter and total == 0:
            return DataError(
                f"{where}: the filters dropped every document ({by_filter}). Compare their values with "
                "the metadata in the files; the spelling must be equal"
            )
        if self.validation_fraction == 0 or total == 0:
            return DataError(f"{where}: no document; every file is empty")
        return DataError(
            f"{where}: validation_fraction={self.validation_fraction} of {total} documents leaves none "
            f"for the {split} split. Change validation_fraction, give validation_files, or set "
            "document_per='paragraph' for text files"
        )


@dataclasses.dataclass(frozen=True)
class DocumentSets:
    """Several sets of documents, as texts to train one vocabulary from."""

    sets: tuple[DocumentFiles, ...]

    @property
    def digest(self) -> str:
        return fingerprint.of_json({each.name: each.digest for each in self.sets})

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.sets)

    def size(self, source: str) -> int:
        """Returns the bytes of training text of a set."""
        return self._set(source).size(source)

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        """Yields about `num_bytes` bytes of a set's training documents."""
        return self._set(source).sample(source, num_bytes)

    def _set(self, name: str) -> DocumentFiles:
        return next(each for each in self.sets if each.name == name)


def find(
    *,
    name: str,
    files: Files,
    validation_files: Files | None = None,
    validation_fraction: Fraction = 0.01,
    text_key: str | Sequence[str] = "text",
    id_key: str | None = None,
    document_per: str = "file",
    data_root: str | None = None,
    max_document_bytes: int = documents.MAX_BYTES,
    filters: Sequence[DocumentFilter] = (),
    on_bad_row: OnBadRow = "error",
    cache_dir: str | os.PathLike | None = None,
) -> DocumentFiles | DocumentSets:
    """Returns the documents of the data files that match patterns.

    Args:
      name: name of the set, if there is one.
      files: one or several globs (`**` includes subdirectories); `~` and variables are expanded. Or several sets,
        {name of the set: its globs}.
      validation_files: one or several globs of held-out files, of several sets by name; `validation_fraction` is then
        ignored.
      validation_fraction: share of documents to hold out, chosen by the hash of their text so that
        equal documents are never in both splits. 0 makes no validation split.
      text_key, id_key, document_per, max_document_bytes: see `data.text.documents.Format`.
      data_root: base directory of relative patterns; None for the working directory.
      filters: applied in order; each keeps or drops a document by text and metadata.
      on_bad_row: what a row is that cannot be used: an 'error', or left out, counted and listed ('skip'). Rows are those of
        JSON lines and Parquet, and lines that are documents; a file that cannot be read on is always an error.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a pattern matches no file.
      DataError: a matching file is of an unknown kind.
      ValueError: the fraction is not in [0, 1), two filters have one name, a file is matched by `files` and by
        `validation_files`, or these name different sets.
    """
    document_filters.check_names(filters, name)
    text_key = text_key if isinstance(text_key, str) else tuple(text_key)
    sets = tuple(
        DocumentFiles.find(
            name=each,
            files=patterns,
            validation_files=held_out,
            validation_fraction=validation_fraction,
            data_root=data_root,
            cache_dir=cache_dir,
            format=Format(text_key, id_key, document_per, max_document_bytes),
            filters=tuple(filters),
            on_bad_row=on_bad_row,
        )
        for each, (patterns, held_out) in named_sets(name, files, validation_files).items()
    )
    return DocumentSets(sets) if isinstance(files, Mapping) else sets[0]
