"""Examples that are counted by pieces, in several processes, and rows that are left out because they cannot be used."""

import abc
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from espalier.common import files
from espalier.common.bars import Bar
from espalier.data import pieces as pieces_lib
from espalier.data.cache import pool
from espalier.data.pieces import Piece
from espalier.data.text.row_files import (
    BadRow,
    BadRows,
    DataError,
    OnBadRow,
    Row,
    bad_rows_text,
    check_number,
    refuse,
)

T = TypeVar("T")
_SHOWN = 5  # bad rows that are recorded with the counts


class ReadByPieces(abc.ABC):
    """The counting of a source of files; a mixin of `data.data_source.FileSource`, which has the attributes."""

    name: str
    on_bad_row: OnBadRow

    @property
    @abc.abstractmethod
    def checksums(self) -> dict[str, str]: ...

    @property
    @abc.abstractmethod
    def _counts_file(self) -> pathlib.Path: ...

    @property
    @abc.abstractmethod
    def local_folders(self) -> tuple[str, ...]: ...

    @abc.abstractmethod
    def _pieces_of(self, paths: Iterable[str]) -> tuple[Piece, ...]:
        """Returns the pieces of files."""

    @abc.abstractmethod
    def _count_piece(self, piece: Piece, bad: BadRows) -> Any:
        """Reads all examples of a piece; returns what `_total` needs of it; raises DataError."""

    @abc.abstractmethod
    def _total(self, counts: Mapping[Piece, Any]) -> dict[str, Any]:
        """Returns what `_count` returns, of all pieces in the order of the files; raises DataError."""

    def _count(self) -> dict[str, Any]:
        every = self._pieces_of(self.checksums)
        size = sum(piece.size for piece in every)
        desc = f"checking {self.name}"
        with Bar(total=size, desc=desc, unit="B", unit_scale=True, file=sys.stderr) as bar:
            batches = pool.run(
                functools.partial(self._read_pieces, []),
                pieces_lib.batches(every),
                what=lambda batch: f"{desc}, {batch[0].path}",
                bar=bar,
                title=desc,
                paths=self.local_folders,
            )
        read = list(itertools.chain.from_iterable(batches))
        bad = [row for _, rows in read for row in rows or ()]
        if bad:
            check_number(len(bad), bad[0])
        try:
            counts = self._total(
                {piece: count for piece, (count, _) in zip(every, read, strict=True)}
            )
        except DataError as error:
            if not bad:
                raise
            raise DataError(
                f"{len(bad):,} rows cannot be used, the first is {bad[0]}: {bad[0].reason}. Without them, {error}"
            ) from None
        if self.on_bad_row == "skip":
            counts["bad_rows"] = self._list(bad)
            if bad:
                print(f"{self.name}: {bad_rows_text(counts['bad_rows'])}", file=sys.stderr)
        return counts

    def _read_pieces(
        self, numbers: list[int], pieces: Sequence[Piece], report: pool.Report
    ) -> "_Read":
        """Returns the counts and the bad rows of each piece; `numbers` are those of bad rows that this process has found."""
        found = _Read()
        for piece in pieces:
            bad = self._bad_rows()
            found.append((self._count_piece(piece, bad), bad))
            if bad:
                numbers.append(len(bad))
                check_number(sum(numbers), bad[0])
            report(piece.size)
        return found

    def _bad_rows(self) -> BadRows:
        return [] if self.on_bad_row == "skip" else None

    def _list(self, bad: Sequence[BadRow]) -> dict[str, Any]:
        """Writes all bad rows into a file beside the counts; returns their number, the first ones and the file."""
        path = self._counts_file.with_suffix(".bad_rows.jsonl")
        lines = [files.json_bytes(row._asdict(), indent=None, end="\n") for row in bad]
        first = [f"{row}: {row.reason}" for row in bad[:_SHOWN]]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, b"".join(lines), synced=False, shared=True)
        except OSError as error:  # as of counts: a cache that cannot be written costs time alone
            return {"rows": len(bad), "first": first, "all": f"not written: {error}"}
        return {"rows": len(bad), "first": first, "all": str(path)}

    def _usable(
        self, piece: Piece, rows: Iterable[Row], use: Callable[[Row], Iterable[T]], bad: BadRows
    ) -> Iterator[T]:
        """Yields what `use` makes of rows; a DataError of one is raised, or is a bad row."""
        for row in rows:
            try:
                made = tuple(use(row))
            except DataError as error:
                refuse(error, bad, piece.path, row.number, row.offset)
                continue
            yield from made


class _Read(list[tuple[Any, BadRows]]):
    """The counts and the bad rows of several pieces."""

    @property
    def sums(self) -> Mapping[str, int]:
        return {"rows skipped": sum(len(rows or ()) for _, rows in self)}
