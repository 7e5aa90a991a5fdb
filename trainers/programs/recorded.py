"""The bytes with which jax's cache of compiled programs stores or loads a program.

A program that the runtime has loaded from bytes loses some of its functions when it is made bytes again (XLA for CPUs), so the bytes that
jax has read are kept. Its cache has no public access to them.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import compilation_cache

_last = threading.local()


class _Recorder:
    """A cache of jax's that remembers the entry that this thread has read or written last."""

    def __init__(self, cache: Any):
        self._cache = cache

    def get(self, key: str) -> bytes | None:
        _last.entry = self._cache.get(key)
        return _last.entry

    def put(self, key: str, value: bytes) -> None:
        _last.entry = value
        self._cache.put(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Entry:
    """What jax's cache read or wrote while a program was compiled."""

    def __init__(self) -> None:
        self.executable: bytes | None = (
            None  # None if the program was compiled and is not in the cache
        )


@contextlib.contextmanager
def recorded() -> Iterator[Entry]:
    """Context manager: yields the entry of the one program that the body compiles, which is complete after the body."""
    client: Any = jax.devices()[0].client
    cache: Any = compilation_cache._get_cache(client)
    if cache is not None and not isinstance(cache, _Recorder):
        compilation_cache._cache = _Recorder(cache)  # type: ignore[assignment]
    _last.entry = None
    entry = Entry()
    yield entry
    if _last.entry is not None:
        whole = compilation_cache.decompress_executable(_last.entry)
        entry.executable, _ = compilation_cache.extract_executable_and_time(whole)
