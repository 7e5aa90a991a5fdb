"""Tables of the report: all arms, and how much better a parabola fits than a line."""

from collections.abc import Mapping, Sequence

import numpy as np

from launch.papers.preference import fits, results
from launch.papers.preference.arms import ARMS, METHODS
from launch.papers.preference.results import Course, by_seed

# Per cent by which the paper's parabolas have the lower RMSE, by size of its models.
_PAPER = {"7B": 24.42, "35B": 25.78}
_START = "before the first update"


def arms(every: Sequence[Course]) -> list[str]:
    """Means over seeds: the best and the end of each arm's runs, as lines of a page."""
    out = [
        "| arm | best P_win @ update (better LLH) | P_win at the end | better LLH at the end | entropy at its peak @ update "
        "→ at the end | mass | outside A | facts |",
        "|---|---|---|---|---|---|---|---|",
        _before(every),
    ]
    for arm in ARMS.values():
        mine = results.find(every, arm)
        if not mine:
            continue
        peaks = [int(np.argmax(one["entropy"])) for one in mine]
        best, at, likelihood, peak, peak_at = (
            float(np.mean(values))
            for values in (
                [one.moving("p_win")[one.best] for one in mine],
                [one["step"][one.best] for one in mine],
                [one.moving("llh_chosen")[one.best] for one in mine],
                [one["entropy"][i] for one, i in zip(mine, peaks, strict=True)],
                [one["step"][i] for one, i in zip(mine, peaks, strict=True)],
            )
        )
        p_win, llh, entropy, mass, outside, facts = (
            float(np.mean([one.end(name) for one in mine]))
            for name in ("p_win", "llh_chosen", "entropy", "mass", "outside", "facts")
        )
        out.append(
            f"| {arm.label} | {best:.3f} @ {at:.0f} ({likelihood:.2f}) | {p_win:.3f} | {llh:.2f} | {peak:.2f} @ "
            f"{peak_at:.0f} → {entropy:.2f} | {mass:.3f} | {outside:.1%} | {facts:.2f} |"
        )
    return out


def _before(every: Sequence[Course]) -> str:
    """The row of what all runs of a seed start from."""
    firsts = [mine[0] for mine in by_seed(every).values()]
    p_win, llh, entropy, mass, outside, facts = (
        float(np.mean([one.start(name) for one in firsts]))
        for name in ("p_win", "llh_chosen", "entropy", "mass", "outside", "facts")
    )
    return f"| {_START} | {p_win:.3f} | – | {llh:.2f} | {entropy:.2f} | {mass:.3f} | {outside:.1%} | {facts:.2f} |"


def reductions(every: Sequence[Course]) -> dict[str, dict[str, float]]:
    """Evaluations -> by how many per cent a parabola's RMSE is lower than a line's, above the clip and with the tail."""
    every = results.direct(every)
    groups = {f"seed {seed}": mine for seed, mine in by_seed(every).items()}
    groups["all seeds"] = list(every)
    for method, (label, _) in METHODS.items():
        groups[f"{label}, all seeds"] = [one for one in every if one.arm.method == method]
    out: dict[str, dict[str, float]] = {}
    for name, mine in groups.items():
        points = results.points(mine, "llh_chosen", "p_win")
        near, whole = fits.fit(*fits.above(*points)), fits.fit(*points)
        if near is not None and whole is not None:
            out[name] = {
                "curvature": round(near.curvature, 4),
                "above": round(near.reduction, 2),
                "all": round(whole.reduction, 2),
            }
    return out


def fitted(every: Sequence[Course]) -> list[str]:
    """P_win on better LLH: reductions, and the bins of C1; as lines of a page."""
    paper = " and ".join(f"{value} % ({size})" for size, value in _PAPER.items())
    out = [
        f"By how much the RMSE of a quadratic fit of P_win on better LLH is below that of a line; the paper has {paper}.",
        "",
        f"| evaluations | quadratic term | better LLH above {fits.CLIP:g} | all |",
        "|---|---|---|---|",
    ]
    for name, one in reductions(every).items():
        out.append(
            f"| {name} | {one['curvature']:.3f} | {one['above']:.1f} % | {one['all']:.1f} % |"
        )
    numbers = " | ".join(map(str, range(1, fits.BINS + 1)))
    out += [
        "",
        "Mean P_win in bins of as many evaluations each, from the lowest better LLH to the highest; in brackets their mean "
        "better LLH.",
        "",
        f"| evaluations | {numbers} |",
        "|---|" + "---|" * fits.BINS,
    ]
    every = results.direct(every)
    groups: Mapping[str, Sequence[Course]] = {
        **{f"seed {seed}": mine for seed, mine in by_seed(every).items()},
        "all seeds": every,
    }
    for name, mine in groups.items():
        points = results.points(mine, "llh_chosen", "p_win")
        for of, (x_E, y_E) in (("", points), (f", above {fits.CLIP:g}", fits.above(*points))):
            if len(x_E) >= fits.BINS:
                centres, means = fits.binned(x_E, y_E)
                cells = [f"{y:.3f} ({x:.2f})" for x, y in zip(centres, means, strict=True)]
                out.append(f"| {name}{of} | {' | '.join(cells)} |")
    return out
