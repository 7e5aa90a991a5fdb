"""The progress of a run on the screen: a bar on a terminal, plain lines in a file or a pipe; Python's stacks when it stands still."""

import contextlib
import faulthandler
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from tqdm import tqdm

from espalier.common.stages import duration

_HELD_OUT = "eval/"  # begins the names of held-out metrics, eval/TASK/METRIC
# Metric that only losses of this unit have -> the unit of the loss.
_UNITS = {"tokens": "nats per token", "images": "nats per image", "pairs": "per pair"}
_PAUSE = 1.0  # seconds between calls of faulthandler, each of which starts a thread


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


@contextlib.contextmanager
def watching(seconds: float | None) -> Iterator[Callable[[], None]]:
    """Context manager: yields a function that the run calls at each step.

    The stacks of all threads are written to standard error whenever it has not been called for `seconds`, such as in a
    collective that waits for a lost process; the run goes on. They are not written for None, nor without a standard error that
    is a file.
    """
    stderr = sys.__stderr__
    if seconds is None or stderr is None or stderr.closed:
        yield lambda: None
        return
    armed = float("-inf")

    def step() -> None:
        nonlocal armed
        if time.monotonic() - armed >= min(_PAUSE, seconds / 4):
            armed = time.monotonic()
            faulthandler.dump_traceback_later(seconds, repeat=True, file=stderr)

    step()
    try:
        yield step
    finally:
        faulthandler.cancel_dump_traceback_later()
