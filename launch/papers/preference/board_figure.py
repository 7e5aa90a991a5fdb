"""The plots of the board: a panel for each quantity against updates, the runs in it as lines."""

import io
import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from launch.papers.preference.board_series import Run
from launch.plots import hover, panels
from launch.reporting.figures import curve
from launch.reporting.labels import short

_EMPTY = pd.Series(dtype=float)
# Title, series as solid line, series as dashed line, unit.
_PANELS = (
    ("LLH\nchosen, rejected dashed", "llh_chosen", "llh_rejected", "nats per token"),
    ("LLH gap", "llh_gap", None, "nats per token"),
    ("P_win against the competitor", "p_win", None, "probability"),
    ("reward", "reward", None, "mean"),
    ("entropy of the likeliest\noutputs, chosen dashed", "entropy", "entropy_chosen", "bits"),
    ("mass of the likeliest\noutputs, chosen dashed", "mass", "mass_chosen", "probability"),
    ("diversity of outputs (EAD)", "ead", None, "relative to uniform draws"),
    ("log-ratio to the reference (KL)", "kl", None, "nats per output"),
    ("length of outputs", "length", None, "tokens"),
    ("outputs that ended", "ended", None, "share"),
    ("loss\ntraining, held out dashed", "loss", "loss_held_out", "per pair"),
    ("accuracy\ntraining, held out dashed", "accuracy", "accuracy_held_out", "share"),
)


def draw(runs: Sequence[Run]) -> Any:
    """Returns a figure with a panel for each quantity; each run has a colour."""
    there = {name for run in runs for name in run.series}
    scattered = "p_win" in there
    # P_win shows the same as the reward, on one scale for all runs.
    there -= {"reward"} if scattered else set()
    shown = [panel for panel in _PANELS if panel[1] in there]
    count = len(shown) + scattered
    columns = panels.columns(count)
    rows = -(-count // columns)
    size = (3.1 * columns + 0.4, 2.7 * rows + 0.5)
    figure, axes = panels.panels(columns, size, rows=rows)
    colours = panels.colours(len(runs))
    for one, (title, solid, dashed, unit) in zip(axes, shown, strict=False):
        # The part of the title after the comma explains the dashed line.
        one.set_title(title if dashed in there else title.partition(",")[0], fontsize=10)
        one.set_ylabel(unit, fontsize=9)
        one.set_xlabel("updates", fontsize=9)
        for run, colour in zip(runs, colours, strict=True):
            _lines(one, run, solid, dashed, colour)
        panels.short_ticks(one.yaxis)
        panels.room(one, "y")
        for run, colour in zip(runs, colours, strict=True):
            _mark_alarm(one, run, solid, colour)
        if solid == "p_win":
            one.axhline(0.5, color="black", lw=0.8, alpha=0.4)
            _around_a_half(one)
        if solid == "ended":
            one.set_ylim(-0.03, 1.03)
    if scattered:
        _against_likelihood(axes[len(shown)], runs, colours)
    for one in axes[count:]:
        one.set_axis_off()
    for one in axes[:count]:
        one.tick_params(labelsize=9)
    handles = [axes[0].plot([], [], color=colour, lw=2)[0] for colour in colours]
    names = [f"{r.name} (alarm at {r.alarm:,}: ▼)" if r.alarm is not None else r.name for r in runs]
    figure.legend(
        handles, names, frameon=False, ncols=min(4, len(runs)), loc="outside upper center"
    )
    return figure


def write_png(
    runs: Sequence[Run],
    path: str | os.PathLike,
    *,
    table: Sequence[Sequence[str]],
    sentences: Sequence[str],
) -> None:
    """Writes the figure as a PNG, with the rows of a table, the header first, and sentences below it."""
    figure = draw(runs)
    _words(figure, table, sentences)
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a PNG with a palette, which is a third of the size and looks the same."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=110, format="png")
    image = Image.open(pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)


def _lines(axes: Any, run: Run, solid: str, dashed: str | None, colour: str) -> None:
    for name, style in ((solid, "-"), (dashed, "--")):
        points = run.series.get(name or "", _EMPTY)
        curve(
            axes, f"{run.name}, {(name or '').replace('_', ' ')}", points, colour, ls=style, lw=1.5
        )


def _mark_alarm(axes: Any, run: Run, solid: str, colour: str) -> None:
    points = run.series.get(solid, _EMPTY)
    if run.alarm in points:
        axes.axvline(run.alarm, color=colour, lw=0.8, ls=":")
        mark = {"marker": "v", "ms": 8, "mec": "black", "mew": 0.6}
        axes.plot(run.alarm, points[run.alarm], color=colour, **mark)


def _against_likelihood(axes: Any, runs: Sequence[Run], colours: Sequence[str]) -> None:
    """Draws whether a likelihood between the extremes is best, which is the paper's question."""
    axes.set_title("P_win against LLH of chosen\nstart ○", fontsize=10)
    axes.set_xlabel("LLH, nats per token", fontsize=9)
    axes.set_ylabel("P_win, probability", fontsize=9)
    for run, colour in zip(runs, colours, strict=True):
        wins = run.series.get("p_win", _EMPTY)
        points = pd.concat([run.series["llh_chosen"], wins], axis=1, join="inner")
        if points.empty:
            continue
        x, y = points.to_numpy().T
        axes.plot(x, y, "-", color=colour, lw=0.8, alpha=0.5)
        axes.scatter(x, y, s=14, color=colour)
        axes.plot(x[0], y[0], marker="o", ms=7, mfc="white", mec=colour)
        texts = [
            f"{run.name}, step {step:,}: P_win {short(b)} at LLH {short(a)}"
            for step, a, b in zip(points.index, x, y, strict=True)
        ]
        hover.points(axes, x, y, texts)
    _around_a_half(axes)


def _around_a_half(axes: Any) -> None:
    """Leaves room around 0.5, so that the noise of a few prompts does not fill a panel of P_win."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.44), max(high, 0.56))


def _words(figure: Any, table: Sequence[Sequence[str]], sentences: Sequence[str]) -> None:
    """Adds table and sentences below the plots; the table has a row for each quantity."""
    import textwrap

    width, height = figure.get_size_inches()
    cells = list(map(list, zip(*table, strict=True)))
    letters = int(13 * width)
    wrapped = [x for s in sentences for x in textwrap.wrap(s, letters, subsequent_indent="   ")]
    of_table, of_words = 0.23 * len(cells), 0.19 * len(wrapped)  # inches
    more = of_table + of_words + 0.5
    figure.set_size_inches(width, height + more)
    share = more / (height + more)
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    low = figure.add_axes((0.01, 0, 0.98, share * 0.97))
    low.set_in_layout(False)
    low.set_axis_off()
    header, *rows = cells
    drawn = low.table(rows, colLabels=header, cellLoc="center", edges="horizontal",
                      bbox=(0, 1 - of_table / more, 1, of_table / more))  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    top = 1 - (of_table + 0.2) / more
    low.text(0, top, "\n".join(wrapped), va="top", fontsize=9)
