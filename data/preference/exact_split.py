"""Files of rows of which an exact share is held out, also of few rows: a base class of sources."""

import abc
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from espalier.common.bars import Bar
from espalier.data.cache import cache_dir as cache
from espalier.data.data_source import FileSource, shorten
from espalier.data.preference.tally import Tally
from espalier.data.text import splits
from espalier.data.text.documents import DataError


class Example(Protocol):
    """A row of a file; rows with equal keys are in one split."""

    @property
    def key(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSplit(FileSource, abc.ABC):
    """Rows in files, by split. Numbers and hashes are counted once, and stored on disk."""

    MACRO: ClassVar[str]  # of the files; the macros of the held-out ones begin with it

    @property
    def dropped(self) -> Mapping[str, Any]:
        """Reason -> number of dropped rows and the place of the first."""
        return self._counted["dropped"]

    def num_input_examples(self, split: str) -> int:
        return self._counted["examples"][split]

    @abc.abstractmethod
    def _examples(
        self, path: str, split: str | None = None, dropped: Tally | None = None
    ) -> Iterator[Any]:
        """Yields each `Example` of a file in one split, or in all; counts rows from which nothing can be learnt."""

    def _check_form(self, example: Any, first: Any) -> None:
        """Raises DataError if a row has another form than the first row of its set."""

    def _split_of(self, text: str, path: str) -> str:
        if not self.validation_fraction:
            return super()._split_of(text, path)
        return "validation" if _hash(text) in self._held_out else "train"

    @functools.cached_property
    def _held_out(self) -> frozenset[int]:
        return frozenset(self._counted["held_out"])

    @functools.cached_property
    def _counted(self) -> dict[str, Any]:
        """Returns the numbers of examples, dropped rows, and the hashes of held-out keys; stored on disk."""
        if self._counts_file.is_file():
            return json.loads(self._counts_file.read_text(encoding="utf-8"))
        dropped, hashes = Tally(), {path: [] for path in self.checksums}
        first = None
        for path in Bar(hashes, desc=f"checking {self.name}", file=sys.stderr):
            for example in self._examples(path, None, dropped):
                first = first or example
                self._check_form(example, first)
                hashes[path].append(_hash(example.key))
        train = [value for path in self.files["train"] for value in hashes[path]]
        held_out = splits.held_out_hashes(train, fraction=self.validation_fraction)
        held = sum(value in held_out for value in train)
        examples = {"train": len(train) - held}
        if self.validation_fraction:
            examples["validation"] = held
        elif "validation" in self.files:
            examples["validation"] = sum(len(hashes[path]) for path in self.files["validation"])
        for split, count in examples.items():
            if not count:
                raise self._empty(split, len(train), dropped)
        counted = {"examples": examples, "dropped": dropped, "held_out": sorted(held_out)}
        cache.remember(self._counts_file, counted)
        return counted

    def _empty(self, split: str, total: int, dropped: Tally) -> DataError:
        where = f"{self.name}: {shorten(self.files[split])}"
        if total:
            return DataError(
                f"{where}: validation_fraction={self.validation_fraction} of {total} rows leaves none for the {split} "
                f"split. Change validation_fraction ({self.MACRO}_VALIDATION_FRACTION; 0 holds none out), or give "
                f"validation_files ({self.MACRO}_VALIDATION)"
            )
        return DataError(
            f"{where}: there is no row to learn ({str(dropped) or 'every file is empty'})"
        )


def _hash(text: str) -> int:
    return splits.stable_hash(text, salt="split")
