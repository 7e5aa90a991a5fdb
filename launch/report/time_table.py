"""Where the time of a run went, over all its starts, as text."""

import datetime
import os
import time
from collections.abc import Sequence

from espalier.common.stages import duration
from espalier.common.storage import mirror, paths
from espalier.trainers.telemetry import lifetime
from espalier.trainers.telemetry.goodput import START_PARTS
from espalier.trainers.telemetry.lifetime import Start

_HEAD = (
    "began (UTC)",
    "steps",
    "lasted",
    "in steps",
    "start-up",
    "lost steps",
    "to next step",
    "ended",
)


def text(directory: str | os.PathLike) -> str:
    """Returns the line on the life of a run in a folder or at an address, and a table with a row for each start.

    Raises:
      ValueError: the directory has no record of a run's time, or a damaged one.
      StoreError: the directory is an address, and its store refuses or cannot be reached.
    """
    path = paths.join(directory, lifetime.FILE)
    try:
        starts = lifetime.read(mirror.local(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: name the directory (MODEL_DIR) of a run that this version has trained."
        ) from None
    counted = lifetime.counted(starts)
    waits = dict(zip(map(id, counted), lifetime.waits(counted), strict=True))
    endings = [lifetime.ending(starts, number, time.time()) for number in range(len(starts))]
    each = zip(starts, endings, strict=True)
    rows = [_HEAD, *(_row(start, waits.get(id(start)), ended) for start, ended in each)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    table = ["  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{os.fspath(directory)}: {lifetime.line(starts)}", *map(str.rstrip, table)])


def _row(start: Start, wait: float | None, ended: str) -> Sequence[str]:
    began = datetime.datetime.fromtimestamp(start.began, datetime.UTC)
    steps = "-" if start.from_step is None else f"{start.from_step:,} to {start.step:,}"
    return (
        began.isoformat(" ", "seconds")[:19],
        steps,
        duration(sum(start.seconds.values())),
        duration(start.training),
        duration(sum(start.seconds.get(part, 0.0) for part in START_PARTS)),
        f"{start.lost_steps:,}",
        "-" if wait is None else duration(wait),
        ended,
    )
