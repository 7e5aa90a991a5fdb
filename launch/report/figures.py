"""Figures of any runs: last values as a dot for each seed, curves over updates, and titles and units of metrics."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.launch.plots import html_page, panels

if TYPE_CHECKING:  # pandas is imported with the work
    import pandas as pd

    from espalier.launch.report.runs import Run

# Name of a metric as a pattern -> its title, with groups of the pattern, and its unit; "" for a number without one.
_LABELS = (
    (r"perplexity", "perplexity", ""),
    (r"bits_per_byte", "bits per byte", "bits per byte"),
    (r"(?:indicators/)?(accuracy|ended|mass|mass_chosen)", r"\1", "share"),
    (r"p_win", "P_win", "probability"),
    (r"(?:indicators/)?llh[/_](gap|chosen|rejected)", r"likelihood, \1", "nats per token"),
    (r"logps/(\w+)", r"log-probability, \1", "nats per completion"),
    (r"log_ratio/(\w+)", r"log-ratio to the reference, \1", "nats per completion"),
    (r"(?:indicators/)?(entropy|entropy_chosen)", r"\1 of the likeliest tokens", "bits"),
    (r"grad_norm", "gradient norm", ""),
    (r"param_norm", "norm of the parameters", ""),
    (r"update_norm", "norm of the update", ""),
    (r"learning_rate", "learning rate", ""),
    (r"(tokens|images)_per_second", r"\1 per second", r"\1/s"),
    (r"model_flops_per_second", "model FLOPs per second", "FLOP/s"),
    (r"mfu", "utilisation (MFU)", "share of the peak"),
    (r"skipped_updates", "skipped updates", "updates"),
)
_POINTS = 300  # of a drawn curve
_TOOLTIPS = 40  # of a drawn curve
_MARGIN = 0.14  # of the range of dots on both sides: room for their numbers


def label(metric: str, loss_unit: str) -> tuple[str, str]:
    """Returns title and unit of a metric; `loss_unit` is the unit of the run's loss."""
    if metric == "loss" or metric.startswith("source_loss/"):
        source = metric.partition("/")[2]
        return (f"loss on {source}" if source else "loss"), loss_unit
    for pattern, title, unit in _LABELS:
        if match := re.fullmatch(pattern, metric):
            return match.expand(title).replace("_", " "), match.expand(unit)
    return metric.replace("_", " ").replace("/", ": "), ""


def number(value: float, digits: int = 3) -> str:
    """Returns a number as text of a page, with a minus sign, and never with one at zero."""
    text = f"{value:,.{digits}f}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = text[1:]
    return text.replace("-", "−")


def short(value: float) -> str:
    """Returns a number with four digits at most, also a small or large one."""
    if not math.isfinite(value) or (value and not 1e-3 <= abs(value) < 1e5):
        return f"{value:.3g}".replace("-", "−")
    return number(value, max(0, 3 - len(str(int(abs(value)))) + 1))


@dataclasses.dataclass(frozen=True)
class Dots:
    """A panel with a row for each arm: a dot for each seed, and their mean.

    Attributes:
      title, unit: what is shown.
      values: run -> value.
    """

    title: str
    unit: str
    values: "Mapping[str, tuple[Run, float]]"


@dataclasses.dataclass(frozen=True)
class Curves:
    """A panel over updates: a line for each run and, with several seeds, a thick one for their mean.

    Attributes:
      title, unit: what is shown.
      series: (run, values by step).
    """

    title: str
    unit: str
    series: "Sequence[tuple[Run, pd.Series]]"


def colours(arms: Sequence[str]) -> dict[str, Any]:
    """Returns a colour for each arm: colours that can be distinguished or, for many arms, a scale."""
    return dict(zip(arms, panels.colours(len(arms)), strict=True))


def draw(shown: Sequence[Dots | Curves], arms: Mapping[str, Any]) -> Any:
    """Returns a figure of panels, where dots of one unit share their x-axis; `arms` are arms with their colours."""
    columns = panels.columns(len(shown))
    rows = -(-len(shown) // columns)
    here = [arm for arm in arms if any(arm in _arms(panel) for panel in shown)]
    dots = any(isinstance(panel, Dots) for panel in shown)
    height = max(2.6, 1.2 + 0.3 * len(here)) if dots else 2.6
    figure, axes = panels.panels(columns, (3.1 * columns + 0.6, height * rows + 0.5), rows=rows)
    for at, (panel, one) in enumerate(zip(shown, axes, strict=False)):
        one.set_title(panel.title, fontsize=11)
        one.tick_params(labelsize=9)
        if isinstance(panel, Dots):
            _draw_dots(one, panel, {arm: arms[arm] for arm in here}, named=at % columns == 0)
        else:
            _draw_curves(one, panel, arms)
    _share_ranges(shown, axes)
    for one in axes[len(shown) :]:
        one.set_axis_off()
    if any(isinstance(panel, Curves) for panel in shown) and len(here) > 1:
        lines = [axes[0].plot([], [], color=arms[arm], lw=2.5, label=arm)[0] for arm in here]
        figure.legend(
            lines,
            here,
            frameon=False,
            fontsize=9,
            ncols=min(4, len(here)),
            loc="outside lower center",
        )
    return figure


def _share_ranges(shown: Sequence[Dots | Curves], axes: Sequence[Any]) -> None:
    """Gives the panels of dots that have one unit the same x-axis, so that equal distances are equal differences."""
    by_unit: dict[str, list[Any]] = {}
    for panel, one in zip(shown, axes, strict=False):
        if isinstance(panel, Dots) and panel.unit:
            by_unit.setdefault(panel.unit, []).append(one)
    for same in by_unit.values():
        ends = [x for one in same for x in one.dataLim.intervalx if math.isfinite(x)]
        low, high = min(ends, default=0.0), max(ends, default=0.0)
        for one in same if low < high else ():
            one.set_xlim(low - _MARGIN * (high - low), high + _MARGIN * (high - low))


def _arms(panel: Dots | Curves) -> set[str]:
    runs = panel.values.values() if isinstance(panel, Dots) else panel.series
    return {run.arm for run, _ in runs}


def _draw_dots(axes: Any, panel: Dots, arms: Mapping[str, Any], *, named: bool) -> None:
    for at, (arm, colour) in enumerate(arms.items()):
        runs = [(run, x) for run, x in panel.values.values() if run.arm == arm and math.isfinite(x)]
        if not runs:
            continue
        values = [x for _, x in runs]
        mean = float(np.mean(values))
        alone = len(values) == 1
        style = {"ms": 6} if alone else {"ms": 5, "alpha": 0.5}
        axes.plot(values, [at] * len(values), "o", color=colour, mew=0, **style)
        if not alone:
            axes.plot(mean, at, marker="|", ms=13, mew=2, color=colour)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(short(mean), (mean, at), **above)
        texts = [f"{run.name}: {short(x)}" for run, x in runs]
        html_page.points(axes, values, [at] * len(values), texts)
    axes.set_yticks(range(len(arms)), list(arms) if named else [""] * len(arms))
    axes.set_ylim(len(arms) - 0.4, -0.7)
    axes.set_xlabel(panel.unit, fontsize=9)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.margins(x=_MARGIN)
    panels.room(axes, "x")


def _draw_curves(axes: Any, panel: Curves, arms: Mapping[str, Any]) -> None:
    import pandas as pd

    for arm, colour in arms.items():
        of_arm = [(run, series) for run, series in panel.series if run.arm == arm]
        for run, series in of_arm:
            several = len(of_arm) > 1
            curve(
                axes,
                run.name,
                series,
                colour,
                lw=0.8 if several else 1.5,
                alpha=0.5 if several else 1,
            )
        if len(of_arm) > 1:
            together = pd.concat([series for _, series in of_arm], axis=1, join="inner")
            mean = together.mean(axis=1)
            axes.plot(mean.index, mean, color=colour, lw=2)
    axes.set_xlabel("updates", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    panels.short_ticks(axes.yaxis)
    panels.room(axes, "y")


def curve(axes: Any, name: str, series: "pd.Series", colour: Any, **style: Any) -> None:
    """Draws values by step as a line, with dots where they are few, and tooltips; what is not finite is a gap."""
    finite = series[np.isfinite(series)]
    if finite.empty:
        return
    drawn = _thinned(series.where(np.isfinite(series)), _POINTS)
    dots = {"marker": "o", "ms": 3} if len(drawn) < 20 else {}
    axes.plot(drawn.index, drawn, color=colour, **{**dots, **style})
    some = _thinned(finite, _TOOLTIPS)
    texts = [f"{name}, step {step:,}: {short(value)}" for step, value in some.items()]
    html_page.points(axes, list(some.index), list(some), texts)


def _thinned(series: "pd.Series", most: int) -> "pd.Series":
    """Returns at most so many values, at even distances, the first and the last among them."""
    if len(series) <= most:
        return series
    return series.iloc[np.unique(np.linspace(0, len(series) - 1, most).astype(int))]
