"""What the stopping rule says of a run, and what the run's P_win says of that."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from launch.papers.preference.results import Course
from trainers.preference.indicators.alarm import Alarm, Reading, StoppingRule

LOSS = 0.05  # of P_win, from its best to the end: more is over-optimised
DEFAULT = StoppingRule()
# What is tried beside it, for information; the default is not chosen by it.
TRIED = tuple(
    StoppingRule(entropy_drop=share, drops=drops) for drops in (3, 5) for share in (0.03, 0.05, 0.1)
)

Signal = Literal["both", "entropy", "mass"]
Kind = Literal["in time", "early", "missed", "false", "none"]
KINDS: tuple[Kind, ...] = ("in time", "early", "missed", "false", "none")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a run.

    All P_win are means of three evaluations around one.

    Attributes:
      course: of the run.
      alarm: None for none.
      kind: of a run that is over-optimised 'in time', 'early' (the alarm is more than an evaluation before the best
        P_win) or 'missed'; of another 'false' or 'none'.
      best, end: P_win.
      stopped: P_win of what is released without a reward: the checkpoint before the alarm, or the last of a run
        without one.
      retained: that of the best mean reward of the whole run, which a run that has a reward keeps, and no rule is
        needed for.
    """

    course: Course
    alarm: Alarm | None
    kind: Kind
    best: float
    end: float
    stopped: float
    retained: float


def outcome(course: Course, *, rule: StoppingRule = DEFAULT, signal: Signal = "both") -> Outcome:
    """What a rule, or one of its two signals alone, makes of a run."""
    alarm = rule(_readings(course, signal))
    wins, steps = course.moving("p_win"), course["step"].tolist()
    best, at = course.best, len(steps) - 1 if alarm is None else steps.index(alarm.step)
    over_optimised = wins[-1] < wins[best] - LOSS
    kind: Kind
    if over_optimised:
        early = at < best - 1
        kind = "missed" if alarm is None else "early" if early else "in time"
    else:
        kind = "none" if alarm is None else "false"
    return Outcome(
        course=course,
        alarm=alarm,
        kind=kind,
        best=float(wins[best]),
        end=float(wins[-1]),
        stopped=float(wins[at if alarm is None else at - 1]),
        retained=float(wins[np.argmax(course["reward"])]),
    )


def outcomes(
    every: Sequence[Course], *, rule: StoppingRule = DEFAULT, signal: Signal = "both"
) -> list[Outcome]:
    return [outcome(one, rule=rule, signal=signal) for one in every]


def count(found: Sequence[Outcome]) -> dict[Kind, int]:
    return {kind: sum(one.kind == kind for one in found) for kind in KINDS}


def _readings(course: Course, signal: Signal) -> list[Reading]:
    """As the rule reads them; what is not its signal stands still."""
    entropies, masses = (
        course[name] if signal in ("both", name) else np.ones_like(course[name])
        for name in ("entropy", "mass")
    )
    columns = (course["step"], entropies, masses, course["llh_chosen"])
    return [
        Reading(step=int(step), entropy=entropy, mass=mass, llh_chosen=likelihood)
        for step, entropy, mass, likelihood in zip(*(c.tolist() for c in columns), strict=True)
    ]
