"""Metrics from the device to where people read them.

On the device every metric is a pair (sum, weight), scalars or vectors, so that any split of a batch
over microbatches, steps or hosts gives the same quotient. They are fetched one step late, so that
waiting for them never holds up the next step.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

# name -> (sum, weight), arrays of one shape.
Pairs = Mapping[str, tuple[Any, Any]]


class WriterError(ValueError):
    """A metric writer cannot be used as configured."""


def add(total: Pairs | None, new: Pairs) -> dict[str, tuple[Any, Any]]:
    """Sums two sets of metrics; a name missing on one side counts as nothing there."""
    summed = dict(total or {})
    for name, (value, weight) in new.items():
        old = summed.get(name)
        summed[name] = (value, weight) if old is None else (old[0] + value, old[1] + weight)
    return summed


def divide(pairs: Pairs, names: Mapping[str, Sequence[str]] | None = None) -> dict[str, float]:
    """The quotients as floats; what has no weight (a domain without tokens) is left out.

    Args:
      pairs: metrics on the host.
      names: labels of vector metrics; 'source_loss' of ['prose', 'code'] becomes
        'source_loss/prose' and 'source_loss/code'.
    """
    values = {}
    for name, (total, weight) in pairs.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        labels: Iterable[str]
        if total.ndim == 0:
            labels = [name]
        else:
            given = (names or {}).get(name) or range(total.size)
            labels = [f"{name}/{label}" for label in given]
        for label, t, w in zip(labels, total.ravel(), weight.ravel(), strict=True):
            if w:
                values[label] = float(t / w)
    return values


class LateFetch:
    """Holds the newest step's device metrics and hands out those of the step before.

    Copies to the host start at once and are awaited only when the next step is already running.
    """

    def __init__(self):
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, metrics: Any) -> tuple[int, Any] | None:
        """Takes a step's metrics; returns (step, host metrics) of the one pushed before, if any."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        previous, self._waiting = self._waiting, (step, metrics)
        return self._fetch(previous)

    def flush(self) -> tuple[int, Any] | None:
        """What is still held, now."""
        previous, self._waiting = self._waiting, None
        return self._fetch(previous)

    @staticmethod
    def _fetch(held: tuple[int, Any] | None) -> tuple[int, Any] | None:
        return None if held is None else (held[0], jax.device_get(held[1]))


class MetricWriter(Protocol):
    """Takes the scalars of a step, which may be written several times.

    Steps do not decrease, but for a rollback: after a row with `rollback_to` they go on from there, and
    the rows of later steps before it are of updates that were given up.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line: {"step": ..., "time": ..., name: value, ...}.

    NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity";
    `read_jsonl` turns them back. A line is written in one call, so that a kill can only cut the last
    one short.
    """

    def __init__(self, path: str, *, first_step: int | None = None):
        """Opens the file to go on with `first_step`; lines of that step and later are dropped."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if first_step is not None and os.path.exists(path):
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < first_step]
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in kept)
            os.replace(f"{path}.tmp", path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": int(step), "time": round(time.time(), 3)}
        row.update({name: _jsonable(value) for name, value in values.items()})
        self._line(row)

    def text(self, step: int, name: str, text: str) -> None:
        self._line({"step": int(step), "time": round(time.time(), 3), name: text})

    def _line(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short is left out."""
    special = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    rows = [json.loads(line) for line in _whole_lines(path)]
    return [
        {k: special.get(v, v) if isinstance(v, str) else v for k, v in row.items()} for row in rows
    ]


def _whole_lines(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line[:-1] for line in file if line.endswith("\n") and line.strip()]


def _jsonable(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class TensorBoardWriter:
    """Event files for TensorBoard; points of `first_step` and later from before are hidden."""

    def __init__(self, path: str, *, first_step: int | None = None):
        from tensorboardX import SummaryWriter  # slow to import, and not needed by most processes

        self._writer = SummaryWriter(path, purge_step=first_step or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), int(step))

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, int(step))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases, with the `wandb` extra; its account settings are the user's own."""

    def __init__(
        self, *, project: str, name: str | None = None, config: Any = None, **settings: Any
    ):
        """Starts a run; `settings` go to wandb.init."""
        try:
            import wandb
        except ImportError:
            raise WriterError(
                "WandbWriter needs the package wandb, which is not installed: "
                "pip install 'espalier-lm[wandb]', or leave the writer out of the configuration."
            ) from None
        self._wandb = wandb
        self._run = wandb.init(project=project, name=name, config=config, **settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=int(step))

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{text}</pre>")}, step=int(step))

    def flush(self) -> None:
        pass  # wandb sends in the background

    def close(self) -> None:
        self._run.finish()


class MultiWriter:
    """Writes to all of several writers."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        for writer in self._writers:
            writer.text(step, name, text)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
