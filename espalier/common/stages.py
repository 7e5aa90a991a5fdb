"""Signs of life: a command says at once that it starts, and what it is doing whenever it has been silent for ten seconds.

  with stage("compiling the step"):
      ...

names what the body does; without a command around it, it does nothing. Lines go to standard error.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

PERIOD = 10.0  # seconds of silence

Text = str | Callable[[], str]


@dataclasses.dataclass(eq=False)
class _Stage:
    text: Text
    began: float


_stages: list[_Stage] = []  # under way in all threads, the newest last
_written = 0.0  # when something was last written to standard output or standard error
_in_line = False  # whether standard output is in the middle of a line, such as an answer that is being streamed
_active = False


def size(nbytes: int) -> str:
    """Returns text such as '2.47 GB' or '3.1 MB'."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Returns text such as '40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def stage(text: Text) -> Iterator[None]:
    """Context manager or decorator: names what its body does, until another stage begins in it.

    Args:
      text: such as 'restoring 1.2 GB'; a function is called whenever the text is shown, in another thread.
    """
    mine = _Stage(text, time.monotonic())
    _stages.append(mine)
    try:
        yield
    finally:
        _stages.remove(mine)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Context manager: nothing is said, because the body waits for a user or for clients, or others speak meanwhile."""
    return stage("")


@contextlib.contextmanager
def shown(program: str, *, header: bool = True) -> Iterator[None]:
    """Context manager of a command: says that it starts, and the newest stage whenever PERIOD has passed in silence.

    A command inside of another one adds nothing.

    Args:
      program: its name.
      header: whether to say that it starts.
    """
    global _active
    if _active:
        yield
        return
    if header:
        print(f"{program}: starting", file=sys.stderr, flush=True)
    ended = threading.Event()
    thread = threading.Thread(target=_speak, args=(ended,), name="stages", daemon=True)
    _active = True
    try:
        with _noted(sys.stdout), _noted(sys.stderr), stage(f"{program}: at work"):
            thread.start()
            yield
    finally:
        _active = False
        ended.set()
        thread.join()


def _speak(ended: threading.Event) -> None:
    global _written
    _written = time.monotonic()
    while not ended.wait(max(0.0, _written + PERIOD - time.monotonic())):
        if time.monotonic() - _written >= PERIOD:
            _written = time.monotonic()
            # Standard error may be closed, and a stage's function may read what another thread is changing.
            with contextlib.suppress(Exception):
                _say(_stages[-1])


def _say(newest: _Stage) -> None:
    text = newest.text if isinstance(newest.text, str) else newest.text()
    if not text:
        return
    global _in_line
    begin, _in_line = "\n" * _in_line, False
    minutes, seconds = divmod(round(time.monotonic() - newest.began), 60)
    elapsed = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    bars: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with bars.external_write_mode(file=sys.stderr) if bars else contextlib.nullcontext():
        print(f"{begin}{text}, {elapsed}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _noted(stream: Any) -> Iterator[None]:
    """Context manager: notes when something is written to a stream, which stays the same object."""
    own: Any = getattr(stream, "write", None)
    before = getattr(stream, "__dict__", {}).get("write")

    def write(text: str) -> int:
        global _written, _in_line
        _written = time.monotonic()
        if stream is sys.stdout and text:
            _in_line = not text.endswith("\n")
        return own(text)

    try:
        stream.write = write
    except AttributeError:  # no stream, or one that takes no attributes: it counts as silent
        yield
        return
    try:
        yield
    finally:
        if before is None:
            del stream.write
        else:
            stream.write = before
