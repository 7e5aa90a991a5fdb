"""Record batches of Arrow IPC files, as Hugging Face's `datasets` and other libraries write them (stream or file format).

Values are those that `datasets` gives: JSON columns are decoded, and columns of images, sound and other media are refused.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# The last bytes of a complete stream, as Arrow writes them since its version 0.15.
_END = b"\xff\xff\xff\xff\0\0\0\0"
_FILE_MAGIC = b"ARROW1"
# Features whose values are plain: numbers, texts, lists of them and dictionaries.
_PLAIN = ("Value", "ClassLabel", "Translation", "TranslationVariableLanguages", "Json")
_NESTED = ("Sequence", "List", "LargeList")
_ARRAYS = ("Array2D", "Array3D", "Array4D", "Array5D")


class ArrowFile:
    """An open Arrow file: its schema, and its record batches, of which a range can be read alone."""

    def __init__(self, source: Any):
        """Opens a file.

        Args:
          source: an open `pyarrow.NativeFile`.

        Raises:
          pyarrow.ArrowInvalid, OSError: it is no Arrow file, or was cut off.
        """
        import pyarrow

        self._file = None
        if source.read_at(len(_FILE_MAGIC), 0) == _FILE_MAGIC:
            self._file = pyarrow.ipc.open_file(source)
            self.schema = self._file.schema
            return
        size = source.size()
        if source.read_at(min(len(_END), size), max(size - len(_END), 0)) != _END:
            raise pyarrow.ArrowInvalid("the mark that ends a stream is missing")
        self._stream = pyarrow.ipc.open_stream(source)
        self.schema = self._stream.schema

    def batches(self, begin: int = 0, end: int | None = None) -> Iterator[Any]:
        """Yields the record batches from number `begin` on, before `end`; of a stream only once.

        Raises:
          pyarrow.ArrowInvalid, OSError: a batch is damaged.
        """
        if self._file is not None:
            stop = self._file.num_record_batches
            for number in range(begin, stop if end is None else min(end, stop)):
                yield self._file.get_batch(number)
            return
        for number, batch in enumerate(self._stream):
            if end is not None and number >= end:
                return
            if number >= begin:  # those before are only mapped
                yield batch


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[ArrowFile]:
    """Yields a file, mapped into memory; raises pyarrow.ArrowInvalid or OSError, see `ArrowFile`."""
    import pyarrow

    with pyarrow.memory_map(os.fspath(path)) as source:
        yield ArrowFile(source)


def batch_sizes(path: str | os.PathLike) -> list[tuple[int, int]]:
    """Returns (rows, bytes) of each record batch, in order; raises pyarrow.ArrowInvalid or OSError."""
    with opened(path) as file:
        return [(batch.num_rows, batch.nbytes) for batch in file.batches()]


def features(schema: Any) -> dict[str, Any]:
    """Returns the features that `datasets` has written into a schema, by column; {} for other files."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        return dict(json.loads(text)["info"]["features"] or {}) if text else {}
    except (ValueError, KeyError, TypeError):
        return {}


def media(schema: Any, columns: Iterable[str]) -> dict[str, str]:
    """Returns {column: kind} of the columns that hold images, sound or other media."""
    every = features(schema)
    kinds = {name: _media(every[name]) for name in columns if name in every}
    return {name: kind for name, kind in kinds.items() if kind}


def _media(feature: Any) -> str | None:
    kind = feature.get("_type") if isinstance(feature, Mapping) else None
    if isinstance(kind, str):
        if kind in (*_PLAIN, *_ARRAYS):
            return None
        return _media(feature.get("feature")) if kind in _NESTED else kind
    inner = feature.values() if isinstance(feature, Mapping) else feature
    return next(filter(None, map(_media, inner)), None) if isinstance(inner, Iterable) else None


def decoder(feature: Any) -> Callable[[Any], Any] | None:
    """Returns what makes the value that `datasets` gives of a stored one; None where they are the same."""
    if not isinstance(feature, Mapping):
        if isinstance(feature, list) and feature:
            return _each(decoder(feature[0]))
        return None
    kind = feature.get("_type")
    if kind == "Json":
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if kind in _NESTED:
        return _each(decoder(feature.get("feature")))
    if isinstance(kind, str):
        return None
    fields = {name: decode for name, inner in feature.items() if (decode := decoder(inner))}
    if not fields:
        return None

    def decoded(value: Any) -> Any:
        if value is None:
            return None
        return {
            name: fields[name](inner) if name in fields else inner for name, inner in value.items()
        }

    return decoded


def _each(decode: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    if decode is None:
        return None
    return lambda values: None if values is None else [decode(value) for value in values]
