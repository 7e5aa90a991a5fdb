"""The claims of code_mix on small models, with what was measured for each.

Arms of the same seed share their initialisation, their documents and their problems, so that they are
compared in pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.code_mix.sweep import SHARES
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.code_mix_results import GROUPS, Results
from launch.plots import intervals
from launch.plots.intervals import significant

SMALL, PACKAGES = "generated text", "installed packages"
_SMALL_ONLY = {"skills": SMALL}
_BOTH = {**_SMALL_ONLY, "packages": PACKAGES}
TEXT_DOMAINS, CODE_DOMAINS = ("english", "docstrings"), ("python", "cpp")
_SHARE_ERROR = 0.005  # of tokens: what a batch cannot be divided into


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """All of them, of what `experiment.run` has found."""
    small, packages = (Results(found.get(part, ())) for part in ("skills", "packages"))
    return [
        _mixtures(small, packages),
        *_recipes(small, packages),
        *_proportions(small),
        *_kinds_of_code(small),
        *_cooldowns(small),
        _widths(small),
    ]


def _better(
    results: Results,
    group: str,
    one: str,
    other: str,
    *,
    where: str = SMALL,
    sizes: tuple[str, str] | None = None,
    no_worse: bool = False,
    lower: bool = False,
) -> list[Evidence]:
    """Whether an arm has a higher score than another; nothing where one of them is not there.

    Args:
      results: of a sweep.
      group: what is scored.
      one, other: the arms.
      where: for the reader.
      sizes: of the arms.
      no_worse: whether it counts as well if the other is not significantly better.
      lower: whether lower scores are better.
    """
    cases = [one, other] if sizes is None else [(one, sizes[0]), (other, sizes[1])]
    ones, others = results.paired(group, *cases)
    if not len(ones):
        return []
    gaps = others - ones if lower else ones - others
    holds = not significant(-gaps) if no_worse else significant(gaps)
    words = (
        f"{group}: {arm_name(one)} {_mean(ones)}, {arm_name(other)} {_mean(others)}; {_test(gaps)}"
    )
    return [Evidence(where, words, holds)]


def _test(gaps: np.ndarray) -> str:
    wins, p = int((gaps > 0).sum()), intervals.sign_test(gaps)
    return f"better in {wins} of {gaps.size} pairs (p = {p:.3g})"


def _mean(values: np.ndarray) -> str:
    return intervals.text(intervals.over_seeds(values), 3)


def arm_name(name: str) -> str:
    """As a reader sees it."""
    return name.replace("_to_", " → ").replace("_", " ")


def source_name(task: str) -> str:
    """As a reader sees it."""
    return task.removeprefix("skill_").replace("_", " ")


def _mixtures(small: Results, packages: Results) -> Claim:
    evidence = []
    for where, results in ((SMALL, small), (PACKAGES, packages)):
        errors = {
            row["run"]: max(abs(row["asked"][s] - row["read"].get(s, 0.0)) for s in row["asked"])
            for row in results.rows
        }
        if errors:
            worst = max(errors, key=lambda run: errors[run])
            words = f"of {len(errors)} runs, the largest error of a share is {errors[worst]:.4f} ({worst})"
            evidence.append(Evidence(where, words, errors[worst] <= _SHARE_ERROR))
    return Claim(
        "C0",
        "Sources get the shares of tokens that they were given",
        f"each to {100 * _SHARE_ERROR} % of a run's tokens, as its schedule deals them",
        evidence,
        required=True,
        places=_BOTH,
    )


def _recipes(small: Results, packages: Results) -> list[Claim]:
    starts = ("balanced_to_text", "code_to_text")
    others = ("text_only", *starts)
    code = [e for other in others for e in _better(small, "code", "balanced_only", other)]
    for domain in CODE_DOMAINS:
        for other in others:
            code += _better(packages, domain, "balanced_only", other, where=PACKAGES, lower=True)
    text = [
        evidence
        for domain in TEXT_DOMAINS
        for start in starts
        for evidence in _better(packages, domain, start, "text_only", where=PACKAGES, lower=True)
    ]
    return [
        Claim(
            "C1a",
            "Of all recipes, text and code in equal parts to the end is best at code",
            "better than each other recipe: exact match of code, bits per byte of Python and C++",
            code,
            required=True,
            places=_BOTH,
        ),
        Claim(
            "C1b",
            "Text after code or after both is better at reasoning than text alone",
            "better exact match of problems in words",
            [e for start in starts for e in _better(small, "reasoning", start, "text_only")],
        ),
        Claim(
            "C1c",
            "A balanced start costs no knowledge beside a start from code",
            "code → text is not better",
            _better(small, "knowledge", *starts, no_worse=True),
        ),
        Claim(
            "C1d",
            "Text after code or after both is better at text than text alone (not a claim of the paper)",
            "better bits per byte of prose and docstrings",
            text,
        ),
    ]


def _proportions(small: Results) -> list[Claim]:
    arms = [f"share_{share}" for share in SHARES]
    curves = {group: np.array(small.paired(group, *arms)) for group in GROUPS}  # [share, seed]
    if not curves["code"].size:
        curves = {}

    def curve(group: str) -> str:
        means = [
            f"{share} % {_mean(row)}" for share, row in zip(SHARES, curves[group], strict=True)
        ]
        return f"{group} by share of code: {', '.join(means)}"

    rises, falls, interior = [], [], []
    if curves:
        steps = np.diff(curves["code"], axis=0).ravel()
        means = curves["code"].mean(axis=1)
        falling = [f"{SHARES[i]} to {SHARES[i + 1]} %" for i in np.flatnonzero(np.diff(means) < 0)]
        rises = [
            Evidence(SMALL, f"{curve('code')}; neighbours: {_test(steps)}", significant(steps)),
            Evidence(
                SMALL,
                f"the mean falls from {', '.join(falling)}" if falling else "no mean falls",
                not falling,
            ),
        ]
        collapse = curves["knowledge"][:-1] - curves["knowledge"][-1]
        left = curves["knowledge"][-1].mean() / max(curves["knowledge"][0].mean(), 1e-9)
        words = f"{curve('knowledge')}; 100 % keeps {left:.1%} of what 0 % knows; {_test(collapse)}"
        falls = [Evidence(SMALL, words, bool(left <= 0.2) and significant(collapse))]
        best = int(curves["reasoning"].mean(axis=1).argmax())
        gaps = [curves["reasoning"][best] - curves["reasoning"][end] for end in (0, -1)]
        words = f"{curve('reasoning')}; best at {SHARES[best]} %: {_test(gaps[0])} than at 0 %"
        inside = 0 < best < len(SHARES) - 1 and all(significant(gap) for gap in gaps)
        interior = [Evidence(SMALL, words, inside)]
    return [
        Claim(
            "C2a",
            "The more code, the better at code",
            "of neighbouring shares the larger is better, all neighbours tested together; no mean falls",
            rises,
            required=True,
            places=_SMALL_ONLY,
        ),
        Claim(
            "C2b",
            "Without text there is no knowledge",
            "100 % code keeps a fifth at most of what text alone knows, and less than any other share",
            falls,
            required=True,
            places=_SMALL_ONLY,
        ),
        Claim(
            "C2c",
            "Some code beside text is better at reasoning than none and than code alone",
            "the best share lies between, and is better than both ends",
            interior,
        ),
    ]


def _kinds_of_code(small: Results) -> list[Claim]:
    return [
        Claim(
            "C3a",
            "Verified code teaches more than noisy code, token by token",
            "better exact match of code",
            _better(small, "code", "synth", "share_100"),
            required=True,
            places=_SMALL_ONLY,
        ),
        Claim(
            "C3b",
            "A little verified code helps: a tenth of the code",
            "better with it: code alone; code and reasoning of the mix, and of text after it",
            [
                *_better(small, "code", "code_synth", "share_100"),
                *_better(small, "code", "balanced_synth", "share_50"),
                *_better(small, "reasoning", "balanced_synth", "share_50"),
                *_better(small, "code", "balanced_synth_to_text", "balanced_to_text"),
                *_better(small, "reasoning", "balanced_synth_to_text", "balanced_to_text"),
            ],
        ),
        Claim(
            "C3c",
            "Markup and code-adjacent text in place of code cost some code",
            "web code alone is better at code",
            [
                evidence
                for arm in ("code_markup", "code_adjacent")
                for evidence in _better(small, "code", "share_100", arm)
            ],
        ),
    ]


def _cooldowns(small: Results) -> list[Claim]:
    none, with_code = "balanced_to_text", "balanced_to_text_cooldown"
    without = "balanced_to_text_cooldown_without_code"
    return [
        Claim(
            "C4a",
            "A cooldown with code is no worse than none",
            "none is not better in any group",
            [
                evidence
                for group in GROUPS
                for evidence in _better(small, group, with_code, none, no_worse=True)
            ],
        ),
        Claim(
            "C4b",
            "It takes code in the cooldown to gain code",
            "better exact match of code than without code",
            _better(small, "code", with_code, without),
        ),
    ]


def _widths(small: Results) -> Claim:
    evidence = []
    for arm in ("balanced_only", "balanced_to_text"):
        gains = []
        for group in ("knowledge", "reasoning"):
            wide, narrow = small.paired(group, (arm, "width96"), (arm, "width48"))
            gains.append(wide - narrow)
        if len(gains[0]):
            words = (
                f"{arm_name(arm)}, from width 48 to 96: knowledge gains {_mean(gains[0])}, reasoning "
                f"{_mean(gains[1])}; {_test(gains[0] - gains[1])}"
            )
            evidence.append(Evidence(SMALL, words, significant(gains[0] - gains[1])))
    return Claim(
        "C5",
        "A larger model gains more knowledge than reasoning",
        "the gain in exact match from width 48 to 96 is better",
        evidence,
    )
