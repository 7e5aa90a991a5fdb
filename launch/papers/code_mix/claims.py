"""The claims of code_mix on small models and how each is measured.

Arms of the same seed share their initialisation, their documents and their problems, so that they are compared in
pairs. What is so by construction is no claim: text alone shows no calls, and code alone neither facts nor words.
"""

from collections.abc import Callable, Sequence

import numpy as np

from espalier.launch.papers.code_mix import experiment
from espalier.launch.papers.code_mix.scores import (
    ANSWER_LOSSES,
    ASKED,
    CODE_LOSS,
    GROUPS,
    PLAIN,
    SORTING,
    TEXT_LOSS,
    Results,
    wins,
)
from espalier.launch.papers.shared.claim import Effect, Measure, Planned
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import average, compare

_PROSE = Prose.of(__name__)

LOSS = 0.03  # of exact match
NO_LOSS = 0.1  # of exact match: what twelve seeds of text with kinds of code show
_WITH_CODE = [share for share in experiment.SHARES if share]
_BALANCED, _FROM_CODE, _SYNTH = "balanced_to_text", "code_to_text", "balanced_synth_to_text"
_COOLDOWN, _WITHOUT_CODE = (f"{_BALANCED}_cooldown{x}" for x in ("", "_without_code"))
_EARLIER = "seeds 10 to 14"
_TEXT, _WEB, _MARKUP, _ADJACENT, _VERIFIED = experiment.BESIDE_TEXT
_SEEN = "verified over web code, seeds 20 to 24 of the part skills; their effect was 0.084"
_KINDS = f"twice the deviation of whole phases of {_EARLIER}; the effect of a pilot with one seed"


def of_shares(
    score: str, shares: Sequence[int], what: str, values: Callable[[np.ndarray], np.ndarray]
) -> Measure:
    """Returns a measure of how a score depends on the share of code; `values` makes a number by seed of [share, seed].

    Losses are negative in [share, seed], so that more is better.
    """
    arms = [f"share_{share}" for share in shares]

    def measure(runs: Results, where: str) -> list[Effect]:
        if not runs.has(*arms):
            return []
        scores = [runs.scores(arm, score) for arm in arms]
        seeds = sorted(set.intersection(*(set(one.index) for one in scores)))
        curve_SN = np.array([one[seeds] for one in scores])
        means = zip(shares, curve_SN.mean(axis=1), strict=True)
        signed_SN = -curve_SN if runs.lower_is_better(score) else curve_SN
        return [
            Effect(
                where=where,
                what=what,
                by_seed=dict(zip(map(int, seeds), map(float, values(signed_SN)), strict=True)),
                note=f"{score} by share: " + ", ".join(f"{s} % {mean:.3f}" for s, mean in means),
                unmet=runs.unmet(score, *arms),
            )
        ]

    return measure


def _slope(curve_SN: np.ndarray) -> np.ndarray:
    return np.polyfit(np.array(_WITH_CODE) / 100, curve_SN, 1)[0]


def _bend(curve_SN: np.ndarray) -> np.ndarray:
    none, some, most = curve_SN
    return 0.5 * (none - most) - (none - some)


def _slope_of(score: str) -> Measure:
    return of_shares(
        score, _WITH_CODE, f"{score}, slope of its gain in the share, from 0 to 1", _slope
    )


def _won(asked: str, arm: str, base: str) -> Measure:
    return compare(wins(base, asked), (arm, base))


def _pair(part: str, one: str, other: str, *scores: str) -> dict[str, list[Measure]]:
    """Returns secondary measures: several scores of one pair of arms."""
    return {part: [compare(score, (one, other)) for score in scores]}


_TOKENS, _ANSWERS = "nats per token", "nats per answer"


def _beside_text(*pairs: tuple[str, str]) -> dict[str, list[Measure]]:
    """Returns secondary measures: what a kind of code does to reasoning, by all scores, to code and to facts."""
    of_answers = (ANSWER_LOSSES["reasoning"], _ANSWERS), (CODE_LOSS, _TOKENS)
    return {
        "kinds": [
            compare(SORTING, *pairs, relative=True),
            *(compare(score, *pairs, unit=unit) for score, unit in of_answers),
            *(compare(score, *pairs) for score in GROUPS),
        ]
    }


CLAIMS = (
    _PROSE.claim(
        "C1a",
        "skills",
        compare(CODE_LOSS, ("balanced_only", _BALANCED), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.0074, expected=0.05, source=f"{_EARLIER}, half of their effect"),
        required=True,
        secondary={
            "skills": [
                compare(CODE_LOSS, ("balanced_only", _FROM_CODE), unit=_TOKENS),
                *(
                    compare(score, ("balanced_only", _BALANCED), ("balanced_only", _FROM_CODE))
                    for score in (ANSWER_LOSSES["code"], PLAIN)
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C1b",
        "skills",
        compare(SORTING, (_BALANCED, "text_only")),
        above=0.0,
        planned=Planned(sd=0.093, expected=0.1, source=f"{_EARLIER}, whose effect was 0.14"),
        required=True,
        secondary={
            "skills": [
                compare(SORTING, (_FROM_CODE, "text_only"), ("balanced_only", "text_only")),
                compare(
                    ANSWER_LOSSES["reasoning"],
                    *((start, "text_only") for start in (_BALANCED, _FROM_CODE)),
                    unit=_ANSWERS,
                ),
                compare("reasoning", (_BALANCED, "text_only"), (_FROM_CODE, "text_only")),
            ]
        },
    ),
    _PROSE.claim(
        "C1c",
        "skills",
        compare("knowledge", (_BALANCED, _FROM_CODE)),
        above=0.0,
        planned=Planned(sd=0.087, expected=0.1, source=f"{_EARLIER}, whose effect was 0.25"),
        secondary=_pair("skills", _BALANCED, _FROM_CODE, ANSWER_LOSSES["knowledge"], TEXT_LOSS),
    ),
    _PROSE.claim(
        "C1d",
        "skills",
        compare("knowledge", (_BALANCED, "text_only")),
        above=0.0,
        planned=Planned(
            sd=0.036, expected=0.039, source=f"deviation of {_EARLIER}, the paper's 4.2 %"
        ),
        secondary=_pair("skills", _BALANCED, "text_only", ANSWER_LOSSES["knowledge"], TEXT_LOSS),
    ),
    _PROSE.claim(
        "C2a",
        "skills",
        _slope_of(CODE_LOSS),
        above=0.0,
        planned=Planned(sd=0.0127, expected=0.05, source=f"{_EARLIER}, half of their effect"),
        required=True,
        secondary={"skills": [_slope_of(ANSWER_LOSSES["code"]), _slope_of(PLAIN)]},
    ),
    _PROSE.claim(
        "C2b",
        "skills",
        compare("knowledge", ("share_0", "share_75")),
        above=LOSS,
        planned=Planned(sd=0.093, expected=0.15, source=f"{_EARLIER}, half of their effect"),
        required=True,
        secondary={
            "skills": [
                compare("knowledge", ("share_25", "share_75")),
                compare(ANSWER_LOSSES["knowledge"], ("share_0", "share_75"), unit=_ANSWERS),
            ]
        },
    ),
    _PROSE.claim(
        "C2c",
        "skills",
        compare("reasoning", ("share_25", "share_0")),
        above=0.0,
        planned=Planned(sd=0.062, expected=0.1, source=f"{_EARLIER}, half of their effect"),
        secondary={
            "skills": [
                compare("reasoning", ("share_50", "share_0"), ("share_75", "share_0")),
                compare(ANSWER_LOSSES["reasoning"], ("share_25", "share_0"), unit=_ANSWERS),
            ]
        },
    ),
    _PROSE.claim(
        "C2d",
        "skills",
        of_shares(
            "knowledge",
            (0, 25, 75),
            "half of what 75 % code costs knowledge, minus what 25 % costs",
            _bend,
        ),
        above=0.0,
        planned=Planned(sd=0.04, expected=0.08, source=f"{_EARLIER}, half of their effect"),
    ),
    _PROSE.claim(
        "C3a",
        "skills",
        compare(CODE_LOSS, ("few_synth", "few_code"), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.034, expected=0.046, source=_KINDS),
        secondary={
            "skills": [
                *(
                    compare(score, ("few_synth", "few_code"))
                    for score in (ANSWER_LOSSES["code"], "code")
                ),
                *(compare(score, (_SYNTH, _BALANCED)) for score in ("code", SORTING)),
            ]
        },
    ),
    _PROSE.claim(
        "C3b",
        "skills",
        compare(CODE_LOSS, ("few_code", "few_markup"), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.034, expected=0.046, source=_KINDS),
        secondary={
            "skills": [
                compare(CODE_LOSS, ("few_code", "few_adjacent"), unit=_TOKENS),
                *(
                    compare(score, ("few_code", "few_markup"), ("few_code", "few_adjacent"))
                    for score in (ANSWER_LOSSES["code"], PLAIN)
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C3c",
        "kinds",
        compare(SORTING, (_VERIFIED, _WEB)),
        above=0.0,
        planned=Planned(sd=0.099, expected=0.1, source=_SEEN),
        secondary=_beside_text((_VERIFIED, _WEB), (_WEB, _TEXT)),
    ),
    _PROSE.claim(
        "C3d",
        "kinds",
        compare(SORTING, (_ADJACENT, _WEB)),
        above=0.0,
        planned=Planned(sd=0.099, expected=0.1, source=_SEEN),
        secondary=_beside_text((_ADJACENT, _WEB)),
    ),
    _PROSE.claim(
        "C3e",
        "kinds",
        compare(SORTING, (_MARKUP, _WEB)),
        above=-NO_LOSS,
        planned=Planned(sd=0.099, expected=0.0, source=_SEEN),
        secondary=_beside_text((_MARKUP, _WEB)),
    ),
    _PROSE.claim(
        "C4a",
        "skills",
        compare(CODE_LOSS, (_COOLDOWN, _BALANCED), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.026, expected=0.03, source=f"another cooldown of {_EARLIER}"),
        secondary=_pair("skills", _COOLDOWN, _BALANCED, ANSWER_LOSSES["code"], PLAIN, "code"),
    ),
    _PROSE.claim(
        "C4b",
        "skills",
        compare(CODE_LOSS, (_COOLDOWN, _WITHOUT_CODE), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.026, expected=0.1, source=f"another cooldown of {_EARLIER}"),
        secondary={
            "skills": [
                compare(CODE_LOSS, (_WITHOUT_CODE, _BALANCED), unit=_TOKENS),
                *(
                    compare(score, (_COOLDOWN, _WITHOUT_CODE), (_WITHOUT_CODE, _BALANCED))
                    for score in (ANSWER_LOSSES["code"], "code")
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C4c",
        "skills",
        compare(TEXT_LOSS, (_COOLDOWN, _BALANCED), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.002, expected=0.004, source=f"other cooldowns of {_EARLIER}"),
        secondary=_pair("skills", _COOLDOWN, _BALANCED, SORTING, "knowledge"),
    ),
    _PROSE.claim(
        "C4d",
        "skills",
        compare("code", (f"{_SYNTH}_cooldown_synth", _SYNTH)),
        above=0.0,
        planned=Planned(sd=0.04, expected=0.04, source=f"another cooldown of {_EARLIER}"),
        secondary={
            "skills": [
                compare(PLAIN, (f"{_SYNTH}_cooldown_synth", _SYNTH)),
                *(
                    compare(score, (f"{_BALANCED}_cooldown_synth", _BALANCED))
                    for score in ("code", PLAIN)
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C5a",
        "skills",
        average(
            f"{ASKED[0]} won minus lost against text only, mean of balanced only and code → text",
            *(_won(ASKED[0], arm, "text_only") for arm in ("balanced_only", _FROM_CODE)),
        ),
        above=0.0,
        planned=Planned(sd=0.27, expected=0.27, source=f"answers of {_EARLIER}, judged by words"),
        secondary={
            "skills": [
                _won(asked, arm, "text_only")
                for asked in ASKED
                for arm in ("balanced_only", _FROM_CODE, _BALANCED)
            ]
        },
    ),
    _PROSE.claim(
        "C5b",
        "skills",
        _won(ASKED[0], _COOLDOWN, _BALANCED),
        above=0.0,
        planned=Planned(sd=0.22, expected=0.22, source=f"answers of {_EARLIER}, judged by words"),
        secondary={"skills": [_won(ASKED[1], _COOLDOWN, _BALANCED)]},
    ),
    _PROSE.claim(
        "C6a",
        "narrow",
        compare(SORTING, (_BALANCED, "text_only")),
        above=0.0,
        planned=Planned(sd=0.093, expected=0.1, source=f"the wide models of {_EARLIER}"),
        secondary={
            "narrow": [
                compare(SORTING, ("balanced_only", "text_only"), (_BALANCED, "balanced_only")),
                compare("reasoning", (_BALANCED, "text_only")),
                compare(ANSWER_LOSSES["reasoning"], (_BALANCED, "text_only"), unit=_ANSWERS),
            ]
        },
    ),
    _PROSE.claim(
        "C6b",
        "narrow",
        compare(CODE_LOSS, ("balanced_only", _BALANCED), unit=_TOKENS),
        above=0.0,
        planned=Planned(sd=0.0074, expected=0.05, source=f"the wide models of {_EARLIER}"),
        secondary=_pair("narrow", "balanced_only", _BALANCED, ANSWER_LOSSES["code"], PLAIN),
    ),
    _PROSE.claim(
        "C6c",
        "narrow",
        compare("knowledge", (_BALANCED, "text_only")),
        above=0.0,
        planned=Planned(sd=0.036, expected=0.039, source=f"the wide models of {_EARLIER}"),
        secondary=_pair("narrow", _BALANCED, "text_only", ANSWER_LOSSES["knowledge"]),
    ),
)
