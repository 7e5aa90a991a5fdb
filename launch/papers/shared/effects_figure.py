"""A picture of the effects that judge claims: by claim, with a dot for each seed, the interval and the bounds."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.papers.shared import claim
from launch.papers.shared.claim import Claim, Effect
from launch.plots import panels

_COLOURS = {
    claim.HOLDS: panels.GREEN,
    claim.FAILS: panels.RED,
    claim.UNDECIDED: panels.ORANGE,
    claim.NOT_MEASURED: panels.GREY,
}
CAPTION = (
    "The effects that judge each claim: dots are seeds, lines are means with 95 % intervals, shaded is where the claim "
    "holds; green holds, red fails, orange is undecided, grey gives no verdict"
)
_ROW, _HEAD = 0.24, 0.8  # inches


def figure(judged: Sequence[Claim]) -> Any:
    """Returns the figure; None without effects that vary over seeds."""
    shown = [(one, effects) for one in judged if (effects := _drawn(one))]
    if not shown:
        return None
    heights = [_HEAD + _ROW * sum(_lines(effect) for effect in effects) for _, effects in shown]
    figure, every = panels.panels(1, (9.5, sum(heights)), rows=len(shown), heights=heights)
    for axes, (one, effects) in zip(every, shown, strict=True):
        _panel(axes, one, effects)
    return figure


def _drawn(one: Claim) -> list[Effect]:
    return [effect for effect in one.effects if not effect.exact and effect.by_seed]


def _label(effect: Effect) -> str:
    return textwrap.fill(f"{effect.what} ({effect.where})", 62)


def _lines(effect: Effect) -> int:
    return _label(effect).count("\n") + 1


def _panel(axes: Any, one: Claim, effects: Sequence[Effect]) -> None:
    rows = [(_label(e), list(e.by_seed.values()), e.range, _COLOURS[e.verdict]) for e in effects]
    panels.paired(axes, rows)
    low, high = axes.get_xlim()
    bounds = sorted({b for e in effects for b in (e.above, e.below) if np.isfinite(b)})
    low, high = min([low, *bounds]), max([high, *bounds])
    pad = 0.04 * (high - low)
    axes.set_xlim(low - pad, high + pad)
    for at, effect in enumerate(effects):
        left, right = max(effect.above, low - pad), min(effect.below, high + pad)
        axes.fill_betweenx([at - 0.45, at + 0.45], left, right, color=panels.GREEN, alpha=0.1, lw=0)
        for bound in (effect.above, effect.below):
            if np.isfinite(bound):
                axes.plot([bound, bound], [at - 0.45, at + 0.45], color="black", lw=0.8, ls=":")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", alpha=0.25)
    units = {effect.unit for effect in effects}
    axes.set_xlabel(units.pop() if len(units) == 1 else "each in its own unit", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    title = textwrap.shorten(f"{one.name} {one.statement}", 100, placeholder=" …")
    axes.set_title(" ", fontsize=9)  # room for the heading, which starts at the figure's left edge
    heading = axes.annotate(
        f"{title}: {one.verdict}",
        (0.01, 1.0),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=9,
        weight="bold" if one.required else "normal",
    )
    heading.set_in_layout(False)
