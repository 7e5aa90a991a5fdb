"""The installed packages and the standard library, as trees of files, and documents to read from them.

This module imports no package. Files are listed from the installation records, so reading the text
of a package does not run its code.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable

# Directories that hold no prose or code worth training on, or that some systems do not install.
SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "testdata"}
)


def _find_distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Environment:
    """The packages and directories that sources read; tests pass their own.

    Args:
      stdlib: directory of the Python standard library, or None.
      include: directory of the C headers of Python, or None.
      find: name of a package -> its distribution, or None if it is not installed.
    """

    def __init__(
        self,
        *,
        stdlib: pathlib.Path | None,
        include: pathlib.Path | None,
        find: Callable[[str], importlib.metadata.Distribution | None] = _find_distribution,
    ):
        self.stdlib = stdlib
        self.include = include
        self._find = functools.cache(find)
        self._all_files = functools.cache(self._read_record)

    @classmethod
    def current(cls) -> "Environment":
        """Returns the environment of this process."""
        paths = sysconfig.get_paths()
        return cls(stdlib=pathlib.Path(paths["stdlib"]), include=pathlib.Path(paths["include"]))

    def versions(self, packages: Iterable[str]) -> dict[str, str]:
        """Returns {package: version} of installed `packages`; `python` is the standard library."""
        installed = {}
        for name in packages:
            if name == "python":
                if self.stdlib is not None:
                    installed[name] = platform.python_version()
            elif (distribution := self._find(name)) is not None:
                installed[name] = distribution.version
        return installed

    def description(self, package: str) -> str:
        """Returns the README in the metadata of a package, or ''."""
        distribution = self._find(package)
        if distribution is None:
            return ""
        # The raw text after the headers is the README; a message object would decode it.
        metadata = distribution.read_text("METADATA") or ""
        return metadata.partition("\n\n")[2]

    def files(self, package: str, suffixes: tuple[str, ...]) -> list[tuple[str, pathlib.Path]]:
        """Returns (name, path) of a package's files by suffix; `python` is the standard library."""
        if package == "python":
            return [] if self.stdlib is None else walk(self.stdlib, suffixes, prefix="python")
        return [(name, path) for name, path in self._all_files(package) if name.endswith(suffixes)]

    def _read_record(self, package: str) -> list[tuple[str, pathlib.Path]]:
        distribution = self._find(package)
        if distribution is None:
            return []
        names = (path.as_posix() for path in distribution.files or ())
        root = pathlib.Path(str(distribution.locate_file("")))
        return [
            (name, root / name)
            for name in sorted(names)
            if not SKIPPED_DIRECTORIES.intersection(parts := name.split("/"))
            and ".." not in parts
            and ".dist-info" not in parts[0]
        ]


def standard_library() -> Environment:
    """Returns an environment of the standard library, which depends only on Python's version."""
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return Environment(stdlib=stdlib, include=None, find=lambda name: None)


def walk(
    root: pathlib.Path, suffixes: tuple[str, ...], *, prefix: str
) -> list[tuple[str, pathlib.Path]]:
    """Returns (name, path) of the files under `root` by suffix, without `SKIPPED_DIRECTORIES`."""
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - SKIPPED_DIRECTORIES)
        relative = pathlib.PurePath(directory).relative_to(root).as_posix()
        for name in sorted(names):
            if name.endswith(suffixes):
                inner = name if relative == "." else f"{relative}/{name}"
                files.append((f"{prefix}/{inner}", pathlib.Path(directory) / name))
    return files


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole document (a book, a file, an article) that has not been read yet."""

    # stable name, equal on every machine. It determines the order of documents, and so which
    # documents a byte cap includes
    id: str
    # returns the text. It may raise `UnicodeDecodeError`; an empty text is dropped
    read: Callable[[], str]
    # determines the split. Documents with equal keys are in the same split, also across sources:
    # the docstrings and the code of one file share a key
    split_key: str

    @classmethod
    def of_text(cls, id: str, text: str) -> "Candidate":
        """Returns a candidate with an already known text."""
        return cls(id=id, read=lambda: text, split_key=id)


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of text and the packages it is read from."""

    # names of distributions, each optional; `python` is the standard library
    packages: tuple[str, ...]
    # environment -> its documents, in any order
    candidates: Callable[[Environment], Iterable[Candidate]]
    # whether documents are files of packages, whose licence headers are stripped and which are
    # dropped if generated
    files: bool = False
