"""Record batches of Arrow IPC files, as Hugging Face's `datasets` and other libraries write them (stream or file format).

Values are those that `datasets` gives: JSON columns are decoded, and columns of images, sound and other media are refused.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

# The last bytes of a complete stream, as Arrow writes them since its version 0.15.
_END = b"\xff\xff\xff\xff\0\0\0\0"
_FILE_MAGIC, _STREAM_IN_FILE = b"ARROW1", 8
# Features whose values are plain: numbers, texts, lists of them and dictionaries.
_PLAIN = ("Value", "ClassLabel", "Translation", "TranslationVariableLanguages", "Json")
_NESTED = ("Sequence", "List", "LargeList")
_ARRAYS = ("Array2D", "Array3D", "Array4D", "Array5D")


class Group(NamedTuple):
    """A part of a file of columns that can be read alone: a record batch, or a row group of Parquet."""

    begin: int  # where it begins, in bytes; the number of a row group
    rows: int
    values: int  # bytes of its values


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

        size = source.size()
        # A file in the file format is a stream between marks, with a table of contents behind it.
        is_file = source.read_at(len(_FILE_MAGIC), 0) == _FILE_MAGIC
        mark = _FILE_MAGIC if is_file else _END
        if source.read_at(min(len(mark), size), max(size - len(mark), 0)) != mark:
            raise pyarrow.ArrowInvalid("the mark at its end is missing")
        source.seek(_STREAM_IN_FILE if is_file else 0)
        self._source = source
        self._stream = pyarrow.ipc.open_stream(source)
        self.schema = self._stream.schema

    def batches(self, begin: int = 0, end: int | None = None) -> Iterator[Any]:
        """Yields the record batches from the one that begins at the byte `begin`, before `end`; only once.

        Raises:
          pyarrow.ArrowInvalid, OSError: a batch is damaged.
        """
        if begin:
            self._source.seek(begin)
        while end is None or self._source.tell() < end:
            try:
                yield self._stream.read_next_batch()
            except StopIteration:
                return

    def groups(self) -> list[Group]:
        """Returns where each record batch begins, and its size; one group of all if they share dictionaries, which come first."""
        begin, found = self._source.tell(), []
        for batch in self.batches():
            found.append(Group(begin, batch.num_rows, batch.nbytes))
            begin = self._source.tell()
        if found and any("dictionary<" in str(field.type) for field in self.schema):
            found = [Group(0, sum(x.rows for x in found), sum(x.values for x in found))]
        return found


@contextlib.contextmanager
def opened(file: str | BinaryIO) -> Iterator[ArrowFile]:
    """Yields a file, mapped into memory, or an open one; raises pyarrow.ArrowInvalid or OSError, see `ArrowFile`."""
    import pyarrow

    if not isinstance(file, str):
        yield ArrowFile(pyarrow.PythonFile(file, mode="r"))
        return
    with pyarrow.memory_map(file) as source:
        yield ArrowFile(source)


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
    """Returns a function that converts a stored value to the value that `datasets` returns; None if both are the same."""
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
