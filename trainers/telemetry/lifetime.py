"""The time of a run's whole life, over all its restarts, which a file in its directory records while it runs.

A killed process writes nothing at its end, so a thread writes every few seconds; the next start then knows when the one
before was last alive, and how many of its steps were lost: those after the checkpoint that the run continues from.

    lifetime.json    {"starts": [{"began", "alive", "from_step", "step", "first_step_at", "ended", "seconds", "saves",
                      "lost_steps", "lost_seconds"}, ...], "checksum"}
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.common.stages import duration
from espalier.trainers.telemetry import marks
from espalier.trainers.telemetry.goodput import PARTS, START_PARTS, Goodput
from espalier.trainers.telemetry.marks import is_count, is_number

FILE = "lifetime.json"

# What counts as training when a line sums up a life.
_TRAINING = ("step", "generation")
_PAUSE_SECONDS = 5.0
_SILENT_SECONDS = 12 * _PAUSE_SECONDS  # without a sign of life, a process is dead
_MOST_SAVES = 32  # of the last start, to know when a step was reached
_MOST_BYTES = 64 << 20

_log = logging.getLogger(__name__)


class DamagedLifetimeError(ValueError):
    """A file is not the record of a run's life."""


@dataclasses.dataclass
class Start:
    """One process (or one group of them) in the life of a run.

    Attributes:
      began, alive: when the process began, and when it last wrote, in seconds since 1970.
      from_step: the step it went on from; None before its state was there.
      step: updates made.
      first_step_at: when the first of its updates was complete; None before.
      ended: 'running', 'done', 'interrupted' by a signal, or 'failed'; a killed process was last 'running', see `ending`.
      seconds: its time by part, see goodput.PARTS.
      saves: [step, seconds of training until its save] of the last saves.
      lost_steps, lost_seconds: updates that the next start had to make again, and the time they had taken; of a killed
        process the least that they can be, since it may have gone on after its last record.
    """

    began: float
    alive: float
    from_step: int | None = None
    step: int = 0
    first_step_at: float | None = None
    ended: str = "running"
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    saves: list[list[float]] = dataclasses.field(default_factory=list)
    lost_steps: int = 0
    lost_seconds: float = 0.0

    @property
    def training(self) -> float:
        """Seconds of training."""
        return sum(self.seconds.get(part, 0.0) for part in _TRAINING)

    def lose(self, step: int, recorded: int = 0) -> None:
        """Notes that the run went on from `step`; `recorded` is the last step of which this start has left a row of metrics."""
        self.step = max(self.step, recorded)
        if self.from_step is None or step >= self.step:
            return
        self.lost_steps = self.step - max(step, self.from_step)
        share = self.training * self.lost_steps / max(self.step - self.from_step, 1)
        at_save = [seconds for saved, seconds in self.saves if saved == step]
        self.lost_seconds = max(self.training - at_save[-1], 0.0) if at_save else share
        if step < self.from_step:  # damaged steps: an earlier start has lost some too
            self.lost_seconds = self.training


def counted(starts: Sequence[Start]) -> Sequence[Start]:
    """Returns the starts of a run without the starts that failed before its first step, such as by a wrong setting."""
    first = next((i for i, s in enumerate(starts) if s.first_step_at is not None), len(starts))
    return [s for i, s in enumerate(starts) if i >= first or s.ended != "failed"] or starts[-1:]


def ending(starts: Sequence[Start], number: int, now: float) -> str:
    """Returns how a start ended: as recorded, or 'killed' if it neither says so nor lives any more.

    Args:
      starts: all starts.
      number: which one.
      now: seconds since 1970.
    """
    start = starts[number]
    later = number + 1 < len(starts)
    silent = now - start.alive > _SILENT_SECONDS
    return "killed" if start.ended == "running" and (later or silent) else start.ended


def gaps(starts: Sequence[Start]) -> list[float]:
    """Returns the seconds between each start and the one before; 0 for the first, and after a run that was done."""
    pairs = zip(starts, starts[1:], strict=False)
    return [0.0, *(0.0 if a.ended == "done" else max(b.began - a.alive, 0.0) for a, b in pairs)]


def waits(starts: Sequence[Start]) -> list[float | None]:
    """Returns the seconds from the last sign of life before each start to its first step; None without either."""
    before = [None, *(None if s.ended == "done" else s.alive for s in starts)]
    pairs = zip(before, (s.first_step_at for s in starts), strict=False)
    return [None if a is None or b is None else max(b - a, 0.0) for a, b in pairs]


def lost_steps(starts: Sequence[Start]) -> str:
    """Returns the number of lost steps as a text, 'at least 25' if one of the starts that lost them was killed."""
    least = any(s.lost_steps and s.ended == "running" for s in starts)
    return f"{'at least ' * least}{sum(s.lost_steps for s in starts):,}"


def split(starts: Sequence[Start]) -> dict[str, float]:
    """Returns the seconds of a run by part: the parts of `goodput` without lost steps, and 'lost' and 'gaps'."""
    parts = {part: sum(s.seconds.get(part, 0.0) for s in starts) for part in (*PARTS, "other")}
    lost = sum(s.lost_seconds for s in starts)
    parts["step"] = max(parts["step"] - lost, 0.0)
    return {**parts, "lost": lost, "gaps": sum(gaps(starts))}


_NAMES = {
    "lost": "lost steps",
    "start": "start-up",
    "evaluation": "evaluation",
    "checkpoint": "saving",
    "data_wait": "waiting for data",
    "gaps": "between processes",
    "other": "other",
}


def line(starts: Sequence[Start]) -> str:
    """Returns one line on a life: the share of steps that count, and where the rest of the time went; see `counted`."""
    starts = counted(starts)
    parts = split(starts)
    total = sum(parts.values())
    parts["start"] = sum(parts[part] for part in START_PARTS)
    useful = sum(parts[part] for part in _TRAINING)
    lost = lost_steps(starts)
    texts = [
        f"{parts[part] / total:.0%} {name}{f' ({lost})' if part == 'lost' and lost != '0' else ''}"
        for part, name in _NAMES.items()
        if total and parts[part] >= 0.005 * total
    ]
    number = f"{len(starts)} start{'s' * (len(starts) > 1)}"
    share = useful / total if total else 0.0
    text = f"{share:.0%} of {duration(total)} in steps that count, {number}"
    text += f"; {', '.join(texts)}" if texts else ""
    if len(starts) > 1 and (seconds := waits(starts)[-1]) is not None:
        text += f"; {duration(seconds)} from the last sign of life to the next step"
    return text


def read(path: str | os.PathLike) -> list[Start]:
    """Returns the starts that a file records.

    Raises:
      FileNotFoundError: there is no file.
      DamagedLifetimeError: it is damaged.
    """
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        body = json.loads(data)
        starts = [_start(entry) for entry in body["starts"]]
        if body["checksum"] != _checksum(body["starts"]) or len(data) > _MOST_BYTES:
            raise ValueError("it does not match its checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedLifetimeError(
            f"{os.fspath(path)} is damaged ({type(error).__name__}: {error}). Delete it: it only describes the run."
        ) from None
    return starts


def _start(entry: Mapping[str, Any]) -> Start:
    start = Start(**entry)
    numbers = [start.began, start.alive, start.lost_seconds, *start.seconds.values()]
    numbers += [x for x in (start.first_step_at,) if x is not None]
    numbers += [x for pair in start.saves for x in pair]
    counts = [start.step, start.lost_steps, *(x for x in (start.from_step,) if x is not None)]
    pairs = all(len(pair) == 2 for pair in start.saves)
    if not (pairs and all(map(is_number, numbers)) and all(map(is_count, counts))):
        raise ValueError("a start has other values than numbers")
    return start


def _checksum(starts: Sequence[Mapping[str, Any]]) -> str:
    return f"{zlib.crc32(json.dumps(starts, sort_keys=True).encode()):08x}"


class Unrecorded:
    """Stands for `Lifetime` where a loop's progress is not recorded."""

    def reached(self, step: int) -> None:
        """Notes the number of updates made."""

    def saved(self, step: int) -> None:
        """Notes that the state of a step is being saved."""


class Lifetime(Unrecorded, contextlib.AbstractContextManager):
    """Records this start after the earlier ones: a context in which a thread writes. Only one process of a run has it."""

    def __init__(
        self,
        path: str,
        write: Callable[[str], None],
        goodput: Goodput,
        *,
        pause: float = _PAUSE_SECONDS,
    ):
        """Reads the earlier starts; a damaged file is copied aside, with a warning.

        Args:
          path: the file.
          write: replaces the file's text.
          goodput: the time of this process, which began with it.
          pause: seconds between two writes.
        """
        self._write, self._goodput, self._pause = write, goodput, pause
        self._lock, self._wake, self._done = threading.Lock(), threading.Event(), False
        # Apart from the other lock: training must not wait for a slow store.
        self._writing = threading.Lock()
        self._failed = False
        self.starts: list[Start] = []
        try:
            self.starts = read(path)
        except FileNotFoundError:
            pass
        except DamagedLifetimeError as error:
            _log.warning(
                "%s The life of the run is counted anew; see %s.", error, marks.copy_aside(path)
            )
        now = time.time()
        began = now - sum(goodput.so_far().values())
        self.now = Start(began, now)
        self.starts.append(self.now)
        self._thread = threading.Thread(target=self._beat, name="lifetime", daemon=True)

    def __enter__(self) -> "Lifetime":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._done = True
        self._wake.set()
        self._thread.join()
        if self.now.ended == "running":
            self.now.ended = "failed" if kind is not None else "done"
        self._record()

    def _beat(self) -> None:
        while not self._done:
            self._record()
            self._wake.wait(self._pause)
            self._wake.clear()

    def _record(self) -> None:
        with self._writing:
            with self._lock:
                self.now.alive = time.time()
                self.now.seconds = {k: round(v, 3) for k, v in self._goodput.so_far().items()}
                starts = [dataclasses.asdict(start) for start in self.starts]
            text = json.dumps({"starts": starts, "checksum": _checksum(starts)}, sort_keys=True)
            try:
                self._write(text + "\n")
            except OSError as error:
                if not self._failed:
                    _log.warning("%s cannot be written (%s); training goes on.", FILE, error)
                self._failed = True

    def goes_on_from(self, step: int, *, of_run: bool, recorded: int = 0) -> None:
        """Notes the step of the state.

        Args:
          step: its step.
          of_run: whether it is from one of the run's own checkpoints.
          recorded: the last step in the run's rows of metrics, as the start before has left them.
        """
        with self._lock:
            self.now.from_step = self.now.step = step
            if len(self.starts) > 1:
                before = self.starts[-2]
                before.lose(step if of_run else before.from_step or 0, recorded)
                before.saves = []

    def reached(self, step: int) -> None:
        if self.now.first_step_at is None:
            self.now.first_step_at = time.time()
            self._wake.set()  # a restart is over: others may wait for it
        self.now.step = step

    def saved(self, step: int) -> None:
        with self._lock:
            seconds = self._goodput.so_far()
            training = round(sum(seconds[part] for part in _TRAINING), 3)
            earlier = [pair for pair in self.now.saves if pair[0] < step]
            self.now.saves = [*earlier, [step, training]][-_MOST_SAVES:]

    def ends(self, *, interrupted: bool) -> str:
        """Notes how the run ends, and returns the line on its life."""
        self.now.ended = "interrupted" if interrupted else "done"
        self._record()
        return line(self.starts)
