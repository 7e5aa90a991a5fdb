"""The claims of code_mix on small models and how each is measured.

Arms of the same seed share their initialisation, their documents and their problems, so that they are compared in
pairs. What is so by construction is no claim: text alone shows no calls, and code alone neither facts nor words.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.code_mix.arms import GROUPS, PLAIN, Results, wins
from launch.papers.code_mix.sweep import PHASES, SHARES
from launch.papers.shared.claim import Claim, Effect, Measure, RequiredClaim
from launch.papers.shared.results import compare

SHARE_ERROR = 0.005  # of tokens: the remainder that a batch cannot be divided into
TOKEN_ERROR = 0.005  # of tokens: a batch in each phase
NO_WORSE = LOSS = 0.03  # of exact match
_WITH_CODE = [share for share in SHARES if share]
_STARTS = ("balanced_to_text", "code_to_text")
_COOLDOWN, _WITHOUT_CODE = (f"balanced_to_text_cooldown{x}" for x in ("", "_without_code"))


def mixtures(runs: Results, where: str) -> list[Effect]:
    """Compares the shares of tokens that were read with those that were configured, and the tokens of arms that are compared."""
    errors: dict[int, float] = {}
    for row in runs.rows:
        error = max(abs(row["asked"][s] - row["read"].get(s, 0.0)) for s in row["asked"])
        errors[row["seed"]] = max(errors.get(row["seed"], 0.0), error)
    exact: dict[str, Any] = {"where": where, "digits": 4, "exact": True}
    out = [_exact("largest error of a source's share of tokens", errors, SHARE_ERROR, exact)]
    for arms in PHASES:
        tokens = {arm: runs.find(arm) for arm in arms}
        spread = {
            seed: max(read) / min(read) - 1
            for seed in runs.seeds
            if len(read := [at[seed]["loss_tokens_total"] for at in tokens.values() if seed in at])
            > 1
        }
        what = f"spread of the tokens with a loss that arms have read, {arms[0].replace('_', ' ')} and others"
        out.append(_exact(what, spread, TOKEN_ERROR, exact))
    return [effect for effect in out if effect.by_seed]


def _exact(
    what: str, by_seed: Mapping[int, float], below: float, more: Mapping[str, Any]
) -> Effect:
    return Effect(what=what, by_seed=by_seed, below=below, **more)


def of_shares(
    group: str,
    shares: Sequence[int],
    what: str,
    values: Callable[[np.ndarray], np.ndarray],
) -> Measure:
    """Returns a measure of how a score depends on the share of code; `values` makes a number by seed of [share, seed]."""
    arms = [f"share_{share}" for share in shares]

    def measure(runs: Results, where: str) -> list[Effect]:
        if not runs.has(*arms):
            return []
        scores = [runs.scores(arm, group) for arm in arms]
        seeds = sorted(set.intersection(*(set(one.index) for one in scores)))
        curve_SN = np.array([one[seeds] for one in scores])
        means = zip(shares, curve_SN.mean(axis=1), strict=True)
        return [
            Effect(
                where=where,
                what=what,
                by_seed=dict(zip(map(int, seeds), map(float, values(curve_SN)), strict=True)),
                above=0.0,
                note=f"{group} by share: " + ", ".join(f"{s} % {mean:.3f}" for s, mean in means),
                unmet=runs.unmet(group, *arms),
            )
        ]

    return measure


def _slope(curve_SN: np.ndarray) -> np.ndarray:
    return np.polyfit(np.array(_WITH_CODE) / 100, curve_SN, 1)[0]


def _bend(curve_SN: np.ndarray) -> np.ndarray:
    none, some, most = curve_SN
    return 0.5 * (none - most) - (none - some)


def verified(runs: Results, where: str) -> list[Effect]:
    """Compares verified with web code of as many tokens."""
    effects = runs.gain(where, "code", "synth", "share_100")
    plain = runs.paired(PLAIN, "synth", "share_100")
    if not effects or not plain[0].size:
        return effects
    synth, web = (values.mean() for values in plain)
    note = f"{effects[0].note}; {PLAIN}: synth {synth:.3f}, share 100 {web:.3f}"
    return [dataclasses.replace(effects[0], note=note)]


CLAIMS = (
    RequiredClaim(
        "C0",
        "Sources are read with the configured shares of tokens, and arms that are compared read as many tokens",
        f"shares to {SHARE_ERROR:.1%} of a run's tokens, tokens with a loss to {TOKEN_ERROR:.1%}",
        {"skills": [mixtures]},
    ),
    RequiredClaim(
        "C1a",
        "Text and code in equal parts to the end is better at code than text after code or after both",
        "better exact match of code than each of the two",
        {"skills": [compare("code", *(("balanced_only", other) for other in _STARTS))]},
        paper="9.0 against 4.8 (balanced → text) and 4.1 (code → text)",
    ),
    Claim(
        "C1b",
        "Text after code or after both is better at reasoning than text alone",
        "better exact match of problems in words, of as many tokens",
        {"skills": [compare("reasoning", *((start, "text_only") for start in _STARTS))]},
        paper="53.0 (balanced → text) and 53.3 (code → text) against 49.0",
    ),
    Claim(
        "C1c",
        "A balanced start leaves more knowledge than a start from code",
        "better exact match of facts after the second phase",
        {"skills": [compare("knowledge", _STARTS)]},
        paper="9.9 against 9.5",
    ),
    RequiredClaim(
        "C2a",
        "The more code, the better at code",
        "the slope over all shares of code but 0 is positive",
        {
            "skills": [
                of_shares("code", _WITH_CODE, "slope of code in its share, from 0 to 1", _slope)
            ]
        },
        paper="linear in its share, 2.6 times as much at 100 % as at 25 %",
    ),
    RequiredClaim(
        "C2b",
        "Knowledge falls with the share of code",
        f"75 % code costs more than {LOSS} of exact match, beside none and beside 25 %",
        {
            "skills": [
                compare("knowledge", *((f"share_{s}", "share_75") for s in (0, 25)), above=LOSS)
            ]
        },
        paper="-3.4 % at 25 % code, -31 % at 75 %, -86 % at 100 %",
    ),
    Claim(
        "C2c",
        "Some code beside text is better at reasoning than none",
        "better exact match of problems in words at 25 % and at 50 % code",
        {"skills": [compare("reasoning", ("share_25", "share_0"), ("share_50", "share_0"))]},
        paper="+3.4 % at 25 % code",
    ),
    Claim(
        "C2d",
        "Knowledge falls slowly at first and then fast",
        "25 % code costs less than half of what 75 % costs",
        {
            "skills": [
                of_shares(
                    "knowledge",
                    (0, 25, 75),
                    "half of what 75 % code costs knowledge, less what 25 % costs",
                    _bend,
                )
            ]
        },
        paper="-3.4 % against -31 %",
    ),
    RequiredClaim(
        "C3a",
        "Verified code teaches more than noisy code, token by token",
        "better exact match of code",
        {"skills": [verified]},
        paper="no such arm; as a tenth of the code +44.9 %",
    ),
    Claim(
        "C3b",
        "A little verified code helps: a tenth of the code",
        "better with it: code alone; code and reasoning of text after the mix",
        {
            "skills": [
                compare("code", ("code_synth", "share_100")),
                *(
                    compare(group, ("balanced_synth_to_text", "balanced_to_text"))
                    for group in ("code", "reasoning")
                ),
            ]
        },
        paper="+44.9 % of code alone; +35 % and +2 % after text",
    ),
    Claim(
        "C3c",
        "Markup and code-adjacent text in place of code cost some code",
        "web code alone is better at code",
        {"skills": [compare("code", ("share_100", "code_markup"), ("share_100", "code_adjacent"))]},
        paper="-15.7 % and -9.4 %",
    ),
    Claim(
        "C4a",
        "A cooldown with code is no worse than none",
        f"at most {NO_WORSE} less exact match in each group",
        {
            "skills": [
                compare(group, (_COOLDOWN, "balanced_to_text"), above=-NO_WORSE) for group in GROUPS
            ]
        },
        paper="+3.6 % reasoning, +10.1 % knowledge, +20 % code",
    ),
    Claim(
        "C4b",
        "It takes code in the cooldown to gain code",
        f"better exact match of code than without code, which gains less than {NO_WORSE} over no cooldown",
        {
            "skills": [
                compare("code", (_COOLDOWN, _WITHOUT_CODE)),
                compare(
                    "code",
                    (_WITHOUT_CODE, "balanced_to_text"),
                    above=-float("inf"),
                    below=NO_WORSE,
                ),
            ]
        },
        paper="+20 % with code, 0 without",
    ),
    Claim(
        "C5a",
        "Answers of recipes with code are preferred to those of text alone",
        "more prompts won than lost against text alone, by a judge that knows the right answers",
        {
            "skills": [
                compare(
                    wins("text_only"), *((arm, "text_only") for arm in ("balanced_only", *_STARTS))
                )
            ]
        },
        paper="code → text and balanced-only win 6.6 points more than they lose",
    ),
    Claim(
        "C5b",
        "After a cooldown with code answers are preferred to those before it",
        "more prompts won than lost by balanced → text after its cooldown",
        {
            "skills": [
                compare(wins("balanced_to_text"), (_COOLDOWN, "balanced_to_text")),
            ]
        },
        paper="52.3 % won with code, 48.2 % without",
    ),
)
