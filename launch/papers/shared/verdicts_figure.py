"""The figure of a page's verdicts: a row for each claim, with its bound at zero."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared import claim
from espalier.launch.papers.shared.claim import Claim
from espalier.launch.plots import panels

CAPTION = (
    "A row for each claim: the distance of its primary effect from the bound, in units of the smallest effect that its seeds "
    "show with a power of 80 %. Green holds, red fails, orange is undecided. Dots are seeds, bars the mean with the interval that judges it; grey bands hold nine of ten means "
    "with exchanged arms, where enough exchanges differ; arrows are outside of the picture. It holds right of zero"
)
COLOURS = {
    claim.HOLDS: panels.GREEN,
    claim.FAILS: panels.RED,
    claim.UNDECIDED: panels.ORANGE,
    claim.NOT_MEASURED: panels.GREY,
}
_WIDTH, _ROW, _REST = 8.0, 0.4, 0.7  # inches
_MOST = 900  # pixels of height
_FROM, _TO = -3.0, 5.0  # of the axis
_LETTERS = 62  # of a statement
_SIZE = 9.5  # points


def draw(judged: Sequence[Claim], null: Mapping[str, Mapping[str, Any]]) -> Any:
    """Returns the figure; None if no claim has a primary effect of several seeds.

    Args:
      judged: the claims.
      null: of `claim.exchanges`.
    """
    shown = [one for one in judged if one.primary is not None and one.smallest > 0]
    if not shown:
        return None
    height = min(_REST + _ROW * len(shown), _MOST / panels.DPI)
    figure, (axes,) = panels.panels(1, (_WIDTH, height))
    axes.axvspan(0, _TO, color=panels.GREEN, alpha=0.07, lw=0)
    axes.axvline(0, color="black", lw=1)
    for at, one in enumerate(shown):
        _row(axes, at, one, null.get(one.name))
    axes.set_xlim(_FROM, _TO)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    labels = [textwrap.fill(f"{one.name} {one.statement}", _LETTERS // 2 + 8) for one in shown]
    axes.set_yticks(range(len(shown)), [_shortened(label) for label in labels], fontsize=_SIZE)
    for label, one in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if one.required else "normal")
    axes.tick_params(axis="x", labelsize=_SIZE)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.set_xlabel(
        "distance from the bound, in units of the smallest visible effect", fontsize=_SIZE
    )
    return figure


def _shortened(label: str) -> str:
    """Returns two lines of a label."""
    first, *rest = label.split("\n")
    return first + ("\n" + rest[0] + (" …" if len(rest) > 1 else "") if rest else "")


def _row(axes: Any, at: int, one: Claim, null: Mapping[str, Any] | None) -> None:
    """Draws one claim; values beyond the axis are arrows at its end."""
    effect, colour, unit = one.primary, COLOURS[one.verdict], one.smallest
    assert effect is not None

    def place(value: float) -> float:
        return float(np.clip(one.distance(value) / unit, _FROM, _TO))

    def span(low: float, high: float) -> tuple[float, float]:
        """Returns the places of an interval: in its middle, between two bounds, a value is farthest from both."""
        middle = (one.above + one.below) / 2
        places = [place(x) for x in (low, high, *([middle] if low < middle < high else []))]
        return min(places), max(places)

    if null is not None:
        low, high = span(null["low"], null["high"])
        axes.fill_betweenx([at - 0.36, at + 0.36], low, high, color=panels.GREY, alpha=0.18, lw=0)
    places = [place(value) for value in effect.values[: one.seeds]]
    axes.plot(places, [at] * len(places), "o", ms=3.5, color=colour, alpha=0.45, mew=0)
    seen = one.range
    axes.plot(span(seen["low"], seen["high"]), [at, at], color=colour, lw=2)
    middle = place(seen["value"])
    outside = {_FROM: "<", _TO: ">"}.get(middle, "|")
    axes.plot(
        middle, at, outside, ms=11 if outside == "|" else 7, mew=2, color=colour, clip_on=False
    )
