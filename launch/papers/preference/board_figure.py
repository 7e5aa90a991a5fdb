"""The plots of the board: a panel for each quantity against updates, the runs in it as lines."""

import io
import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from launch.papers.preference.board_series import Run
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, panels

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
_COLUMNS = 4
_EMPTY = pd.Series(dtype=float)
# Title, series as solid line, series as dashed line, unit.
_PANELS = (
    ("LLH: chosen, rejected dashed", "llh_chosen", "llh_rejected", "nats per token"),
    ("LLH gap", "llh_gap", None, "nats per token"),
    ("P_win against the competitor", "p_win", None, "probability"),
    ("reward", "reward", None, "mean"),
    ("entropy of the likeliest: outputs, chosen dashed", "entropy", "entropy_chosen", "bits"),
    ("mass of the likeliest: outputs, chosen dashed", "mass", "mass_chosen", "probability"),
    ("diversity of outputs (EAD)", "ead", None, "of uniform draws"),
    ("log-ratio to the reference (KL)", "kl", None, "nats per output"),
    ("length of outputs", "length", None, "tokens"),
    ("outputs that ended", "ended", None, "share"),
    ("loss: training, held out dashed", "loss", "loss_held_out", ""),
    ("accuracy: training, held out dashed", "accuracy", "accuracy_held_out", "share"),
)


def draw(
    runs: Sequence[Run],
    path: str | os.PathLike,
    *,
    table: Sequence[Sequence[str]] = (),
    sentences: Sequence[str] = (),
) -> None:
    """Writes a PNG.

    Args:
      runs: each with a colour.
      path: of the PNG.
      table: rows of cells below the plots, the header first.
      sentences: below that.
    """
    there = {name for run in runs for name in run.series}
    scattered = "p_win" in there
    # P_win shows the same as the reward, on one scale for all runs.
    there -= {"reward"} if scattered else set()
    shown = [panel for panel in _PANELS if panel[1] in there]
    count = len(shown) + scattered
    rows = -(-count // _COLUMNS)
    figure, axes = panels(_COLUMNS, (4.1 * _COLUMNS, 2.7 * rows + 0.5), rows=rows)
    colours = _colours(len(runs))
    for one, (title, solid, dashed, unit) in zip(axes, shown, strict=False):
        one.set_title(title, fontsize=10)
        one.set_ylabel(unit, fontsize=8)
        for run, colour in zip(runs, colours, strict=True):
            _lines(one, run, solid, dashed, colour)
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
        one.tick_params(labelsize=8)
    for one in axes[max(0, len(shown) - _COLUMNS) : len(shown)]:
        one.set_xlabel("updates", fontsize=8)
    handles = [axes[0].plot([], [], color=colour, lw=2)[0] for colour in colours]
    names = [f"{r.name} (alarm at {r.alarm:,}: ▼)" if r.alarm is not None else r.name for r in runs]
    figure.legend(
        handles, names, frameon=False, ncols=min(4, len(runs)), loc="outside upper center"
    )
    if table or sentences:
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
        # A dashed line of one evaluation is a dot; with more of them it needs none.
        dots = "." if len(points) < (40 if style == "-" else 2) else ""
        axes.plot(points.index, points, style, color=colour, lw=1.5, marker=dots, ms=4)
    points = run.series.get(solid, _EMPTY)
    if run.alarm in points:
        axes.axvline(run.alarm, color=colour, lw=0.8, ls=":")
        mark = {"marker": "v", "ms": 8, "mec": "black", "mew": 0.6}
        axes.plot(run.alarm, points[run.alarm], color=colour, **mark)


def _against_likelihood(axes: Any, runs: Sequence[Run], colours: Sequence[str]) -> None:
    """Draws whether a likelihood between the extremes is best, which is the paper's question."""
    axes.set_title("P_win against LLH of chosen, start ○", fontsize=10)
    axes.set_xlabel("nats per token", fontsize=8)
    axes.set_ylabel("probability", fontsize=8)
    for run, colour in zip(runs, colours, strict=True):
        wins = run.series.get("p_win", _EMPTY)
        points = pd.concat([run.series["llh_chosen"], wins], axis=1, join="inner")
        if points.empty:
            continue
        x, y = points.to_numpy().T
        axes.plot(x, y, "-", color=colour, lw=0.8, alpha=0.5)
        axes.scatter(x, y, s=14, color=colour)
        axes.plot(x[0], y[0], marker="o", ms=7, mfc="white", mec=colour)
    _around_a_half(axes)


def _around_a_half(axes: Any) -> None:
    """Leaves room around 0.5, so that the noise of a few prompts does not fill a panel of P_win."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.44), max(high, 0.56))


def _colours(count: int) -> Sequence[str]:
    """Returns colours that can be distinguished, or a scale for more runs than there are of these."""
    if count <= len(_COLOURS):
        return _COLOURS[:count]
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(i / (count - 1) * 0.92)) for i in range(count)]


def _words(figure: Any, table: Sequence[Sequence[str]], sentences: Sequence[str]) -> None:
    """Adds table and sentences below the plots."""
    import textwrap

    wrapped = [line for s in sentences for line in textwrap.wrap(s, 250, subsequent_indent="   ")]
    width, height = figure.get_size_inches()
    of_table, of_words = 0.27 * len(table), 0.18 * len(wrapped)  # inches
    more = of_table + of_words + 0.4
    figure.set_size_inches(width, height + more)
    share = more / (height + more)
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    low = figure.add_axes((0.01, 0, 0.98, share * 0.97))
    low.set_in_layout(False)
    low.set_axis_off()
    if table:
        header, *rows = table
        drawn = low.table(rows, colLabels=header, cellLoc="center", edges="horizontal",
                          bbox=(0, 1 - of_table / more, 1, of_table / more))  # fmt: skip
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)
        drawn.auto_set_column_width(range(len(header)))
    top = 1 - (of_table + 0.2) / more
    low.text(0, top, "\n".join(wrapped), va="top", fontsize=9)
