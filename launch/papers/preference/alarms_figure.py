"""A panel for each arm: P_win over training, and where the stopping rules raise their alarms."""

from collections.abc import Sequence
from typing import Any

from launch.papers.preference import results, rule
from launch.papers.preference.results import ARMS, Course
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, panels

_SEEDS = (BLUE, ORANGE, GREEN, PURPLE, RED)
_COLUMNS = 4
_RULES = (
    (rule.PLAIN, {"marker": "o", "mfc": "white", "ms": 6}, "the plain rule"),
    (
        rule.CHOSEN,
        {"marker": "v", "mfc": "black", "ms": 7},
        f"the rule that waits for {rule.CHOSEN.llh_drop:g} nats",
    ),
)
CAPTION = (
    "P_win over training by arm, mean of three evaluations, a line for each seed; a thick line is over-optimised (its end is more "
    f"than {rule.LOSS} below its best). Marks are alarms of two stopping rules"
)


def figure(courses: Sequence[Course]) -> Any:
    """Returns the figure; None without runs."""
    shown = [(arm, mine) for arm in ARMS.values() if (mine := results.find(courses, arm))]
    if not shown:
        return None
    rows = -(-len(shown) // _COLUMNS)
    figure, every_axes = panels(_COLUMNS, (13, 0.6 + 2.4 * rows), rows=rows, share_y=True)
    seeds = sorted({one.seed for one in courses})
    colours = {seed: _SEEDS[at % len(_SEEDS)] for at, seed in enumerate(seeds)}
    for axes, (arm, mine) in zip(every_axes, shown, strict=False):
        axes.set_title(arm.label, fontsize=9)
        axes.axhline(0.5, color=GREY, ls=":", lw=0.8)
        axes.tick_params(labelsize=8)
        for one in mine:
            _run(axes, one, colours[one.seed])
    for axes in every_axes[len(shown) :]:
        axes.set_visible(False)
    for axes in every_axes[::_COLUMNS]:
        axes.set_ylabel("P_win", fontsize=8)
    for axes in every_axes[max(0, len(shown) - _COLUMNS) : len(shown)]:
        axes.set_xlabel("updates", fontsize=8)
    handles = [every_axes[0].plot([], [], color=colours[s], label=f"seed {s}")[0] for s in seeds]
    for _, look, label in _RULES:
        handles += every_axes[0].plot([], [], ls="", mec="black", label=f"alarm of {label}", **look)
    figure.legend(
        handles=handles, frameon=False, fontsize=8, ncols=len(handles), loc="outside lower center"
    )
    return figure


def _run(axes: Any, course: Course, colour: str) -> None:
    steps, wins = course["step"], course.moving("p_win")
    over = rule.outcome(course, rule.PLAIN).kind in rule.OVER
    axes.plot(steps, wins, color=colour, lw=2.2 if over else 0.9)
    for one, look, _ in _RULES:
        alarm = rule.outcome(course, one).alarm
        if alarm is not None:
            at = steps.tolist().index(alarm.step)
            axes.plot(steps[at], wins[at], ls="", mec=colour, mew=1.3, zorder=3, **look)
