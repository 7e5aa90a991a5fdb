"""Writers of metrics: JSON lines, TensorBoard, Weights & Biases."""

import contextlib
import errno
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

# A flush of an event file waits for the disk, so it is not done for every event.
_FLUSH_SECONDS = 10

_log = logging.getLogger(__name__)


class WriterError(ValueError):
    """A metric writer cannot be used as configured, or cannot write any more."""


class MetricWriter(Protocol):
    """Writes the scalars of steps; a step may be written several times.

    Steps decrease only after a rollback, a row with `rollback_to`: earlier rows of later steps belong to discarded
    updates.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Writes one JSON object per line: {"step": ..., "time": ..., name: value, ...}.

    NaN and infinities, which JSON does not have, are written as the strings "NaN", "Infinity" and
    "-Infinity"; `read_jsonl` converts them back. Each line is written in one call, so a killed process
    can only truncate the last line.
    """

    def __init__(self, path: str, *, first_step: int | None = None):
        """Opens the file to continue with `first_step`; lines of that step and later steps are dropped."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if first_step is not None and os.path.exists(path):
            lines = [(json.loads(line), line) for line in _whole_lines(path)]
            # Apply rollbacks before dropping lines: a `rollback_to` row may itself be dropped.
            earlier = [line for row, line in _in_force(lines) if row["step"] < first_step]
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in earlier)
            os.replace(f"{path}.tmp", path)
        self._path = path
        # Unbuffered, so that `close` does not fail again on data that could not be written.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: jsonable(value) for name, value in values.items()}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with _written(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


def rows_in_force(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file without the rows that a rollback discarded."""
    return [row for row, _ in _in_force([(row, None) for row in read_jsonl(path)])]


def _in_force(rows: Sequence[tuple[Mapping[str, Any], Any]]) -> list[tuple[Any, Any]]:
    in_force: list[tuple[Any, Any]] = []
    for row, line in rows:
        if "rollback_to" in row:
            in_force = [(r, x) for r, x in in_force if r["step"] <= row["rollback_to"]]
        in_force.append((row, line))
    return in_force


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, without a truncated last line."""
    return [restored(json.loads(line)) for line in _whole_lines(path)]


def _whole_lines(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line[:-1] for line in file if line.endswith("\n") and line.strip()]


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


class TensorBoardWriter:
    """Writes event files for TensorBoard; hides earlier points of `first_step` and later steps.

    Events are written in the calling thread: tensorboardX's thread dies when the disk is full, and the loop would
    wait for it forever.
    """

    def __init__(self, path: str, *, first_step: int | None = None):
        # Slow to import, and most processes do not need it.
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        os.makedirs(path, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}"
        self._path = os.path.join(path, name)
        self._records = RecordWriter(self._path)
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        if first_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=first_step, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [{"tag": name, "simple_value": float(v)} for name, v in values.items()]
        self._add(step=int(step), summary={"value": scalars})

    def _add(self, **fields: Any) -> None:
        with _written(self._path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._records.flush()

    def close(self) -> None:
        try:
            self._records.close()
        except OSError as error:  # do not hide an exception in progress
            _log.warning("%s: the last points are missing: %s.", self._path, error.strerror)


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


class WandbWriter:
    """Writes to Weights & Biases; needs the `wandb` extra and the user's own account settings."""

    def __init__(
        self, *, project: str, name: str | None = None, config: Any = None, **settings: Any
    ):
        """Starts a run; `settings` are passed to wandb.init."""
        try:
            import wandb
        except ImportError:
            raise WriterError(
                "WandbWriter needs the package wandb, which is not installed: "
                "pip install 'espalier-lm[wandb]', or remove the writer from the configuration."
            ) from None
        self._run = wandb.init(project=project, name=name, config=config, **settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=int(step))

    def close(self) -> None:
        self._run.finish()


class MultiWriter:
    """Writes to several writers."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
