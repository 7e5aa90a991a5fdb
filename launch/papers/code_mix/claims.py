"""The claims of code_mix on small models and how each is measured.

Arms of the same seed share their initialisation, their documents and their problems, so that they are
compared in pairs.
"""

import numpy as np

from launch.papers.code_mix.arms import GROUPS, Results, arm_name
from launch.papers.code_mix.sweep import SHARES
from launch.papers.shared.claim import Claim, Evidence, RequiredClaim
from launch.papers.shared.results import compare, sign_test
from launch.plots.intervals import significant

TEXT_DOMAINS, CODE_DOMAINS = ("english", "docstrings"), ("python", "cpp")
_SHARE_ERROR = 0.005  # of tokens: the remainder that a batch cannot be divided into
_STARTS = ("balanced_to_text", "code_to_text")
_OTHERS = ("text_only", *_STARTS)
_COOLDOWN, _WITHOUT_CODE = (f"balanced_to_text_cooldown{x}" for x in ("", "_without_code"))


def mixtures(runs: Results, where: str) -> list[Evidence]:
    """Compares the shares of tokens that were read with those that were configured."""
    errors = {
        row["run"]: max(abs(row["asked"][s] - row["read"].get(s, 0.0)) for s in row["asked"])
        for row in runs.rows
    }
    if not errors:
        return []
    worst = max(errors, key=lambda run: errors[run])
    words = f"of {len(errors)} runs, the largest error of a share is {errors[worst]:.4f} ({worst})"
    return [Evidence(where, words, errors[worst] <= _SHARE_ERROR)]


def _curve(runs: Results, group: str) -> np.ndarray:
    """Returns scores by share of code: [share, seed]."""
    return np.array(runs.paired(group, *(f"share_{share}" for share in SHARES)))


def _in_words(runs: Results, group: str) -> str:
    shown = zip(SHARES, _curve(runs, group), strict=True)
    means = [f"{share} % {runs.mean(row, group)}" for share, row in shown]
    return f"{group} by share of code: {', '.join(means)}"


def rises(runs: Results, where: str) -> list[Evidence]:
    """Tests whether code improves with its share."""
    curve = _curve(runs, "code")
    if not curve.size:
        return []
    steps = np.diff(curve, axis=0).ravel()
    means = curve.mean(axis=1)
    falling = [f"{SHARES[i]} to {SHARES[i + 1]} %" for i in np.flatnonzero(np.diff(means) < 0)]
    words = f"{_in_words(runs, 'code')}; neighbours: {sign_test(steps)}"
    fall = f"the mean falls from {', '.join(falling)}" if falling else "no mean falls"
    return [Evidence(where, words, significant(steps)), Evidence(where, fall, not falling)]


def collapses(runs: Results, where: str) -> list[Evidence]:
    """Measures how much knowledge is left without text."""
    curve = _curve(runs, "knowledge")
    if not curve.size:
        return []
    losses = curve[:-1] - curve[-1]
    left = curve[-1].mean() / max(curve[0].mean(), 1e-9)
    words = f"{_in_words(runs, 'knowledge')}; 100 % keeps {left:.1%} of what 0 % knows; {sign_test(losses)}"
    return [Evidence(where, words, bool(left <= 0.2) and significant(losses))]


def interior(runs: Results, where: str) -> list[Evidence]:
    """Tests whether a share of code in between is best for reasoning."""
    curve = _curve(runs, "reasoning")
    if not curve.size:
        return []
    best = int(curve.mean(axis=1).argmax())
    gaps = [curve[best] - curve[end] for end in (0, -1)]
    words = f"{_in_words(runs, 'reasoning')}; best at {SHARES[best]} %: {sign_test(gaps[0])} than at 0 %"
    inside = 0 < best < len(SHARES) - 1 and all(significant(gap) for gap in gaps)
    return [Evidence(where, words, inside)]


def widths(runs: Results, where: str) -> list[Evidence]:
    """Compares the gains of knowledge and reasoning from a larger model."""
    out = []
    for arm in ("balanced_only", "balanced_to_text"):
        gains = []
        for group in ("knowledge", "reasoning"):
            wide, narrow = runs.paired(group, (arm, "width96"), (arm, "width48"))
            gains.append(wide - narrow)
        if len(gains[0]):
            knowledge, reasoning = (runs.mean(gain, "") for gain in gains)
            more = gains[0] - gains[1]
            words = (
                f"{arm_name(arm)}, from width 48 to 96: knowledge gains {knowledge}, reasoning "
                f"{reasoning}; {sign_test(more)}"
            )
            out.append(Evidence(where, words, significant(more)))
    return out


CLAIMS = (
    RequiredClaim(
        "C0",
        "Sources are read with the configured shares of tokens",
        f"each to {100 * _SHARE_ERROR} % of a run's tokens, as its schedule deals them",
        {"skills": [mixtures], "packages": [mixtures]},
    ),
    RequiredClaim(
        "C1a",
        "Of all recipes, text and code in equal parts to the end is best at code",
        "better than each other recipe: exact match of code, bits per byte of Python and C++",
        {
            "skills": [compare("code", *(("balanced_only", other) for other in _OTHERS))],
            "packages": [
                compare(domain, *(("balanced_only", other) for other in _OTHERS))
                for domain in CODE_DOMAINS
            ],
        },
    ),
    Claim(
        "C1b",
        "Text after code or after both is better at reasoning than text alone",
        "better exact match of problems in words",
        {"skills": [compare("reasoning", *((start, "text_only") for start in _STARTS))]},
    ),
    Claim(
        "C1c",
        "A balanced start costs no knowledge beside a start from code",
        "code → text is not better",
        {"skills": [compare("knowledge", _STARTS, no_worse=True)]},
    ),
    Claim(
        "C1d",
        "Text after code or after both is better at text than text alone (not a claim of the paper)",
        "better bits per byte of prose and docstrings",
        {
            "packages": [
                compare(domain, *((start, "text_only") for start in _STARTS))
                for domain in TEXT_DOMAINS
            ]
        },
    ),
    RequiredClaim(
        "C2a",
        "The more code, the better at code",
        "of neighbouring shares the larger is better, all neighbours tested together; no mean falls",
        {"skills": [rises]},
    ),
    RequiredClaim(
        "C2b",
        "Without text there is no knowledge",
        "100 % code keeps a fifth at most of what text alone knows, and less than any other share",
        {"skills": [collapses]},
    ),
    Claim(
        "C2c",
        "Some code beside text is better at reasoning than none and than code alone",
        "the best share lies between, and is better than both ends",
        {"skills": [interior]},
    ),
    RequiredClaim(
        "C3a",
        "Verified code teaches more than noisy code, token by token",
        "better exact match of code",
        {"skills": [compare("code", ("synth", "share_100"))]},
    ),
    Claim(
        "C3b",
        "A little verified code helps: a tenth of the code",
        "better with it: code alone; code and reasoning of the mix, and of text after it",
        {
            "skills": [
                compare("code", ("code_synth", "share_100")),
                *(
                    compare(group, ("balanced_synth", "share_50"))
                    for group in ("code", "reasoning")
                ),
                *(
                    compare(group, ("balanced_synth_to_text", "balanced_to_text"))
                    for group in ("code", "reasoning")
                ),
            ]
        },
    ),
    Claim(
        "C3c",
        "Markup and code-adjacent text in place of code cost some code",
        "web code alone is better at code",
        {"skills": [compare("code", ("share_100", "code_markup"), ("share_100", "code_adjacent"))]},
    ),
    Claim(
        "C4a",
        "A cooldown with code is no worse than none",
        "none is not better in any group",
        {
            "skills": [
                compare(group, (_COOLDOWN, "balanced_to_text"), no_worse=True) for group in GROUPS
            ]
        },
    ),
    Claim(
        "C4b",
        "It takes code in the cooldown to gain code",
        "better exact match of code than without code",
        {"skills": [compare("code", (_COOLDOWN, _WITHOUT_CODE))]},
    ),
    Claim(
        "C5",
        "A larger model gains more knowledge than reasoning",
        "the gain in exact match from width 48 to 96 is better",
        {"skills": [widths]},
    ),
)
