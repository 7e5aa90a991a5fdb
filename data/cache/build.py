"""Builds a token cache shard by shard: each shard alone, in any process and in any order, and the manifest last.

The files of a shard are written under temporary names and its entry (`00012.json`) last, so that a shard is complete or not
there. A shard that is complete is not written again: whoever continues a build that was interrupted, or repeats a shard, ends
with the same bytes. On this machine a build is a folder `<directory>.building`, which is renamed at the end. In an object
store it is the folder of the cache itself, which counts as a cache only with its manifest.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from espalier.common import files, versions
from espalier.common.storage import mirror, paths
from espalier.data.cache import blocks
from espalier.data.cache.cache_files import (
    Record,
    ShardWriter,
    add_known,
    canonical,
    file_entry,
    finished_shard,
    writing,
)
from espalier.data.cache.fingerprint import code as code_of
from espalier.data.pieces import Piece

FORMAT = 2  # 2: text bytes may be unknown (null)
MANIFEST = "manifest.json"
_STARTED = "build.json"  # in the folder of a build: what it builds, and by which versions


class BuildMismatchError(ValueError):
    """A process has other versions than the one that started the build, or the build is of something else."""


class Reader(Protocol):
    """A task, as far as a build needs it; pickled for other processes."""

    def records(self, split: str, pieces: Sequence[Piece]) -> Iterator[Record]:
        """Yields the records of pieces, always the same ones in the same order."""


@dataclasses.dataclass(frozen=True)
class Build:
    """A cache to be built.

    Attributes:
      directory: the folder of the cache, of this machine or in an object store.
      task: yields the records.
      split: of the task.
      features: feature -> vocabulary size (tokens are checked against it), 'text' for strings, or 'float32'.
      description: JSON that describes the records; part of the fingerprint.
      shards: the pieces of each shard.
    """

    directory: str
    task: Reader
    split: str
    features: Mapping[str, int | str]
    description: Mapping
    shards: tuple[tuple[Piece, ...], ...]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.description, self.features, len(self.shards))

    def start(self) -> None:
        """Makes the folder of the build, or finds the one of a build that was interrupted; a build of something else goes.

        Raises:
          FileExistsError: the cache exists.
          BuildMismatchError: the build was started by other versions.
          OSError: the folder cannot be written.
        """
        if paths.exists(paths.join(self.directory, MANIFEST)) or (
            not self._is_remote and pathlib.Path(self.directory).exists()
        ):
            raise FileExistsError(
                f"The token cache {self.directory} exists already; delete it to rebuild."
            )
        now = {"fingerprint": self.fingerprint, "shards": _pieces_digest(self.shards)}
        started = self._started()
        if started and {key: started.get(key) for key in now} == now:
            self._check_versions(started["versions"])
            return
        content = canonical({**now, "versions": self._versions()})
        if self._is_remote:
            if found := paths.entries(self._folder):
                paths.delete(*(paths.join(self._folder, name) for name in found))
            paths.write(paths.join(self._folder, _STARTED), content)
            return
        with writing(f"The token cache {self.directory}"):
            self._make_folder(content)

    def _make_folder(self, content: bytes) -> None:
        folder = pathlib.Path(self._folder)
        shutil.rmtree(folder, ignore_errors=True)
        # Of builds by earlier versions of the project.
        pathlib.Path(f"{self.directory}.fingerprint").unlink(missing_ok=True)
        folder.mkdir(parents=True)
        files.write(folder / _STARTED, content, synced=True)

    def write_shard(self, shard: int, report: Callable[[int], None] = lambda values: None) -> None:
        """Writes the files of one shard, unless they are complete.

        Args:
          shard: its number.
          report: called with numbers of values that were written since the last call.

        Raises:
          BuildMismatchError: the build was started by other versions, or is of something else.
          OSError: a file cannot be written; names the shard.
          ValueError: a record does not fit its feature; and what the task raises.
        """
        if self._is_finished():  # a worker that repeats what was done
            return
        started = self._started()
        if not started or started.get("fingerprint") != self.fingerprint:
            raise BuildMismatchError(
                f"{self._folder} is not the folder of this build; start the build again."
            )
        self._check_versions(started["versions"])
        if self._entry(shard, checked=True) is not None:
            return
        where = self.name_of(shard)
        with (
            self._shard_folder() as folder,
            ShardWriter(folder, shard, self.features, where=where, report=report) as writer,
        ):
            for record in self.task.records(self.split, self.shards[shard]):
                writer.append(record)
            entry = writer.finish()
            for table, names in blocks.groups_of([entry], shard).items():
                blocks.write_table(folder, table, names, entry["files"])

    def counts(self, shard: int) -> dict[str, int]:
        """Returns the numbers of records and tokens of a shard that is written."""
        folder = self.directory if self._is_finished() else self._folder
        entry = json.loads(paths.read(paths.join(folder, f"{shard:05d}.json")))
        tokens = [
            entry["values"][name] for name, kind in self.features.items() if type(kind) is int
        ]
        return {"records": entry["records"], "tokens": sum(tokens)}

    def name_of(self, shard: int) -> str:
        """Returns a shard's number and cache, for messages."""
        return f"Shard {shard + 1} of {len(self.shards)} of the token cache {self.directory}"

    def finish(self) -> None:
        """Writes the manifest, which makes the shards a cache.

        Raises:
          ValueError: a shard is missing.
          OSError: a file cannot be written.
        """
        if self._is_finished():
            return
        entries = [self._entry(shard) for shard in range(len(self.shards))]
        shards = [entry for entry in entries if entry is not None]
        if missing := [number for number, entry in enumerate(entries) if entry is None]:
            raise ValueError(
                f"{self._folder}: {len(missing)} of {len(entries)} shards are not written, the first is number "
                f"{missing[0] + 1}. Start the build again; finished shards are kept."
            )
        body = _manifest(self.fingerprint, self.features, self.description, shards)
        content, groups = manifest_bytes(body), blocks.groups_of(shards)
        index = {"of": body["content"], "written": blocks.entries_of(shards)}
        if self._is_remote:
            blocks.write_index(self._folder, groups, **index)
            paths.write(paths.join(self._folder, MANIFEST), content)
            paths.delete(paths.join(self._folder, _STARTED))
            return
        folder, directory = pathlib.Path(self._folder), pathlib.Path(self.directory)
        with writing(f"The token cache {self.directory}"):
            blocks.write_index(folder, groups, **index)
            files.write(folder / MANIFEST, content, synced=True)
            folder.rename(directory)
            (directory / _STARTED).unlink()
            files.sync(directory.parent)

    @property
    def _is_remote(self) -> bool:
        return paths.is_remote(self.directory)

    @property
    def _folder(self) -> str:
        """The folder in which the cache is built."""
        return self.directory if self._is_remote else f"{self.directory}.building"

    def _is_finished(self) -> bool:
        """Returns whether the cache is there."""
        try:
            body = json.loads(paths.read(paths.join(self.directory, MANIFEST)))["body"]
            return body["fingerprint"] == self.fingerprint
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def _versions(self) -> dict[str, str]:
        """Returns the versions and the digests of the code that makes the records, of users' classes too."""
        code = code_of(self.task)
        return versions.own() | {f"code of {name}": digest[:16] for name, digest in code.items()}

    def _check_versions(self, started: Mapping[str, str]) -> None:
        if differing := versions.differing(started, self._versions()):
            raise BuildMismatchError(
                f"The build {self._folder} was started with {differing}. Other versions could write other tokens: "
                "have the same ones wherever it is built, or delete the folder to build from the beginning."
            )

    def _started(self) -> dict:
        """Returns what the build's folder was started for; {} if there is none, or if that cannot be read."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(paths.read(paths.join(self._folder, _STARTED)))
            return found if isinstance(found, dict) and "versions" in found else {}
        return {}

    def _entry(self, shard: int, *, checked: bool = False) -> dict | None:
        """Returns the manifest's entry of a complete shard; None for others. `checked` compares checksums, too, on this machine."""
        if not self._is_remote:
            return finished_shard(pathlib.Path(self._folder), shard, checked=checked)
        try:
            entry = json.loads(paths.read(paths.join(self._folder, f"{shard:05d}.json")))
        except (FileNotFoundError, ValueError):
            return None
        found = paths.entries(self._folder, f"{shard:05d}.")
        sizes = {name: size for name, (size, _) in entry["files"].items()}
        return entry if sizes.items() <= {n: e.size for n, e in found.items()}.items() else None

    @contextlib.contextmanager
    def _shard_folder(self) -> Iterator[pathlib.Path]:
        """Yields a folder of this machine for the files of a shard; they are copied to the store at the end, the entry last."""
        if not self._is_remote:
            yield pathlib.Path(self._folder)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            names = sorted(path.name for path in pathlib.Path(folder).iterdir())
            mirror.publish(
                folder, self._folder, last=[name for name in names if name.count(".") == 1]
            )


def digest(value) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def fingerprint(description: Mapping, features: Mapping, num_shards: int) -> str:
    """Returns the hash of everything a cache is built from; shards determine the order of records."""
    inputs = {"format": FORMAT, "features": features, "num_shards": num_shards}
    return digest({**inputs, "description": description})


def manifest_bytes(body: Mapping) -> bytes:
    """Returns the content of a manifest, with its own checksum."""
    manifest = {"body": body, "sha256": digest(body)}
    return json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"


def _manifest(name: str, features: Mapping, description: Mapping, shards: list[dict]) -> dict:
    for shard, entry in enumerate(shards):
        # The checksum of the shard's own .json file, which is checked like any other file.
        own = {f"{shard:05d}.json": file_entry(canonical(entry))}
        entry["files"] = {**entry["files"], **own}
    return {
        "format": FORMAT,
        "fingerprint": name,
        "description": description,
        "features": dict(features),
        "records": sum(shard["records"] for shard in shards),
        **{
            key: {f: add_known(*(shard[key][f] for shard in shards)) for f in features}
            for key in ("values", "text_bytes")
        },
        "shards": shards,
        "content": digest([shard["files"] for shard in shards]),
    }


def _pieces_digest(shards: Sequence[Sequence[Piece]]) -> str:
    # Without paths and versions: the fingerprint covers what the files hold.
    return digest([[dataclasses.astuple(piece)[1:-1] for piece in shard] for shard in shards])
