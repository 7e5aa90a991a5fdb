"""The progress of a run on the screen: a bar on a terminal, plain lines in a file or a pipe."""

import contextlib
import shutil
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from trainers.telemetry.goodput import duration

LINE_SECONDS = 10.0  # between two lines of counted work
_HELD_OUT = "eval/"  # begins the names of held-out metrics, eval/TASK/METRIC
# Metric that only losses of this unit have -> the unit of the loss.
_UNITS = {"tokens": "nats per token", "images": "nats per image", "pairs": "per pair"}


class Progress:
    """Shows updates, losses, rate and remaining time.

    On a terminal this is a bar. Elsewhere it is a line for each row of metrics. Held-out losses are a line in both cases,
    as soon as they are measured.
    """

    def __init__(self, *, first_step: int, total_steps: int, unit: str, shown: bool):
        """Begins at `first_step`.

        Args:
          first_step: updates made before.
          total_steps: updates at the end.
          unit: unit of rates, 'tokens' or 'images'.
          shown: whether this process shows anything; one per run.
        """
        self._total_steps, self._unit, self._shown = total_steps, unit, shown
        self._on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._held_out = ""
        self._warm: tuple[int, float] | None = None  # step and time after the first update
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            disable=not (shown and self._on_terminal),
            ncols=shutil.get_terminal_size().columns,  # tqdm shows nothing where it is unknown
        )

    def update(self, step: int, loss: float | None, rate: float) -> None:
        """Shows that `step` updates are made; the loss and the rate (units per second) are the newest."""
        self._warm = self._warm or (step, time.monotonic())
        shown = {} if loss is None else {"loss": f"{loss:.3f}"}
        if rate:
            shown[f"{self._unit}/s"] = f"{rate:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def row(self, step: int, loss: float | None, rate: float) -> None:
        """Prints a line where there is no bar."""
        if self._on_terminal:
            return
        parts = [f"step {step:,} of {self._total_steps:,}"]
        parts += [] if loss is None else [f"loss {loss:.3f}"]
        parts += [self._held_out] if self._held_out else []
        parts += [f"{rate:,.0f} {self._unit}/s"] if rate else []
        first, since = self._warm or (step, 0.0)
        if step > first:
            seconds = (time.monotonic() - since) / (step - first) * (self._total_steps - step)
            parts.append(f"ETA {duration(seconds)}")
        self._print("  ".join(parts))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the held-out losses among the metrics of an evaluation, if there are any."""
        if losses := _losses(metrics):
            self._held_out = f"held out {sum(losses.values()) / len(losses):.3f}"
            self._print(f"held out at step {step:,}: {held_out_text(metrics)}")

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _print(self, line: str) -> None:
        if self._shown:
            with tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)


class Counted(contextlib.AbstractContextManager):
    """Shows how much of counted work is done, and the remaining time.

    On a terminal this is a bar. Elsewhere it is a line at the start, every LINE_SECONDS, and at the end.
    """

    def __init__(self, name: str, unit: str, *, total: int | None, done: int = 0, shown: bool):
        """Begins.

        Args:
          name: name of the work.
          unit: what is counted, as a plural.
          total: number at the end; None if it is unknown.
          done: number that an earlier start did.
          shown: whether this process shows anything; one per run.
        """
        self._name, self._unit, self._total, self._done = name, unit, total, done
        on_terminal = sys.stderr.isatty()
        self._lines = shown and not on_terminal
        bar = {"desc": name, "unit": f" {unit}", "total": total, "initial": done}
        self._bar = tqdm(**bar, disable=not (shown and on_terminal))
        self._start = self._printed = time.monotonic()
        self._warm: tuple[int, float] | None = (
            None  # number and time after the first update, which compiles
        )
        self._line("")

    def update(self, count: int) -> None:
        """Counts more work as done."""
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        first, since = self._warm = self._warm or (self._done, now)
        if now - self._printed >= LINE_SECONDS and self._done != self._total:
            left = ""
            if self._total is not None and self._done > first:
                seconds = (now - since) / (self._done - first) * (self._total - self._done)
                left = f", ETA {duration(seconds)}"
            self._line(left)

    def _line(self, rest: str) -> None:
        self._printed = time.monotonic()
        if self._lines:
            of = "" if self._total is None else f" of {self._total:,}"
            print(
                f"{self._name}: {self._done:,}{of} {self._unit}{rest}", file=sys.stderr, flush=True
            )

    def __exit__(self, kind: object, *rest: object) -> None:
        self._bar.close()
        if kind is None:
            self._line(f" in {duration(time.monotonic() - self._start)}")


def held_out_text(metrics: Mapping[str, float]) -> str:
    """Returns the losses named eval/TASK/loss as text with their unit; an empty text if there are none."""
    losses = _losses(metrics)
    texts = []
    for task, loss in losses.items():
        bits = metrics.get(f"{_HELD_OUT}{task}/bits_per_byte")
        texts.append(f"{task} {loss:.3f}" + (f" ({bits:.3f} bits per byte)" if bits else ""))
    if len(losses) > 1:
        texts.insert(0, f"mean {sum(losses.values()) / len(losses):.3f}")
    unit = next(
        (u for name, u in _UNITS.items() if any(m.endswith(f"/{name}") for m in metrics)), ""
    )
    return f"{', '.join(texts)} {unit}".strip()


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns held-out losses by task."""
    names = (name for name in metrics if name.startswith(_HELD_OUT) and name.endswith("/loss"))
    return {name[len(_HELD_OUT) : -len("/loss")]: metrics[name] for name in names}
