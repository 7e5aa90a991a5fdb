"""The claims of Aya Expanse and of the papers it is made of that small models can judge, and how each is measured.

Arms of the same seed have the same base, pool and requests, so that they are compared in pairs.
"""

from collections.abc import Callable, Sequence

import numpy as np

from espalier.launch.papers.aya_expanse import experiment, lexicon
from espalier.launch.papers.aya_expanse.experiment import OPPONENT, SINGLE
from espalier.launch.papers.aya_expanse.scores import (
    ARTEFACTS,
    AT_HOME,
    ELSEWHERE,
    LOSS,
    STAGES,
    UNPAIRED,
    Runs,
    S,
    of_kind,
    of_language,
    won_against,
)
from espalier.launch.papers.shared.claim import Claim, Effect, Measure, Planned
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import average, compare

_PROSE = Prose.of(__name__)

SAME = 0.02  # of the score: what counts as no worse
PLACES = {"small": "words of seven languages"}
_ROUTED, _START = "student_reward", "shared"  # of arbitrage, and where preference training starts
_ROUNDS = f"round{experiment.ROUNDS}"
_EARLIER = "seeds 10 to 14, without the kind of requests that is no longer asked"


def routed(one: str, other: str, score: str = S) -> Measure:
    """Returns a measure that compares students of two routings; it gives no verdict where the teachers have not learned."""

    def measure(runs: Runs, where: str) -> Sequence[Effect]:
        arms = f"student_{one}", f"student_{other}"
        return runs.gain(where, score, *arms, unmet=runs.untaught() or runs.unmet(score, *arms))

    return measure


def where_it_is_foreign(called: str, than: Callable[[str], Sequence[str]]) -> Measure:
    """Returns a measure of the gain of routing in languages foreign to the single teacher, minus that in others.

    Args:
      called: name of the others.
      than: the family of the single teacher -> the others.
    """

    def measure(runs: Runs, where: str) -> Sequence[Effect]:
        arms = _ROUTED, SINGLE
        gains = {
            code: runs.scores(arms[0], of_language(code)) - runs.scores(arms[1], of_language(code))
            for code in lexicon.LANGUAGES
        }
        by_seed = {}
        for seed, family in runs.pool("single").items():
            known = (*lexicon.FAMILIES[family], lexicon.SHARED)
            foreign = [code for code in lexicon.LANGUAGES if code not in known]
            here, there = (
                np.mean([gains[code].get(seed, np.nan) for code in some])
                for some in (foreign, than(family))
            )
            if np.isfinite(here - there):
                by_seed[seed] = float(here - there)
        if not by_seed:
            return []
        what = f"score, gain of routing by reward in languages foreign to the single teacher, minus that in {called}"
        unmet = runs.untaught() or runs.unmet(S, *arms)
        return [Effect(where=where, what=what, by_seed=by_seed, unmet=unmet)]

    return measure


def wins(arm: str, code: str = "") -> Measure:
    """Returns a measure of the win rate against the best single teacher's student, the mean over languages or in one."""

    def measure(runs: Runs, where: str) -> Sequence[Effect]:
        rates = runs.scores(arm, won_against(SINGLE, code))
        if rates.empty:
            return []
        by_seed = {int(seed): float(rate) for seed, rate in rates.items()}
        what = f"win rate of {runs.label(arm)}, {code or 'mean over languages'}"
        return [Effect(where=where, what=what, by_seed=by_seed, unmet=runs.unmet(S, arm, SINGLE))]

    return measure


def points_won(runs: Runs, where: str) -> Sequence[Effect]:
    """Measures how many points more routing by reward wins against a third model than the best single teacher's student."""
    rates = [runs.scores(arm, won_against(OPPONENT)) for arm in (_ROUTED, SINGLE)]
    gap = (100 * (rates[0] - rates[1])).dropna()
    if gap.empty:
        return []
    by_seed = {int(seed): float(points) for seed, points in gap.items()}
    what = f"win rate against {runs.label(OPPONENT)}, gain of {runs.label(_ROUTED)} over {runs.label(SINGLE)}"
    unmet = runs.untaught() or runs.unmet(S, _ROUTED, SINGLE)
    return [Effect(where=where, what=what, by_seed=by_seed, unit="points", digits=1, unmet=unmet)]


def preferred(
    one: str, other: str, score: str = S, start: str = _START, moved: Sequence[str] = ()
) -> Measure:
    """Returns a measure that compares arms of preference training; it gives no verdict where that has moved nothing.

    Args:
      one: the arm that is said to be better.
      other: the arm it is compared with.
      score: that is compared.
      start: the arm that preference training started from.
      moved: the arms of which one must have left the start; by default the two.
    """

    def measure(runs: Runs, where: str) -> Sequence[Effect]:
        unmet = runs.unmoved(start, *(moved or (one, other))) or runs.unmet(score, one, other)
        return runs.gain(where, score, one, other, unmet=unmet)

    return measure


def harmful_collides(runs: Runs, where: str) -> Sequence[Effect]:
    """Compares what leaving out the harmful expert gains with the mean of what leaving out another does."""
    gains = {seed: one["gains"] for seed, one in runs.searches().items()}
    by_seed = {
        seed: some[experiment.HARMFUL]
        - float(np.mean([x for i, x in enumerate(some) if i != experiment.HARMFUL]))
        for seed, some in gains.items()
    }
    what = "lower loss without the harmful expert, minus the mean of leaving out another"
    if not by_seed:
        return []
    return [Effect(where=where, what=what, by_seed=by_seed, unit="nats per token")]


CLAIMS: Sequence[Claim] = (
    _PROSE.claim(
        "X1",
        "small",
        routed("reward", "fixed"),
        above=-SAME,
        planned=Planned(sd=0.012, expected=0.0, source=_EARLIER),
        required=True,
        secondary={
            "small": [
                routed("fixed", "learned"),
                routed("reward", "learned"),
                routed("reward", "fixed", LOSS),
            ]
        },
    ),
    _PROSE.claim(
        "X2",
        "small",
        routed("learned", "random"),
        above=0.0,
        planned=Planned(sd=0.023, expected=0.046, source=_EARLIER),
        required=True,
        secondary={"small": [routed("learned", "random", LOSS), routed("random", "single")]},
    ),
    _PROSE.claim(
        "X3",
        "small",
        where_it_is_foreign("English", lambda _: (lexicon.SHARED,)),
        above=0.0,
        planned=Planned(sd=0.023, expected=0.085, source="seeds 10 to 14"),
        required=True,
        secondary={"small": [where_it_is_foreign("its own family", lexicon.FAMILIES.__getitem__)]},
    ),
    _PROSE.claim(
        "X4",
        "small",
        routed("reward", "single"),
        above=SAME,
        planned=Planned(sd=0.020, expected=0.059, source=_EARLIER),
        required=True,
        secondary={
            "small": [
                points_won,
                wins(_ROUTED),
                routed("reward", "single", LOSS),
                *(routed("reward", "single", of_kind(kind)) for kind in lexicon.KINDS),
            ]
        },
    ),
    _PROSE.claim(
        "X5",
        "small",
        routed("random", "translated"),
        above=0.0,
        planned=Planned(sd=0.017, expected=0.068, source=_EARLIER),
        required=True,
        secondary={"small": [routed("single", "translated"), routed("random", "translated", LOSS)]},
    ),
    _PROSE.claim(
        "X6",
        "small",
        wins("merged_online"),
        above=0.5,
        planned=Planned(sd=0.025, expected=0.54, source="seeds 10 to 14"),
        secondary={"small": [wins("merged_online", code) for code in lexicon.LANGUAGES]},
    ),
    _PROSE.claim(
        "X7",
        "small",
        preferred("offline_languages7", "offline_languages1"),
        above=0.0,
        planned=Planned(sd=0.018, expected=0.025, source=_EARLIER),
        secondary={
            "small": [
                preferred("offline_languages7", "offline_languages1", LOSS),
                preferred("offline_languages7", "offline_languages1", UNPAIRED),
                preferred("offline_languages1", _START, UNPAIRED),
            ]
        },
    ),
    _PROSE.claim(
        "X8",
        "small",
        average(
            "score, offline and three rounds minus offline only and minus online only",
            preferred(_ROUNDS, "offline_long", moved=(_ROUNDS, "offline_long", "online4")),
            preferred(_ROUNDS, "online4", moved=(_ROUNDS, "offline_long", "online4")),
        ),
        above=0.0,
        planned=Planned(sd=0.0124, expected=0.0165, source=_EARLIER),
        secondary={
            "small": [
                preferred(_ROUNDS, "offline_long"),
                preferred(_ROUNDS, "online4"),
                preferred("online4", "offline_long"),
            ]
        },
    ),
    _PROSE.claim(
        "X11",
        "small",
        compare(ARTEFACTS, ("native", "student_translated")),
        above=0.0,
        planned=Planned(sd=0.0063, expected=0.008, source="seeds 10 to 14"),
        secondary={"small": [compare(S, ("native", "student_translated"))]},
    ),
    _PROSE.claim(
        "X12",
        "small",
        compare(S, ("merged", "student_reward")),
        above=-SAME,
        planned=Planned(sd=0.0146, expected=0.0, source=f"{_EARLIER}, merges after a polish"),
        secondary={
            "small": [
                compare(LOSS, ("merged", "student_reward")),
                compare(S, ("merged", "merged_mean")),
                compare(S, ("polish", "student_reward")),
            ]
        },
    ),
    _PROSE.claim(
        "X13",
        "small",
        compare(S, (_ROUNDS, _START)),
        above=0.0,
        planned=Planned(sd=0.01, expected=0.02, source=_EARLIER),
        secondary={
            "small": [
                compare(LOSS, (_ROUNDS, _START)),
                compare(S, (_ROUNDS, _ROUTED)),
                compare(S, *zip(list(STAGES)[1:], list(STAGES), strict=False)),
            ]
        },
    ),
    _PROSE.claim(
        "X14",
        "small",
        harmful_collides,
        above=0.0,
        planned=Planned(sd=0.095, expected=0.53, source="seeds 10 to 14"),
        control=True,
    ),
    _PROSE.claim(
        "X15",
        "small",
        compare(S, ("merged", "merged_ties")),
        above=-SAME,
        planned=Planned(sd=0.0146, expected=0.0, source=f"{_EARLIER}, merges after a polish"),
        secondary={
            "small": [
                compare(S, ("merged", "merged_sphere")),
                compare(LOSS, ("merged", "merged_ties"), ("merged", "merged_sphere")),
            ]
        },
    ),
    _PROSE.claim(
        "X16",
        "small",
        compare(ELSEWHERE, ("cluster_low", "cluster_full")),
        above=0.0,
        planned=Planned(sd=0.0133, expected=0.05, source="seeds 10 to 14, polishes on all data"),
        secondary={
            "small": [
                compare(ELSEWHERE, ("cluster_low", "merged")),
                compare(AT_HOME, ("cluster_low", "merged"), ("cluster_full", "merged")),
            ]
        },
    ),
)
