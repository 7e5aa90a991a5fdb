"""The stopping rule's alarms judged by the P_win of the runs, and their tables."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from espalier.launch.papers.preference.numbers import Arm, Course, find
from espalier.launch.papers.shared import page
from espalier.trainers.preference.indicators.alarm import Alarm, Reading, StoppingRule

LOSS = 0.05  # of P_win, from its best to the end: more is over-optimised
PLAIN = StoppingRule(llh_drop=0.0)
# Chosen on seeds 0 to 2 of a language of four successors: 3 of 47 alarms false, 1 of 10 missed, none early.
CHOSEN = StoppingRule(llh_drop=1.2)
# What is tried beside them, for information.
TRIED = (
    *(StoppingRule(llh_drop=drop) for drop in (0.3, 0.6, 2.0)),
    *(StoppingRule(llh_drop=0.0, entropy_drop=share, drops=5) for share in (0.03, 0.1)),
)
Kind = Literal["in time", "early", "missed", "false", "none"]
OVER: tuple[Kind, ...] = ("in time", "early", "missed")  # of over-optimised runs
CALM: tuple[Kind, ...] = ("false", "none")
# Wrong kind -> (the runs among which it is counted, their share in words).
WRONG: Mapping[Kind, tuple[tuple[Kind, ...], str]] = {
    "false": (CALM, "share of runs that are not over-optimised with an alarm"),
    "missed": (OVER, "share of over-optimised runs without an alarm"),
    "early": (
        OVER,
        "share of over-optimised runs with an alarm more than an evaluation before the best P_win",
    ),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of the rule on a run.

    All P_win are means of three evaluations around one.

    Attributes:
      course: of the run.
      alarm: None for none.
      kind: of a run that is over-optimised 'in time', 'early' (the alarm is more than an evaluation before the best
        P_win) or 'missed'; of another 'false' or 'none'.
      best, end: P_win.
      stopped: P_win of the checkpoint released without a reward: the one before the alarm, or the last without one.
      retained: P_win of the checkpoint with the best mean reward, which needs no rule.
    """

    course: Course
    alarm: Alarm | None
    kind: Kind
    best: float
    end: float
    stopped: float
    retained: float


def outcome(course: Course, rule: StoppingRule) -> Outcome:
    """Applies a rule to a run."""
    alarm = rule(_readings(course))
    wins, steps = course.moving("p_win"), course["step"].tolist()
    best, at = course.best, len(steps) - 1 if alarm is None else steps.index(alarm.step)
    kind: Kind
    if wins[-1] < wins[best] - LOSS:
        kind = "missed" if alarm is None else "early" if at < best - 1 else "in time"
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


def outcomes(courses: Sequence[Course], rule: StoppingRule) -> list[Outcome]:
    return [outcome(one, rule) for one in courses]


def _count(measured: Sequence[Outcome]) -> collections.Counter[Kind]:
    return collections.Counter(one.kind for one in measured)


def _readings(course: Course) -> list[Reading]:
    names = ("step", "entropy", "mass", "llh_chosen")
    columns = (course[name].tolist() for name in names)
    return [
        Reading(step=int(step), entropy=entropy, mass=mass, llh_chosen=llh)
        for step, entropy, mass, llh in zip(*columns, strict=True)
    ]


def skill(rule: StoppingRule, courses: Sequence[Course]) -> float | None:
    """Returns the share of over-optimised runs that a rule stops in time minus that of other runs with an alarm.

    It is 0 for a rule that never speaks, and None where runs of a kind are missing.
    """
    found = outcomes(courses, rule)
    over = [one.kind == "in time" for one in found if one.kind in OVER]
    calm = [one.kind == "false" for one in found if one.kind in CALM]
    return float(np.mean(over) - np.mean(calm)) if over and calm else None


def wrong_kind(kind: Kind, rule: StoppingRule, courses: Sequence[Course]) -> float | None:
    """Returns the share of a wrong kind among the runs that it is counted among; None where there are none."""
    among = [one.kind == kind for one in outcomes(courses, rule) if one.kind in WRONG[kind][0]]
    return float(np.mean(among)) if among else None


def tables(courses: Sequence[Course], direct: Sequence[Course], arms: Sequence[Arm]) -> list[str]:
    """Returns the tables of outcomes by arm, of released checkpoints, and of other rules on the paper's methods."""
    by_arm = {arm: find(courses, arm) for arm in arms if find(courses, arm)}
    return [*_alarms(by_arm), *_released(by_arm), *_rules(direct)]


def _alarms(by_arm: Mapping[Arm, Sequence[Course]]) -> list[str]:
    rows = []
    for arm, mine in by_arm.items():
        plain, chosen = outcomes(mine, PLAIN), outcomes(mine, CHOSEN)
        over = sum(one.kind in OVER for one in chosen)
        best = ", ".join(f"{one.course['step'][one.course.best]:.0f}" for one in chosen)
        cells = []
        for some in (plain, chosen):
            cells.append(", ".join(f"{one.alarm.step}" if one.alarm else "–" for one in some))
            counts = _count(some)
            cells.append(", ".join(f"{n} {kind}" for kind, n in counts.items() if kind != "none"))
        rows.append((arm.label, f"{over} of {len(mine)}", best, *(cell or "–" for cell in cells)))
    header = ("arm", "over-optimised", "best P_win at", f"alarms, {name(PLAIN)}", "outcomes")
    return page.table((*header, f"alarms, {name(CHOSEN)}", "outcomes"), rows)


def _released(by_arm: Mapping[Arm, Sequence[Course]]) -> list[str]:
    rows = []
    for arm, courses in by_arm.items():
        mine = outcomes(courses, CHOSEN)
        best, end, stopped, retained = (
            np.array([getattr(one, name) for one in mine])
            for name in ("best", "end", "stopped", "retained")
        )
        changes = (end - best, stopped - best, stopped - end, retained - best, retained - end)
        rows.append((arm.label, f"{best.mean():.3f}", *(f"{x.mean():+.3f}" for x in changes)))
    released = ("before the alarm", "best reward")
    pairs = [f"{one} - {other}" for one in released for other in ("best", "end")]
    return page.table(("arm", "best P_win", "end - best", *pairs), rows)


def _rules(courses: Sequence[Course]) -> list[str]:
    rows = []
    for rule in (PLAIN, CHOSEN, *TRIED):
        mine = outcomes(courses, rule)
        counts = _count(mine)
        over = [one for one in mine if one.kind in OVER]
        calm = [one for one in mine if one.kind in CALM]
        costs = [
            f"{np.mean([one.stopped - one.best for one in some]):+.3f}" if some else "–"
            for some in (calm, over)
        ]
        wrong = [f"{counts['false']} of {len(calm)}", f"{counts['in time']} of {len(over)}"]
        rows.append((name(rule), *wrong, str(counts["early"]), str(counts["missed"]), *costs))
    header = (
        *("rule", "false, of runs that are not over-optimised", "in time, of those that are"),
        *("early", "missed", "before the alarm - best, not over-optimised", "over-optimised"),
    )
    return page.table(header, rows)


def name(rule: StoppingRule) -> str:
    """Returns a rule in words."""
    fall = f"a fall of {rule.llh_drop:g} nats" if rule.llh_drop else "any fall"
    return f"{fall}, {rule.drops} drops, {rule.entropy_drop:.0%} of entropy"
