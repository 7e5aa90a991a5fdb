"""Documents of files, filtered and without near-duplicates, as shards of JSON lines: in processes of one machine or by Apache Beam.

The files are divided into shards. The steps, whose elements are independent of each other, are: filter the documents of each
shard and sketch those that stay; compare those with equal keys, for each band; decide in the order of the corpus, as in one
process; write each shard; and write `counts.json`, which completes the output. What is there already is not made again.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files, pipelines, versions
from espalier.common.bars import Bar
from espalier.common.pipelines import Step
from espalier.common.storage import output_files, paths
from espalier.common.storage.lock import StoreLock
from espalier.common.storage.result_folder import ResultFolder, together
from espalier.data import pieces
from espalier.data.cache import fingerprint, pool
from espalier.data.cache.file_digests import FileDigests
from espalier.data.clean.near_duplicates import Search
from espalier.data.pieces import Piece
from espalier.data.text import dedup, document_filters, documents
from espalier.data.text.document_files import DocumentFiles
from espalier.data.text.document_filters import Sieve
from espalier.data.text.documents import DataError, Document
from espalier.data.text.row_files import BadRow, BadRows

COUNTS = "counts.json"  # completes the output
BAD_ROWS = "bad_rows.jsonl"  # rows that cannot be used, where the source leaves them out
DUPLICATES = (
    "near-duplicates"  # name of the count of dropped documents, beside those of the filters
)
EMPTY = "empty"
_STARTED = "documents.json"  # what the output is made of
_WORK = "work"  # folder of what the steps leave for each other, which goes at the end
_DIVIDED_BYTES = 256_000_000  # larger files of lines are divided, for which they are read once
_PART_BYTES = 64 << 30  # of files for each part of a band: about 20 million documents


class OutputMismatchError(ValueError):
    """The output's folder holds something else."""


class OutputInUseError(ValueError):
    """Another process makes the same output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Documents and where they go.

    Attributes:
      source: the documents: those of its split `train`, with its filters.
      shards: what is read for each shard of the output, in the order of the corpus; see `shards_of`.
      output: folder or address of the shards.
      keys: further keys or columns that the rows keep, dotted for nested ones.
      threshold: least resemblance of near-duplicates, of which the first is kept; None keeps all.
    """

    source: DocumentFiles
    shards: tuple[tuple[Piece, ...], ...]
    output: str
    keys: tuple[str, ...] = ()
    threshold: float | None = 0.8

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.5 <= self.threshold <= 1:
            raise ValueError(
                f"near_duplicates is {self.threshold}; it must be in [0.5, 1], because many pairs with less resemblance are "
                "not compared, or None to keep them"
            )

    def run(self, beam_options: Sequence[str] = ()) -> dict[str, Any]:
        """Makes the output, or what is missing of it, and returns its counts: 'read', 'dropped' by reason, and 'kept'.

        Args:
          beam_options: of a pipeline; empty for processes of this machine.

        Raises:
          OutputMismatchError: the output is of other files or settings.
          OutputInUseError: another process makes it now.
          DataError: a file is malformed; or none of the rows can be used.
          ChangedError: a file was changed meanwhile; delete the output, and start again.
          PipelineError: the pipeline failed.
        """
        with self._locked():
            self._start()
            if not self._output.has(COUNTS):
                run = functools.partial(pipelines.run, beam_options=beam_options)
                (run if beam_options else _in_processes)(self.steps())
        self._work.delete()  # with the lock; whoever takes it from now on finds the output complete
        return self._output.json(COUNTS)

    def steps(self) -> list[Step]:
        """Returns the steps that make the output."""
        shards, seen = range(len(self.shards)), (*self.source.local_folders, self.output)
        search = [
            Step("filter documents", self.filter_shard, shards, seen),
            Step("number documents", self.number, [None], seen),
            Step("compare near-duplicates", self.compare, self._search.elements, seen),
            Step("decide on duplicates", self.decide, [None], seen),
        ]
        return [
            *(search if self.threshold is not None else []),
            Step("write shards", self.write_shard, shards, seen),
            Step("add counts", self.finish, [None], seen),
        ]

    def filter_shard(self, shard: int) -> Mapping[str, int]:
        """Writes which documents of a shard the filters keep, and their sketches."""
        name = f"{shard:05d}.filtered.json"
        if not self._work.has(name):
            sieve, places, sketches = _Sieve(self.source), [], []
            for place, document in enumerate(self._read(shard, sieve)):
                if sieve.keeps(document):
                    places.append(place)
                    sketches.append(dedup.sketch(dedup.shingles(document.text)))
            self._search.put(shard, np.array(sketches, np.uint64).reshape(-1, dedup.SKETCH))
            self._work.write(f"{shard:05d}.places", np.array(places, np.int64).tobytes())
            self._work.write_json(name, sieve.counts())
        counts = self._work.json(name)
        bad = len(counts["bad_rows"])
        return {"documents filtered": counts["read"]["documents"], "rows skipped": bad}

    def number(self, _: None) -> Mapping[str, int]:
        names = [f"{shard:05d}.filtered.json" for shard in range(len(self.shards))]
        self._search.number(
            [counts["kept"]["documents"] for counts in together(self._work.json, names)]
        )
        return {}

    def compare(self, element: tuple[int, int]) -> Mapping[str, int]:
        self._search.compare(element)
        return {}

    def decide(self, _: None) -> Mapping[str, int]:
        return {f"documents dropped ({DUPLICATES})": self._search.decide()}

    def write_shard(self, shard: int) -> Mapping[str, int]:
        """Writes the documents of a shard that stay, and then its counts."""
        name = f"{shard:05d}.json"
        if not self._work.has(name):
            sieve, kept = _Sieve(self.source), Counter(documents=0, bytes=0)
            target = self._output.of(f"{shard:05d}.jsonl.zst")
            with (
                output_files.opened(target, keep=False) as opened,
                documents.compressed(opened, target) as stream,
            ):
                for document in self._staying(shard, sieve):
                    stream.write(self._row(document))
                    kept.update(documents=1, bytes=len(document.text.encode()))
            counts = sieve.counts()
            if self.threshold is not None:
                counts = self._work.json(f"{shard:05d}.filtered.json")
                counts["dropped"][DUPLICATES] = _difference(counts["kept"], [kept])
                counts["kept"] = kept
            self._work.write_json(name, counts)
        counts = self._work.json(name)
        found = {"rows skipped": len(counts["bad_rows"])} if self.threshold is None else {}
        return {**found, **{f"{unit} kept": count for unit, count in counts["kept"].items()}}

    def finish(self, _: None) -> Mapping[str, int]:
        """Writes the counts of all shards, which completes the output."""
        read, kept, dropped = Counter[str](), Counter[str](), dict[str, Counter[str]]()
        bad: list[Any] = []
        names = [f"{shard:05d}.json" for shard in range(len(self.shards))]
        for counts in together(self._work.json, names):
            read.update(counts["read"])
            kept.update(counts["kept"])
            bad += counts["bad_rows"]
            for name, count in counts["dropped"].items():
                dropped.setdefault(name, Counter()).update(count)
        total: dict[str, Any] = {"read": read, "dropped": dropped, "kept": kept}
        if bad and not read["documents"]:
            first = BadRow(*bad[0])
            raise DataError(
                f"None of the {len(bad):,} rows can be used, the first is {first}: {first.reason}"
            )
        if bad:
            total["bad_rows"] = {"rows": len(bad)}
            lines = [json.dumps(BadRow(*row)._asdict(), ensure_ascii=False) + "\n" for row in bad]
            self._output.write(BAD_ROWS, "".join(lines).encode())
        self._output.write_json(COUNTS, total)
        return {}

    def _staying(self, shard: int, sieve: "_Sieve") -> Iterator[Document]:
        if self.threshold is None:
            yield from filter(sieve.keeps, self._read(shard, sieve))
            return
        places = np.frombuffer(self._work.read(f"{shard:05d}.places"), np.int64)
        staying = set(np.delete(places, self._search.duplicates_of(shard)).tolist())
        for place, document in enumerate(self._read(shard, sieve)):
            if place in staying:
                yield document

    def _read(self, shard: int, sieve: "_Sieve") -> Iterator[Document]:
        # Each reading needs the keys of both, so that all of them find the same rows bad, and the places of the others agree.
        keys = tuple(dict.fromkeys((*sieve.keys, *self.keys)))
        for piece in self.shards[shard]:
            name = self.source.relative(piece.path)
            yield from documents.read(
                piece, self.source.format, name=name, metadata=keys, bad=sieve.bad
            )

    def _row(self, document: Document) -> bytes:
        row: dict[str, Any] = {"id": document.id, "text": document.text}
        for key in self.keys:
            *outer, last = key.split(".")
            inner = functools.reduce(lambda inner, part: inner.setdefault(part, {}), outer, row)
            inner[last] = document.metadata[key]
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"

    @functools.cached_property
    def _states(self) -> dict[str, list]:
        """The size and version of each file."""
        wholes = map(self.source.whole, self.source.files["train"])
        return {whole.path: [whole.size, whole.version] for whole in wholes}

    @property
    def _output(self) -> ResultFolder:
        return ResultFolder(self.output)

    @property
    def _work(self) -> ResultFolder:
        return ResultFolder(self._output.of(_WORK))

    @functools.cached_property
    def _search(self) -> Search:
        parts = max(sum(size for size, _ in self._states.values()) // _PART_BYTES, 1)
        return Search(self._work, len(self.shards), parts, self.threshold or 1.0)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the output, so that another process neither deletes its work nor reads what is not complete."""
        place = self._work.path
        try:
            held = StoreLock(place) if paths.is_remote(place) else files.lock_folder(place)
        except BlockingIOError as error:
            raise OutputInUseError(
                f"{self.output} is in use: {error} writes it. Wait for its end, or give another output"
            ) from None
        with contextlib.closing(held):
            yield

    def _start(self) -> None:
        """Writes what the output is made of, or compares it with what is there."""
        settings = {
            "files": self._states,
            "shards": [[dataclasses.astuple(p)[:-1] for p in shard] for shard in self.shards],
            "on_bad_row": self.source.on_bad_row,
            "format": dataclasses.asdict(self.source.format),
            # A filter keeps what its settings have read of its files: workers need not have these.
            "filters": document_filters.described(self.source.filters),
            "keys": self.keys,
            "near_duplicates": self.threshold,
            "versions": versions.own(),
            **{f"code of {name}": digest for name, digest in fingerprint.code(self.source).items()},
        }
        self._work.make()
        if self._output.has(_STARTED):
            before, now = self._output.json(_STARTED), json.loads(json.dumps(settings))
            if changed := [key for key in now if before.get(key) != now[key]]:
                raise OutputMismatchError(
                    f"{self.output} holds documents of other {', '.join(changed)}: give another output, or delete this one"
                )
            return
        if found := [name for name in self._output.names() if name != _WORK]:
            raise OutputMismatchError(
                f"{self.output} is not empty ({found[0]} is there): give another output, or delete what is there"
            )
        self._output.write_json(_STARTED, settings)


def shards_of(source: DocumentFiles) -> tuple[tuple[Piece, ...], ...]:
    """Returns the pieces of each shard of the output, contiguous and of 32 to 256 MB; raises DataError."""
    wholes, unit = list(map(source.whole, source.files["train"])), source.format.document_per
    large = {
        whole.path
        for whole in wholes
        if whole.size > _DIVIDED_BYTES and documents.is_by_line(whole.path, document_per=unit)
    }
    digests = FileDigests(pathlib.Path(source.cache, "file_digests.json"), source.objects)
    digests.read(sorted(large), large)
    return pieces.grouped(
        piece
        for whole in wholes
        for piece in (
            documents.divided(whole, digests, document_per=unit)
            if whole.path in large or documents.is_table(whole.path)
            else (whole,)
        )
    )


class _Sieve:
    """The filters of a source, and what is empty; counts what is read and dropped."""

    def __init__(self, source: DocumentFiles):
        self._sieve = Sieve(source.filters)
        self.keys = self._sieve.keys
        self.bad: BadRows = [] if source.on_bad_row == "skip" else None
        self._read, self._empty = Counter(documents=0, bytes=0), 0

    def keeps(self, document: Document) -> bool:
        self._read.update(documents=1, bytes=len(document.text.encode()))
        if not document.text:
            self._empty += 1
            return False
        return self._sieve.keeps(document.text, document.metadata)

    def counts(self) -> dict[str, Any]:
        dropped = {EMPTY: {"documents": self._empty, "bytes": 0}, **self._sieve.dropped}
        kept = _difference(self._read, dropped.values())
        bad = self.bad or []
        return {"read": dict(self._read), "dropped": dropped, "kept": kept, "bad_rows": bad}


def _difference(total: Mapping[str, int], parts: Any) -> dict[str, int]:
    return {unit: count - sum(part[unit] for part in parts) for unit, count in total.items()}


def _in_processes(steps: Sequence[Step]) -> None:
    for step in steps:
        with Bar(desc=step.name, total=len(step.elements), file=sys.stderr) as bar:
            pool.run(
                functools.partial(_reported, step.work),
                step.elements,
                what=lambda element, name=step.name: f"{name}, number {element}",  # type: ignore[misc]
                bar=bar,
                remedy="What is done is kept: the same command goes on after it.",
            )


def _reported(work: Any, element: Any, report: pool.Report) -> None:
    work(element)
    report(1)
