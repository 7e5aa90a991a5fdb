"""A folder or an address of an object store, in which the steps of a pipeline leave results for each other."""

import concurrent.futures
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from espalier.common.storage import output_files, paths

T = TypeVar("T")
R = TypeVar("R")
_THREADS = 16  # requests of one process to an object store at a time


@dataclasses.dataclass(frozen=True)
class ResultFolder:
    """Files that are written whole, by any worker, and read whole or by ranges."""

    path: str

    def of(self, name: str) -> str:
        return paths.join(self.path, name)

    def make(self) -> None:
        if not paths.is_remote(self.path):
            os.makedirs(self.path, exist_ok=True)

    def names(self) -> list[str]:
        """Returns what is in the folder; [] if there is none."""
        if paths.is_remote(self.path):
            return paths.names(self.path)
        return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []

    def delete(self) -> None:
        if paths.is_remote(self.path):
            paths.delete(*map(self.of, paths.entries(self.path)))
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def has(self, name: str) -> bool:
        return paths.exists(self.of(name))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Returns the bytes of a file from `begin` to `end`; raises FileNotFoundError."""
        path = self.of(name)
        if paths.is_remote(path):
            with paths.reporting(path):
                return paths.filesystem(path).cat_file(path, start=begin, end=end)
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else end - begin)

    def write(self, name: str, content: bytes) -> None:
        output_files.write(self.of(name), content)

    def json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def together(function: Callable[[T], R], items: Iterable[T]) -> Sequence[R]:
    """Returns the results of a function that mostly waits for a store, in the order of the items."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))
