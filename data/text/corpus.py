"""The corpus: text of installed packages, deduplicated, split by document, stored on disk.

`assemble` reads each source up to a byte cap, removes exact and near duplicates, and holds out
whole documents for validation that share little text with training documents. The result is a
directory of JSON lines, `<source>.<split>.jsonl` with one `{"id", "text"}` per document, and a
manifest. The directory's name is a hash of everything that determines its content, so a corpus is
built once.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from espalier.common import spelling
from espalier.common.bars import Bar
from espalier.common.ranges import Amount, Count, Fraction, Resemblance
from espalier.data.cache import cache_dir as cache
from espalier.data.cache import fingerprint
from espalier.data.text import documents
from espalier.data.text.document_files import DocumentFiles
from espalier.data.text.documents import Document
from espalier.data.text.sources import environment, names

FORMAT = documents.Format(text_key="text", id_key="id")
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus on disk."""

    directory: pathlib.Path

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """Settings, package versions, counts, dropped documents by reason, and the content hash."""
        return json.loads((self.directory / MANIFEST).read_text(encoding="utf-8"))

    @property
    def digest(self) -> str:
        """SHA-256 over the content of all files."""
        return self.manifest["hash"]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources with training documents."""
        return tuple(
            name for name, source in self.manifest["sources"].items() if source["bytes"]["train"]
        )

    def file(self, source: str, split: str) -> pathlib.Path:
        """Returns the path of the JSON lines of one split of a source."""
        if source not in self.sources:
            raise ValueError(
                f"the corpus has no source {source!r}; {spelling.nearest(source, self.sources)}"
            )
        return self.directory / f"{source}.{split}.jsonl"

    def splits(self, source: str) -> tuple[str, ...]:
        """Returns the splits in which a source has documents."""
        sizes = self.manifest["sources"][source]["bytes"]
        return tuple(split for split, size in sizes.items() if size)

    def documents(self, source: str, split: str) -> Iterator[Document]:
        """Yields the documents of one split of a source, in corpus order."""
        return documents.read(self.file(source, split), FORMAT)

    def source(self, name: str) -> DocumentFiles:
        """Returns a source as a SeqIO data source."""
        return DocumentFiles.of(
            name,
            {split: [str(self.file(name, split))] for split in self.splits(name)},
            format=FORMAT,
            cache_dir=self.directory.parents[1],
        )

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        """Yields the first training documents of about `num_bytes` bytes; their order is by hash."""
        return documents.take(self.documents(source, "train"), num_bytes)

    def size(self, source: str) -> int:
        """Returns the bytes of training text of a source."""
        return self.manifest["sources"][source]["bytes"]["train"]

    def check(self, digests: fingerprint.FileDigests) -> None:
        """Raises ValueError if a file is missing or does not match its checksum."""
        try:
            files = self.manifest["files"]
            intact = self.digest == fingerprint.of_json(files)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise self._damaged(MANIFEST, "is altered or cut short")
        for name, checksum in files.items():
            path = self.directory / f"{name}.jsonl"
            if not path.is_file():
                raise self._damaged(path.name, "is missing")
            if digests.digest(str(path)) != checksum:
                raise self._damaged(path.name, "does not match its checksum")
        digests.save()

    def _damaged(self, name: str, what: str) -> ValueError:
        return ValueError(
            f"Corpus {self.directory}: {name} {what}. Delete the directory; the next start builds it again"
        )

    def summary(self) -> dict[str, Any]:
        """Returns the facts about the corpus that are recorded with a run."""
        keys = ("hash", "settings", "packages", "sources", "skipped")
        return {key: self.manifest[key] for key in keys}


def assemble(
    *,
    sources: Sequence[str] = ("all",),
    bytes_per_source: Amount | None = 4_000_000,
    validation_fraction: Fraction = 0.05,
    min_document_bytes: Count = 100,
    max_document_bytes: Amount = 300_000,
    near_duplicate_threshold: Resemblance = 0.8,
    containment_threshold: Fraction = 0.2,
    cache_dir: str | os.PathLike | None = None,
    env: environment.Environment | None = None,
) -> Corpus:
    """Builds the corpus, or opens an existing corpus built from the same inputs.

    Args:
      sources: names of sources or groups (`text`, `code`, `multilingual`, `all`). Sources whose
        packages are not installed are skipped and reported.
      bytes_per_source: bytes after which no more documents of a source are taken; documents are
        taken whole, in the order of the hashes of their ids. None takes everything.
      validation_fraction: share of each source's bytes to hold out.
      min_document_bytes, max_document_bytes: shorter and longer documents are dropped.
      near_duplicate_threshold: minimum resemblance at which the later of two documents is dropped, at least 0.5.
      containment_threshold: a document is not held out if more than this share of its text also
        occurs in training documents.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.
      env: the environment whose packages are read; default the current one.

    Raises:
      ValueError: a source is unknown, no source has a document, or files of the existing corpus
        have been changed or lost.
    """
    settings: dict[str, Any] = {
        "sources": names.resolve(sources),
        "bytes_per_source": bytes_per_source,
        "validation_fraction": validation_fraction,
        "min_document_bytes": min_document_bytes,
        "max_document_bytes": max_document_bytes,
        "near_duplicate_threshold": near_duplicate_threshold,
        "containment_threshold": containment_threshold,
    }
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be in [0, 1)")
    env = env or environment.Environment.current()
    read = {package for name in settings["sources"] for package in names.SOURCES[name].packages}
    packages = env.versions(tuple(sorted(read)))  # of those that are installed
    key = fingerprint.of_json([settings, packages, _code_digest()])[:16]
    directory = cache.cache_dir("corpora", key, override=cache_dir)
    result = Corpus(directory)
    if (directory / MANIFEST).is_file():
        memory = cache.cache_dir("files", "file_digests.json", override=cache_dir)
        result.check(fingerprint.FileDigests(memory))
        _announce(result, "read from")
        return result

    from espalier.data.text import corpus_build  # only for who builds

    progress = functools.partial(Bar, desc="corpus", file=sys.stderr)
    cache.build_directory(
        directory,
        lambda target: corpus_build.build(
            target, env=env, settings=settings, packages=packages, progress=progress
        ),
        expected=[MANIFEST],
    )
    print(corpus_build.format_table(result.manifest), file=sys.stderr)
    _announce(result, "written to")
    return result


_RULES = ("corpus_build.py", "dedup.py", "splits.py")


@functools.cache
def _code_digest() -> str:
    """Returns the hash of the code that reads and cleans."""
    folder = pathlib.Path(__file__).parent
    return fingerprint.of_code(
        [*sorted(folder.glob("sources/*.py")), *map(folder.joinpath, _RULES)]
    )


_announced: set[pathlib.Path] = set()


def _announce(corpus: Corpus, what: str) -> None:
    """Prints once per process which corpus is used; gin calls `assemble` once per reference."""
    if corpus.directory not in _announced:
        _announced.add(corpus.directory)
        print(f"corpus {corpus.digest[:12]} {what} {corpus.directory}", file=sys.stderr, flush=True)
