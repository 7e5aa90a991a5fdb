"""The bytes with which jax's cache of compiled programs stores or loads a program.

A program that the runtime has loaded from bytes loses some of its functions when it is made bytes again (XLA for CPUs), so the bytes that
jax has read are kept. Its cache has no public access to them.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache import (
    _get_cache,
    decompress_executable,
    extract_executable_and_time,
)


@dataclasses.dataclass
class Entry:
    """What jax's cache read or wrote while a program was compiled.

    Attributes:
      searched: whether jax searched its cache; if not, it had the program in memory, from wherever.
      executable: bytes that it read or wrote; None for neither.
    """

    searched: bool = False
    executable: bytes | None = None


class _Recorder:
    """A cache of jax's that notes what this thread reads and writes."""

    def __init__(self, cache: Any):
        self._cache = cache

    def get(self, key: str) -> bytes | None:
        value = self._cache.get(key)
        _note(value)
        return value

    def put(self, key: str, value: bytes) -> None:
        _note(value)
        self._cache.put(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


_of_thread = threading.local()


def _note(value: bytes | None) -> None:
    entry = getattr(_of_thread, "entry", None)
    if entry is not None:
        entry.searched = True
        if value is not None:
            entry.executable, _ = extract_executable_and_time(decompress_executable(value))


@contextlib.contextmanager
def recorded() -> Iterator[Entry]:
    """Context manager: yields the entry of the one program that the body compiles."""
    client: Any = jax.devices()[0].client
    cache: Any = _get_cache(client)
    if cache is not None and not isinstance(cache, _Recorder):
        compilation_cache._cache = _Recorder(cache)  # type: ignore[assignment]
    _of_thread.entry = entry = Entry()
    try:
        yield entry
    finally:
        _of_thread.entry = None
