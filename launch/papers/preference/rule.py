"""The stopping rule's alarms judged by the P_win of the runs: the claim of this project on them, and its tables."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from launch.papers.preference.results import ARMS, Arm, Course, by_seed, direct, find
from launch.papers.shared import page
from launch.papers.shared.claim import Evidence
from launch.plots import intervals
from trainers.preference.indicators.alarm import Alarm, Reading, StoppingRule

LOSS = 0.05  # of P_win, from its best to the end: more is over-optimised
DEFAULT = StoppingRule()
# What is tried beside it, for information; the default is not chosen by it.
TRIED = tuple(
    StoppingRule(entropy_drop=share, drops=drops) for drops in (3, 5) for share in (0.03, 0.05, 0.1)
)

Signal = Literal["both", "entropy", "mass"]
Kind = Literal["in time", "early", "missed", "false", "none"]
OVER: tuple[Kind, ...] = ("in time", "early", "missed")  # of over-optimised runs
RATE = 0.1  # of alarms that are wrong, at most
# Wrong kind -> (the runs among which it is counted, in words).
_WRONG: dict[Kind, tuple[tuple[Kind, ...], str]] = {
    "false": (("false", "none"), "runs that are not over-optimised raise an alarm"),
    "missed": (OVER, "over-optimised runs raise none"),
    "early": (OVER, "over-optimised runs raise it more than an evaluation before the best P_win"),
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


def outcome(course: Course, *, rule: StoppingRule = DEFAULT, signal: Signal = "both") -> Outcome:
    """Applies a rule, or one of its two signals alone, to a run."""
    alarm = rule(_readings(course, signal))
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


def outcomes(
    courses: Sequence[Course], *, rule: StoppingRule = DEFAULT, signal: Signal = "both"
) -> list[Outcome]:
    return [outcome(one, rule=rule, signal=signal) for one in courses]


def _count(measured: Sequence[Outcome]) -> collections.Counter[Kind]:
    return collections.Counter(one.kind for one in measured)


def _readings(course: Course, signal: Signal) -> list[Reading]:
    """Returns the evaluations as the rule reads them; a signal that is not used is constant."""
    names = ("step", "entropy", "mass", "llh_chosen")
    values = pd.DataFrame({name: course[name] for name in names}).astype({"step": int})
    if signal != "both":
        values["mass" if signal == "entropy" else "entropy"] = 1.0
    return [Reading(**one) for one in values.to_dict("records")]


def rates(courses: Sequence[Course], where: str) -> list[Evidence]:
    """Measures how often the rule is wrong: in each seed, and in all of them together."""
    seeds = by_seed(courses)
    groups = {f"{where} {seed}": mine for seed, mine in seeds.items()}
    if len(seeds) > 1:
        groups[f"{where}s {', '.join(map(str, seeds))}"] = list(courses)
    out = []
    for kind, (among, words) in _WRONG.items():
        for place, mine in groups.items():
            flags = [one.kind == kind for one in outcomes(mine) if one.kind in among]
            if flags:
                share = intervals.share(flags)
                text = f"{sum(flags)} of {len(flags)} {words}, a share of {intervals.text(share)}"
                out.append(Evidence(f"{place}, {kind}", text, share["value"] <= RATE))
    return out


def tables(courses: Sequence[Course]) -> list[str]:
    """Returns the tables of outcomes by arm, of released checkpoints, and of other rules."""
    by_arm = {arm: mine for arm in ARMS.values() if (mine := outcomes(find(courses, arm)))}
    return [*_alarms(by_arm), *_released(by_arm), *_rules(direct(courses))]


def _alarms(by_arm: Mapping[Arm, Sequence[Outcome]]) -> list[str]:
    rows = []
    for arm, mine in by_arm.items():
        counts = _count(mine)
        over = f"{sum(counts[kind] for kind in OVER)} of {len(mine)}"
        alarms = ", ".join(f"{one.alarm.step}" if one.alarm else "–" for one in mine)
        best = ", ".join(f"{one.course['step'][one.course.best]:.0f}" for one in mine)
        kinds = [str(counts[kind]) for kind in (*OVER, "false")]
        rows.append((arm.label, over, *kinds, alarms, best))
    header = ("arm", "over-optimised", *OVER, "false", "alarms at", "best P_win at")
    return page.table(header, rows)


def _released(by_arm: Mapping[Arm, Sequence[Outcome]]) -> list[str]:
    rows = []
    for arm, mine in by_arm.items():
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
    judged = {
        f"{_name(DEFAULT)} (the default)": outcomes(courses),
        "its entropy alone": outcomes(courses, signal="entropy"),
        "its mass alone": outcomes(courses, signal="mass"),
        **{_name(one): outcomes(courses, rule=one) for one in TRIED if one != DEFAULT},
    }
    rows = []
    for name, mine in judged.items():
        counts = _count(mine)
        over = [one for one in mine if one.kind in OVER]
        calm = [one for one in mine if one.kind not in OVER]
        costs = [
            f"{np.mean([one.stopped - one.best for one in some]):+.3f}" if some else "–"
            for some in (calm, over)
        ]
        wrong = [f"{counts['false']} of {len(calm)}", f"{counts['in time']} of {len(over)}"]
        rows.append((name, *wrong, str(counts["early"]), str(counts["missed"]), *costs))
    header = (
        *("rule", "false, of runs that are not over-optimised", "in time, of those that are"),
        *("early", "missed", "before the alarm - best, not over-optimised", "over-optimised"),
    )
    return page.table(header, rows)


def _name(rule: StoppingRule) -> str:
    return f"{rule.drops} drops, {rule.entropy_drop:.0%} of entropy"
