"""Evaluation sets in a local folder, with the files and columns of their public repositories.

    DATA_DIR/<set>/[<configuration>/] ... <split>*.parquet, .jsonl, .jsonl.gz or .jsonl.zst (of FLORES .devtest)

or in a folder <split>. This is the layout of a download of the repository to DATA_DIR/<set>. Nothing is downloaded here.
"""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.data.text import documents

VARIABLE = "ESPALIER_EVAL_DATA"
_TEXT = ".devtest"  # of FLORES: a sentence per line, in the column `text`
_KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", _TEXT)
_PACKED = re.compile(r"\.(gz|zst)$")
_PART = re.compile(r"-(?:\d+|\*)-of-(\d+).*")  # a digest may follow


class MissingDataError(FileNotFoundError):
    """An evaluation set is missing."""


class WrongDataError(ValueError):
    """An evaluation set lacks a column of its public files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The place of an evaluation set in the data folder, and its origin.

    Attributes:
      folder: folder of the set, in the data folder.
      split: prefix of the names of its files.
      columns: columns to read.
      configuration: subfolder, for repositories of several sets.
      repository: repository on the Hugging Face hub; None for a set that is not on the hub.
      revision: revision of the repository, if the main revision has other files.
      how: how to get a set that is not on the hub.
      only: a column, and the start of its text in the rows to read, if the files hold other rows too.
    """

    folder: str
    split: str
    columns: tuple[str, ...]
    configuration: str | None = None
    repository: str | None = None
    revision: str | None = None
    how: str | None = None
    only: tuple[str, str] | None = None


def rows(source: Source, data_dir: str | os.PathLike | None = None) -> list[Mapping[str, Any]]:
    """Returns the rows of a set.

    Args:
      source: the set.
      data_dir: the folder of all sets; None for $ESPALIER_EVAL_DATA.

    Raises:
      MissingDataError: the set, a row to read, or the setting of the data folder is missing.
      WrongDataError: a column is missing.
      DataError: a malformed line.
    """
    files = find(source, data_dir)
    result: list[Mapping[str, Any]] = []
    for path in files:
        for where, row in _read(path):
            missing = [column for column in source.columns if column not in row]
            if missing:
                raise WrongDataError(
                    f"{where}: there is no column {missing[0]!r}, but {', '.join(row)}. Use the set's "
                    f"public files: {_how(source, path.parent)}"
                )
            if source.only is None or str(row[source.only[0]]).startswith(source.only[1]):
                result.append(row)
    if not result:
        which = "" if source.only is None else " whose {!r} starts with {!r}".format(*source.only)
        raise MissingDataError(f"{files[0]} holds no rows{which}: {_how(source, files[0].parent)}")
    return result


def find(source: Source, data_dir: str | os.PathLike | None = None) -> list[pathlib.Path]:
    """Returns the files of a set, at least one; raises the errors of `rows`."""
    folder = data_dir or os.environ.get(VARIABLE)
    if not folder:
        raise MissingDataError(
            f"Evaluation sets are read from a local folder: give --data_dir=DIR, or set {VARIABLE}."
        )
    root = pathlib.Path(folder, source.folder)
    configured = root / source.configuration if source.configuration else root
    paths = [
        path
        for path in sorted(configured.rglob("*"))
        if path.name.endswith(_KINDS) and path.is_file() and _is_of(path, configured, source.split)
    ]
    if not paths:
        raise MissingDataError(
            f"no {source.split}*.parquet or .jsonl below {configured}: {_how(source, root)}"
        )
    # If a split exists in both formats, or a file also compressed, only one is read.
    paths = [path for path in paths if path.suffix == ".parquet"] or paths
    paths = sorted({_PACKED.sub("", os.fspath(path)): path for path in reversed(paths)}.values())
    parts = collections.Counter(_PART.sub(r"-*-of-\1", os.fspath(path)) for path in paths)
    for name, count in parts.items():
        if (match := _PART.search(name)) and count < int(match[1]):
            raise MissingDataError(
                f"{name} has {count} of {int(match[1])} files: {_how(source, root)}"
            )
    return paths


def _is_of(path: pathlib.Path, root: pathlib.Path, split: str) -> bool:
    return path.name.startswith(split) or split in path.relative_to(root).parts[:-1]


def _how(source: Source, root: pathlib.Path) -> str:
    if source.repository is None:
        return source.how or "it is not public"
    revision = f" --revision={source.revision}" if source.revision else ""
    return f"hf download --repo-type=dataset{revision} {source.repository} --local-dir={root}"


def _read(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (place, row) for each row of a file."""
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError, OverflowError, LookupError) as error:
            raise WrongDataError(f"{path} is damaged or no Parquet file: {error}") from None
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
        return
    if path.name.endswith(_TEXT):
        for number, line in enumerate(documents.read_lines(path), start=1):
            yield f"{path}, line {number}", {"text": line}
        return
    for number, row in documents.read_json_lines(path, example='{"question": "...", ...}'):
        yield f"{path}, line {number}", row
