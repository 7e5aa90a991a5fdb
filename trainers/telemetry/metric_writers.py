"""Writers of metrics: JSON lines, TensorBoard, Weights & Biases, Trackio."""

import contextlib
import dataclasses
import errno
import importlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from espalier.common import files
from espalier.trainers.telemetry import marks as marks_lib
from espalier.trainers.telemetry.marks import Mark, is_count, is_number

# A flush of an event file waits for the disk, so it is not done for every event.
_FLUSH_SECONDS = 10

MARKS = "metrics_file"  # key in a checkpoint's meta: the marks of metrics.jsonl

_log = logging.getLogger(__name__)


class WriterError(ValueError):
    """A metric writer cannot be used as configured, or cannot write any more."""


class DamagedRowsError(ValueError):
    """A line of a JSON-lines file is not a row."""


class MetricWriter(Protocol):
    """Writes the scalars of steps; a step may be written several times.

    Steps decrease only after a rollback, a row with `rollback_to`: earlier rows of later steps belong to discarded
    updates. A writer may have a method `sync`, which is called before each checkpoint: it puts on disk what a run that
    continues from there will not write again, and returns facts to record with the checkpoint (JSON).
    """

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Writes one JSON object per line: {"step": ..., "time": ..., name: value, ...}.

    NaN and infinities, which JSON does not have, are written as the strings "NaN", "Infinity" and
    "-Infinity"; `read_jsonl` converts them back. Each line is written in one call, so a killed process
    can only truncate the last line.
    """

    def __init__(
        self,
        path: str,
        *,
        first_step: int | None = None,
        marks: Sequence[Sequence[int]] | None = None,
    ):
        """Opens the file to continue it; what cannot be continued is copied to `<path>.damaged`, with a warning.

        Args:
          path: the file.
          first_step: lines of that step and later steps are dropped; None for none.
          marks: in its place, the marks in the checkpoint that the run continues from: the file is verified, and
            what was written after them is dropped.
        """
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._path = path
        self._marks = marks_lib.from_json(list(marks or ()))
        if marks is not None:
            self._marks = _cut_to_marks(path, self._marks)
        elif first_step is not None and os.path.exists(path):
            _cut_to_step(path, first_step)
        # Unbuffered, so that `close` does not fail again on data that could not be written.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._end = self._marks[-1] if self._marks else _end_of(path)

    def sync(self) -> dict[str, Any]:
        """Returns `MARKS`: length and checksum of the file now and at earlier calls, as JSON."""
        with _written(self._path):
            os.fsync(self._file.fileno())
        self._marks = marks_lib.with_mark(self._marks, self._end)
        return {MARKS: [list(dataclasses.astuple(mark)) for mark in self._marks]}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: jsonable(value) for name, value in values.items()}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with _written(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = self._end.after(int(step), line)

    def close(self) -> None:
        self._file.close()


def _end_of(path: str) -> Mark:
    if not os.path.isfile(path):  # a device has no end
        return marks_lib.EMPTY
    with open(path, "rb") as file:
        return marks_lib.EMPTY.after(0, file.read())


def _cut_to_marks(path: str, marks: Sequence[Mark]) -> list[Mark]:
    """Shortens the file to its last mark, or to the last one that is good; returns the marks up to there."""
    good = marks_lib.last_good(path, marks)
    if marks and good != marks[-1]:
        first = f"after step {good.step} " if good.size else ""
        lost = f"the rows {first}up to step {marks[-1].step} are lost"
        if os.path.exists(path):
            aside = marks_lib.copy_aside(path)
            _log.warning("%s is damaged: %s (see %s). The run goes on.", path, lost, aside)
        else:
            _log.warning("%s is missing: %s. The run goes on.", path, lost)
    marks_lib.cut(path, good.size)
    return [mark for mark in marks if mark.size <= good.size]


def _cut_to_step(path: str, first_step: int) -> None:
    """Drops rows of `first_step` and later, and lines that are not rows."""
    rows, bad = [], []
    for number, line in _whole_lines(path):
        if (row := _metrics_of(line)) is None:
            bad.append(str(number))
        else:
            rows.append((row, line))
    if bad:
        aside = marks_lib.copy_aside(path)
        text = "%s is damaged: line %s is lost (see %s). The run goes on."
        _log.warning(text, path, ", ".join(bad), aside)
    # Apply rollbacks before dropping lines: a `rollback_to` row may itself be dropped.
    earlier = [line for row, line in _in_force(rows) if row["step"] < first_step]
    files.write(path, b"".join(earlier), synced=True)  # the rows are nowhere else


def rows_in_force(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file without the rows that a rollback discarded.

    Raises:
      DamagedRowsError: a line is not a row of metrics.
    """
    rows = _read(path, _metrics_of, "row of metrics (numbers by name, and a step)")
    return [row for row, _ in _in_force([(row, None) for row in rows])]


def _in_force(rows: Sequence[tuple[Mapping[str, Any], Any]]) -> list[tuple[Any, Any]]:
    in_force: list[tuple[Any, Any]] = []
    for row, line in rows:
        if "rollback_to" in row:
            in_force = [(r, x) for r, x in in_force if r["step"] <= row["rollback_to"]]
        in_force.append((row, line))
    return in_force


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a JSON-lines file, without a truncated last line.

    Raises:
      DamagedRowsError: a line is not a JSON object.
    """
    return _read(path, _row_of, "row")


def _read(
    path: str, parse: Callable[[bytes], dict[str, Any] | None], kind: str
) -> list[dict[str, Any]]:
    rows = []
    for number, line in _whole_lines(path):
        if (row := parse(line)) is None:
            raise DamagedRowsError(
                f"{path} is damaged: line {number} is not a {kind}. Take the file from a copy, or remove the line. "
                "(A run that is started again repairs its own metrics.jsonl.)"
            )
        rows.append(row)
    return rows


def _whole_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) without empty lines, and without the beginning of a row at the end."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            half = not line.endswith(b"\n") and line.startswith(b"{")
            if line.strip() and not half:
                yield number, line


def _row_of(line: bytes) -> dict[str, Any] | None:
    row = files.json_object(line)
    return None if row is None else restored(row)


def _metrics_of(line: bytes) -> dict[str, Any] | None:
    """Returns a row of metrics: a step, which is a count, and numbers by printable names; or None."""
    row = _row_of(line)
    if row is None or not is_count(row.get("step")):
        return None
    good = all(name.isprintable() and is_number(value) for name, value in row.items())
    return row if good else None


def jsonable(value: Any) -> Any:
    """Returns a value, or all values of a dict or list, as written to metrics.jsonl, see `JsonlWriter`."""
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    value = value.item() if hasattr(value, "item") else value
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def restored(value: Any) -> Any:
    """Reverses `jsonable`: "NaN" and infinities become numbers again."""
    if isinstance(value, dict):
        return {key: restored(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [restored(entry) for entry in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def measures_time(name: str) -> bool:
    """Returns whether a field of a row depends on the clock; all other fields are the same wherever a run was interrupted."""
    return name in ("time", "mfu") or name.startswith("time/") or name.endswith("_per_second")


def tag(name: str) -> str:
    """Returns the name of a metric in TensorBoard, which shows what stands before the first slash as a group."""
    if name.startswith(("eval/", "indicators/", "time/")):
        return name
    return f"time/{name}" if measures_time(name) else f"train/{name}"


class TensorBoardWriter:
    """Writes event files for TensorBoard.

    Hides the points that earlier files have of `first_step` and later steps, and the points that a rollback discards.

    Events are written in the calling thread: tensorboardX's thread dies when the disk is full, and the loop would
    wait for it forever.
    """

    def __init__(self, path: str, *, first_step: int | None = None):
        # Slow to import, and most processes do not need it.
        with _absent("boto3", "google.cloud.storage"):
            from tensorboardX import RecordWriter
            from tensorboardX.proto import event_pb2

        self._events = event_pb2
        os.makedirs(path, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}"
        self._path = os.path.join(path, name)
        self._records = RecordWriter(self._path)
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        if first_step is not None:
            self._hide(first_step)

    def _hide(self, first_step: int) -> None:
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(step=first_step, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if "rollback_to" in values:
            self._hide(int(values["rollback_to"]) + 1)
        scalars = [{"tag": tag(name), "simple_value": float(v)} for name, v in values.items()]
        self._add(step=int(step), summary={"value": scalars})

    def _add(self, **fields: Any) -> None:
        with _written(self._path):
            event = self._events.Event(wall_time=time.time(), **fields)
            self._records.write(event.SerializeToString())
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._records.flush()

    def sync(self) -> dict[str, Any]:
        """Writes out the points in memory."""
        with _written(self._path):
            self._records.flush()
        return {}

    def close(self) -> None:
        try:
            self._records.close()
        except OSError as error:  # do not hide an exception in progress
            _log.warning("%s: the last points are missing: %s.", self._path, error.strerror)


@contextlib.contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Context manager in which packages cannot be imported: clients of stores, which take longer than all of a start's others.

    tensorboardX imports those that are installed; this project's event files are in local folders.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _written(path: str) -> Iterator[None]:
    """Context manager that turns an OSError into a WriterError with the file's path and a fix."""
    try:
        yield
    except OSError as error:
        raise WriterError(
            f"cannot write {path}: {error.strerror}. Once it can be written (make room, if the disk "
            "is full), start the same command again: it continues from the last checkpoint."
        ) from error


class _TrackerWriter:
    """Writes to a package that has the interface of Weights & Biases."""

    _package: ClassVar[str]

    def __init__(self, *, project: str, **settings: Any):
        """Starts a run; `settings`, such as `name`, are passed to the package's `init`.

        Raises:
          WriterError: the package is not installed.
        """
        try:
            package = importlib.import_module(self._package)
        except ImportError:
            raise WriterError(
                f"{type(self).__name__} needs the package {self._package}, which is not installed: "
                f"pip install -e '.[{self._package}]', or remove the writer from the configuration."
            ) from None
        self._run = package.init(project=project, **settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=int(step))

    def close(self) -> None:
        self._run.finish()


class WandbWriter(_TrackerWriter):
    """Writes to Weights & Biases; needs the `wandb` extra and the user's own account settings."""

    _package = "wandb"


class TrackioWriter(_TrackerWriter):
    """Writes to Trackio, a dashboard on this machine (`trackio show`); needs the `trackio` extra."""

    _package = "trackio"


class MultiWriter:
    """Writes to several writers."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def sync(self) -> dict[str, Any]:
        """Returns the facts of all writers that have `sync`."""
        parts = [writer.sync() for writer in self._writers if hasattr(writer, "sync")]
        return {name: value for part in parts for name, value in part.items()}

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
