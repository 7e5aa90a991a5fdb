"""The progress of a sweep on a terminal of 80 columns: arms as lines with seeds as cells, then details."""

import contextlib
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from espalier.common.stages import duration
from espalier.launch.sweep.driver import Progress, RunState

# State -> (mark, style, meaning).
_MARKS = {
    RunState.DONE: ("✓", "green", "done, training loss"),
    RunState.RUNNING: ("▶", "cyan", "running, steps made"),
    RunState.WAITING: ("·", "bright_black", "waiting"),
    RunState.STOPPED: ("‖", "yellow", "stopped"),
    RunState.FAILED: ("✗", "bold red", "failed"),
    RunState.BLOCKED: ("–", "red", "parent failed"),
}
_WIDTH = 80
_PARENT = 16  # minimum columns for the names of parents
_FAILURES = 8  # maximum number of failures shown with their reasons
_WORDY_CELLS = 5  # with more seeds, cells show only a mark, without the loss
_LINES = 60.0  # seconds between lines if the output is not a terminal


def table(sweep: str, runs: Sequence[Progress], *, workers: int = 1) -> Group:
    """Returns the whole screen; `workers` is the number of runs at the same time, for the remaining time."""
    title = Text.assemble((sweep, "bold"), f"  {_summary(runs, workers)}")
    parts: list[Any] = [title, ""]
    # Lines that change come first: a short terminal cuts the end.
    going = [run for run in runs if run.state is RunState.RUNNING]
    if going:
        parts += [_running(going), ""]
    failed = [run for run in runs if run.state is RunState.FAILED]
    for run in failed[:_FAILURES]:
        error = textwrap.shorten(run.error or "", 2 * _WIDTH, placeholder=" …")
        parts.append(Text.assemble(("✗ ", "bold red"), f"{run.planned.name}: {error}"))
    if len(failed) > _FAILURES:
        parts.append(Text(f"  and {len(failed) - _FAILURES} more failed", "red"))
    parts += [*([""] if failed else []), _grid(runs), _legend(runs)]
    return Group(*parts)


def _legend(runs: Sequence[Progress]) -> Text:
    states = {run.state for run in runs}
    meanings = [f"{mark} {text}" for state, (mark, _, text) in _MARKS.items() if state in states]
    return Text("  ".join(meanings), "bright_black")


def _summary(runs: Sequence[Progress], workers: int) -> str:
    """Returns text such as '3 of 6 runs done, 1 running, 2 waiting; about 5 min left'."""
    numbers = {state: sum(run.state is state for run in runs) for state in RunState}
    done = f"{numbers.pop(RunState.DONE)} of {len(runs)} runs done"
    others = [f"{n} {state.value}" for state, n in numbers.items() if n]
    remaining = seconds_left(runs, workers)
    about = "" if remaining is None else f"; about {duration(remaining)} left"
    return ", ".join([done, *others]) + about


def _grid(runs: Sequence[Progress]) -> Table:
    seeds = list(dict.fromkeys(run.planned.run.seed for run in runs))
    kinds = list(dict.fromkeys(run.planned.run.kind for run in runs))
    by_place = {(run.planned.run.kind, run.planned.run.seed): run for run in runs}
    wordy = len(seeds) <= _WORDY_CELLS
    above = {kind: _parent(by_place, kind, seeds) for kind in kinds}
    parents = any(above.values())
    room = max(_WIDTH - len(seeds) * (9 if wordy else 4) - 7, 2 * _PARENT)
    names = max(map(len, kinds))
    above_room = max(_PARENT, room - names - 2) if parents else 0
    name_room = room - min(max(map(len, above.values())), above_room) - (2 if parents else 0)
    grid = Table(box=None, pad_edge=False, header_style="bright_black")
    grid.add_column("arm", no_wrap=True)
    if parents:
        grid.add_column("from", no_wrap=True, style="bright_black")
    for seed in seeds:
        grid.add_column(f"seed {seed}" if wordy else str(seed), no_wrap=True)
    grid.add_column("min", justify="right", no_wrap=True)
    for kind in kinds:
        mine = [by_place.get((kind, seed)) for seed in seeds]
        there = [run for run in mine if run is not None]
        minutes = sum(run.seconds for run in there) / 60
        grid.add_row(
            _shortened(kind, name_room),
            *([_shortened(above[kind], above_room)] if parents else []),
            *(_cell(run, wordy) for run in mine),
            f"{minutes:.1f}" if minutes else "",
        )
    return grid


def _parent(by_place: Mapping[tuple[str, int], Progress], kind: str, seeds: Sequence[int]) -> str:
    """Returns the names of the arms that an arm starts from or is made of."""
    (first, *_) = (run for seed in seeds if (run := by_place.get((kind, seed))) is not None)
    return ", ".join(name.partition("/")[0] for name in first.planned.run.above)


def _shortened(name: str, width: int) -> str:
    """Returns a long name with its middle cut out, because arms often differ at their ends."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _cell(run: Progress | None, wordy: bool) -> Text:
    if run is None:
        return Text("")
    mark, style, _ = _MARKS[run.state]
    detail = ""
    if wordy and run.state is RunState.DONE and run.loss is not None:
        detail = f" {run.loss:.3f}"
    elif wordy and run.state in (RunState.RUNNING, RunState.STOPPED) and not run.planned.run.made:
        made = run.step - (run.planned.first_step or 0)
        detail = f" {run.step}" if (steps := _steps(run)) is None else f" {made / steps:4.0%}"
    return Text.assemble((mark, style), detail)


def _steps(run: Progress) -> int | None:
    """Returns the number of steps of the run itself, without its parent's; None if it depends on the data."""
    total = run.planned.total_steps
    return None if total is None else total - (run.planned.first_step or 0)


def _running(runs: Sequence[Progress]) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bright_black", style="cyan")
    rows.add_column("running", no_wrap=True)
    for name in ("step", "loss", "min", "left"):
        rows.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        total, is_made = run.planned.total_steps, run.planned.run.made
        known = run.rate and total is not None  # the rate so far
        rows.add_row(
            _shortened(run.planned.name, 38),
            "made" if is_made else f"{run.step}/{total or '?'}",
            "" if run.loss is None else f"{run.loss:.3f}",
            f"{run.seconds / 60:.1f}",
            duration((total - run.step) / run.rate) if known else "",
        )
    return rows


def seconds_left(runs: Sequence[Progress], workers: int) -> float | None:
    """Returns the estimated remaining seconds of the sweep, from the median run; None if no rate is known yet."""
    open_states = (RunState.RUNNING, RunState.WAITING, RunState.STOPPED)
    # Made runs are ignored: their time is unknown, and short compared with training.
    unfinished = [run for run in runs if run.state in open_states and not run.planned.run.made]
    by_kind: dict[str, list[float]] = {}  # seconds per step
    for run in runs:
        steps = _steps(run)
        if run.state is RunState.DONE and steps:
            by_kind.setdefault(run.planned.run.kind, []).append(run.seconds / steps)
        elif run.rate:
            by_kind.setdefault(run.planned.run.kind, []).append(1 / run.rate)
    rates = [value for values in by_kind.values() for value in values]
    if not rates or not unfinished or any(run.planned.total_steps is None for run in unfinished):
        return None
    total = sum(
        ((run.planned.total_steps or 0) - run.step)
        * statistics.median(by_kind.get(run.planned.run.kind, rates))
        for run in unfinished
    )
    return total / min(workers, len(unfinished))


@contextlib.contextmanager
def watching(sweep: str, *, workers: int) -> Iterator[Callable[[Sequence[Progress]], None]]:
    """Yields a function that shows the progress: a live table on a terminal, else a line for each event."""
    console = Console()
    if not console.is_terminal:
        yield _event_printer(workers)
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:
        yield lambda runs: live.update(table(sweep, runs, workers=workers), refresh=True)


def _event_printer(workers: int) -> Callable[[Sequence[Progress]], None]:
    """Returns a function that prints a line for each change, and one a minute."""
    states: dict[str, RunState] = {}
    last_line = time.monotonic()

    def show(runs: Sequence[Progress]) -> None:
        nonlocal last_line
        clock, first = time.strftime("%H:%M:%S"), not states
        for run in runs:
            name, state = run.planned.name, run.state
            changed = states.get(name) is not state
            states[name] = state
            if changed and not (first and state is not RunState.RUNNING):
                print(f"{clock} {name}: {_event(run)}", flush=True)
        now = time.monotonic()
        if first or now - last_line > _LINES:
            last_line = now
            print(f"{clock} {_summary(runs, workers)}", flush=True)

    return show


def _event(run: Progress) -> str:
    if run.planned.run.made and run.state in (RunState.RUNNING, RunState.STOPPED):
        return "started" if run.state is RunState.RUNNING else "stopped"
    if run.state is RunState.RUNNING:
        return f"started, at step {run.step} of {run.planned.total_steps or '?'}"
    if run.state is RunState.DONE:
        loss = "" if run.loss is None else f", loss {run.loss:.3f}"
        return f"done in {duration(run.seconds)}{loss}"
    if run.state is RunState.STOPPED:
        return f"stopped at step {run.step}"
    if run.state is RunState.FAILED:
        return f"failed: {run.error}"
    return run.state.value
