"""Rows of samples and their verdicts, which are added to a file and found in it later."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from data.text import documents


class CodeRowsError(ValueError):
    """Rows that are there and were made otherwise."""


class CodeRows:
    """A file of rows of one run of a command, to which it adds. A context manager.

    Each row has "made_with", a hash of the settings: those of other settings are refused.

    Args:
      path: of the file; what is cut short at its end is dropped.
      settings: everything that decides the rows, as JSON.

    Attributes:
      found: (task_id, sample) -> the row.

    Raises:
      CodeRowsError: rows there were made with other settings.
      DataError: a malformed line.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]):
        content = json.dumps(settings, sort_keys=True)
        self._made_with = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._path = path
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        if os.path.isfile(path):
            self._read()

    def _read(self) -> None:
        with open(self._path, "rb+") as file:
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)
        for number, row in documents.read_json_lines(pathlib.Path(self._path)):
            if row.get("made_with") != self._made_with:
                raise CodeRowsError(
                    f"--output={self._path}, line {number}: made with another checkpoint, other "
                    "problems or other settings. Choose another file, or delete this one."
                )
            self.found[row["task_id"], row["sample"]] = row

    def __enter__(self) -> "CodeRows":
        # Half of a surrogate pair becomes the escape that JSON has for it.
        self._file = open(  # noqa: SIM115
            self._path, "a", encoding="utf-8", errors="backslashreplace", buffering=1
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row, which is on its way to the disk then."""
        whole = {**row, "made_with": self._made_with}
        self._file.write(json.dumps(whole, ensure_ascii=False) + "\n")
        self.found[row["task_id"], row["sample"]] = whole
