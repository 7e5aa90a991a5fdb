"""Whether the stopping rule can be relied upon: a claim of this project, which the paper does not make."""

from collections.abc import Mapping, Sequence

import numpy as np

from launch.papers.preference import results, rule
from launch.papers.preference.arms import ARMS, Arm
from launch.papers.preference.evidence import WHERE
from launch.papers.preference.results import Course, by_seed
from launch.papers.shared.claim import Claim, Evidence
from launch.plots import intervals

RATE = 0.1  # of alarms that are wrong, at most
OVER: tuple[rule.Kind, ...] = ("in time", "early", "missed")  # of over-optimised runs
# What is wrong -> among which runs it is counted.
_WRONG: dict[rule.Kind, tuple[tuple[rule.Kind, ...], str]] = {
    "false": (("false", "none"), "runs that are not over-optimised raise an alarm"),
    "missed": (OVER, "over-optimised runs raise none"),
    "early": (OVER, "over-optimised runs raise it more than an evaluation before the best P_win"),
}


def claim(every: Sequence[Course]) -> Claim:
    """C9."""
    return Claim(
        "C9",
        "The stopping rule stops the runs that go too far, and no others (not a claim of the paper)",
        f"of runs that are not over-optimised at most {RATE:.0%} raise an alarm; of those that are at most {RATE:.0%} raise "
        f"none, and as many raise it early; over-optimised: P_win at the end is more than {rule.LOSS} below its best",
        [one for kind in _WRONG for one in _rates(every, kind)],
    )


def _rates(every: Sequence[Course], kind: rule.Kind) -> list[Evidence]:
    seeds = by_seed(every)
    groups = {f"{WHERE} {seed}": mine for seed, mine in seeds.items()}
    if len(seeds) > 1:
        groups[f"{WHERE}s {', '.join(map(str, seeds))}"] = list(every)
    among, words = _WRONG[kind]
    out = []
    for where, mine in groups.items():
        flags = [one.kind == kind for one in rule.outcomes(mine) if one.kind in among]
        if flags:
            share = intervals.share(flags)
            said = f"{sum(flags)} of {len(flags)} {words}, a share of {intervals.text(share)}"
            out.append(Evidence(f"{where}, {kind}", said, share["value"] <= RATE))
    return out


def tables(every: Sequence[Course]) -> list[str]:
    """What came of the rule by arm, by signal and with other thresholds, as lines of a page."""
    found = {
        arm: [one for one in rule.outcomes(every) if one.course.arm == arm] for arm in ARMS.values()
    }
    found = {arm: mine for arm, mine in found.items() if mine}
    return [*_alarms(found), "", *_released(found), "", *_rules(results.direct(every))]


def _alarms(found: Mapping[Arm, Sequence[rule.Outcome]]) -> list[str]:
    out = [
        "| arm | over-optimised | in time | early | missed | false | alarms at | best P_win at |",
        "|---|" + "---|" * 7,
    ]
    for arm, mine in found.items():
        counts = rule.count(mine)
        cells = [
            f"{sum(counts[kind] for kind in OVER)} of {len(mine)}",
            *(str(counts[kind]) for kind in (*OVER, "false")),
            ", ".join(f"{one.alarm.step}" if one.alarm else "–" for one in mine),
            ", ".join(f"{one.course['step'][one.course.best]:.0f}" for one in mine),
        ]
        out.append(f"| {arm.label} | {' | '.join(cells)} |")
    return out


def _released(found: Mapping[Arm, Sequence[rule.Outcome]]) -> list[str]:
    out = [
        "| arm | best P_win | end - best | before the alarm - best | before the alarm - end | best reward - best "
        "| best reward - end |",
        "|---|" + "---|" * 6,
    ]
    for arm, mine in found.items():
        best, end, stopped, retained = (
            np.array([getattr(one, name) for one in mine])
            for name in ("best", "end", "stopped", "retained")
        )
        changes = (end - best, stopped - best, stopped - end, retained - best, retained - end)
        cells = [f"{best.mean():.3f}", *(f"{change.mean():+.3f}" for change in changes)]
        out.append(f"| {arm.label} | {' | '.join(cells)} |")
    return out


def _rules(every: Sequence[Course]) -> list[str]:
    rows = {
        f"{_name(rule.DEFAULT)} (the default)": rule.outcomes(every),
        "its entropy alone": rule.outcomes(every, signal="entropy"),
        "its mass alone": rule.outcomes(every, signal="mass"),
        **{_name(one): rule.outcomes(every, rule=one) for one in rule.TRIED if one != rule.DEFAULT},
    }
    out = [
        "| rule | false, of runs that are not over-optimised | in time, of those that are | early | missed | before the "
        "alarm - best, not over-optimised | over-optimised |",
        "|---|" + "---|" * 6,
    ]
    for name, found in rows.items():
        counts = rule.count(found)
        over = [one for one in found if one.kind in OVER]
        calm = [one for one in found if one.kind not in OVER]
        costs = [
            f"{np.mean([one.stopped - one.best for one in some]):+.3f}" if some else "–"
            for some in (calm, over)
        ]
        cells = [
            f"{counts['false']} of {len(calm)}",
            f"{counts['in time']} of {len(over)}",
            *(str(counts[kind]) for kind in ("early", "missed")),
            *costs,
        ]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return out


def _name(tried: rule.StoppingRule) -> str:
    return f"{tried.drops} drops, {tried.entropy_drop:.0%} of entropy"
