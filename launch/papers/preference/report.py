"""The page on likelihood and quality: its tables, its headline, and how its measurements are exchanged."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.preference import claims, experiment, figures, numbers, rule
from espalier.launch.papers.preference.numbers import ARMS, DIRECT, METHODS, Course, Runs, by_seed
from espalier.launch.papers.shared import page
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import intervals

_PROSE = Prose.of(__name__)

_LATER = (("p_win", "reward"), ("facts",))  # only after updates
# Columns that are exchanged together, of evaluations of all runs of a seed.
_TOGETHER = (
    *_LATER,
    ("ead",),
    ("entropy", "mass", "entropy_chosen", "mass_chosen"),
)
_PENALTY = 0.1  # of P_win


def exchanged(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements without any relation to likelihood, arm and time.

    Diversity and the likeliest tokens are exchanged at random among all evaluations of a seed's runs, quality and facts among
    those after updates, since the first one says what there is to gain or to lose. That would make C7b and C8 true, which say that there is no relation: P_win is less with an NLL term, and
    lengths are exchanged so that they follow the likelihood.
    """
    out = {part: [{**row} for row in rows] for part, rows in measured.items()}
    for rows in out.values():
        for seed in {row["seed"] for row in rows}:
            mine = [row for row in rows if row["seed"] == seed and row["course"]]
            for row in mine:
                row["course"] = {**row["course"]}
            if mine:
                _exchange([row["course"] for row in mine], rng)
            for row in mine:
                if "nll" in row["arm"]:
                    row["course"]["p_win"] = [x - _PENALTY for x in row["course"]["p_win"]]
    return out


def _exchange(courses: Sequence[dict[str, list[Any]]], rng: np.random.Generator) -> None:
    sizes = [len(course["step"]) for course in courses]

    def pooled(name: str) -> np.ndarray:
        return np.concatenate([np.array(course[name], float) for course in courses])

    def put(name: str, values: np.ndarray) -> None:
        parts = np.split(values, np.cumsum(sizes)[:-1])
        for course, part in zip(courses, parts, strict=True):
            course[name] = part.tolist()

    for names in _TOGETHER:
        movable = pooled("step") > 0 if names in _LATER else np.ones(sum(sizes), bool)
        order = np.arange(sum(sizes))
        order[movable] = rng.permutation(order[movable])
        for name in names:
            if all(name in course for course in courses):  # runs of earlier rounds lack some
                put(name, pooled(name)[order])
    likelihood = pooled("llh_chosen")
    noisy = likelihood + rng.normal(0, likelihood.std(), likelihood.size)
    put("length", np.sort(pooled("length"))[np.argsort(np.argsort(noisy))])


# Per cent by which the paper's parabolas have the lower RMSE, by size of its models.
_PAPER = {"7B": 24.42, "35B": 25.78}


def _setup(parts: Mapping[str, Any]) -> list[str]:
    """Returns how it was measured, how many runs there are, and which are missing."""
    lines, names = [_PROSE("method", edges=", ".join(f"{edge:g}" for edge in numbers.EDGES))], []
    for part, arms in (("language", list(ARMS)), ("large", numbers.LARGE)):
        if runs := parts.get(part):
            lines.append(f"- {_PLACES[part]}: {runs.amount()}.")
            evaluated = Runs([{"arm": one.arm.name, "seed": one.seed} for one in runs.courses()])
            for judged, first in ((True, experiment.SEEDS[0]), (False, 1)):
                names += evaluated.missing([a for a in arms if (a in DIRECT) == judged], first)
    not_run = [part for part in experiment.PARTS if not parts.get(part)]
    return [*lines, *page.missing(names, not_run, parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    if "language" not in parts:
        return []
    runs = parts["language"]
    courses, direct = runs.courses(), runs.courses(DIRECT.values())
    paper = " and ".join(f"{value} % ({size})" for size, value in _PAPER.items())
    return [
        *_arms(courses),
        *_best_of(runs.rows),
        *("## A line and a parabola", ""),
        f"Reduction of the RMSE of a fit of P_win on better LLH by a parabola instead of a line; the paper has {paper}.",
        "",
        *page.table(
            ("evaluations", "quadratic term", f"within {numbers.CLIP:g} nats of the start", "all"),
            _reductions(direct),
        ),
        "Mean P_win by how far better LLH is below its start.",
        "",
        *page.table(("evaluations", *_bin_names()), _bins(direct)),
        *("## The stopping rule", "", _PROSE("rule"), ""),
        *rule.tables(courses, direct, list(ARMS.values())),
    ]


_NAMES = ("p_win", "llh_chosen", "entropy", "mass", "ead", "length", "outside", "facts")
_FORMATS = dict(zip(_NAMES, (".3f", ".2f", ".2f", ".3f", ".2f", ".1f", ".1%", ".2f"), strict=True))


def _arms(courses: Sequence[Course]) -> list[str]:
    """Returns the table of means over seeds: the start, and the best and the end of each arm's runs."""
    header = (
        *("arm", "best P_win", "after updates, by seed", "better LLH there", "P_win at the end"),
        *("better LLH at the end", "entropy: highest, after updates by seed, at the end"),
        *("mass", "EAD", "length", "outside A", "facts"),
    )
    firsts = [mine[0] for mine in by_seed(courses).values()]
    p_win, llh, entropy, *cells = _means(firsts, Course.start)
    rows = [("before the first update", p_win, "", "", "", llh, entropy, *cells)]
    for arm in ARMS.values():
        if mine := numbers.find(courses, arm):
            p_win, llh, entropy, *cells = _means(mine, Course.end)
            best = np.mean([one.moving("p_win")[one.best] for one in mine])
            there = np.mean([one.moving("llh_chosen")[one.best] for one in mine])
            peaks = [int(np.argmax(one["entropy"])) for one in mine]
            peak = np.mean([one["entropy"].max() for one in mine])
            at = _steps(one["step"][one.best] for one in mine)
            turned = _steps(one["step"][i] for one, i in zip(mine, peaks, strict=True))
            turn = f"{peak:.2f}; {turned}; {entropy}"
            shown = (f"{best:.3f}", at, f"{there:.2f}")
            rows.append((arm.label, *shown, p_win, llh, turn, *cells))
    return page.table(header, rows, "All arms")


def _steps(steps: Iterable[float]) -> str:
    return ", ".join(f"{step:.0f}" for step in steps)


def _means(runs: Sequence[Course], value: Callable[[Course, str], float]) -> list[str]:
    """Returns the means of _FORMATS over runs, as text; of values that are there."""
    values = {name: [value(one, name) for one in runs] for name in _FORMATS}
    return [
        f"{np.nanmean(some):{_FORMATS[name]}}" if np.isfinite(some).any() else "–"
        for name, some in values.items()
    ]


def _best_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of the best of n samples of the model before preferences."""
    by_seed = [row["best_of"] for row in rows if row.get("best_of")]
    if not by_seed:
        return []
    sizes = list(by_seed[0])
    cells = [intervals.text(intervals.over_seeds([one[n] for one in by_seed]), 3) for n in sizes]
    words = "P_win of the best of n samples of the model before preferences, chosen by the quality itself."
    return [words, "", *page.table(("n", *sizes), [("P_win", *cells)])]


def _groups(courses: Sequence[Course]) -> dict[str, Sequence[Course]]:
    seeds = {f"seed {seed}": mine for seed, mine in by_seed(courses).items()}
    return {**seeds, "all seeds": courses}


def _reductions(courses: Sequence[Course]) -> Iterator[tuple[str, ...]]:
    """Yields by how many per cent a parabola's RMSE is lower than a line's, near the start and with the tail."""
    methods = {
        f"{label}, all seeds": numbers.of_method(courses, method)
        for method, (label, _) in METHODS.items()
    }
    for name, mine in {**_groups(courses), **methods}.items():
        points = numbers.points(mine, "fall", "p_win")
        near, whole = numbers.fitted(*numbers.near(*points)), numbers.fitted(*points)
        if near is not None and whole is not None:
            shares = (f"{one.reduction:.1%}" for one in (near, whole))
            yield name, f"{near.curvature:.3f}", *shares


def _bin_names() -> list[str]:
    edges = [f"{edge:g}" for edge in numbers.EDGES]
    between = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)]
    return [f"less than {edges[0]}", *between, f"{edges[-1]} or more"]


def _bins(courses: Sequence[Course]) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table of the bins of C1."""
    for name, mine in _groups(courses).items():
        means = numbers.binned(*numbers.points(mine, "fall", "p_win"))
        yield name, *("–" if mean is None else f"{mean:.3f}" for mean in means)


def _read(measured: Mapping[str, Any]) -> dict[str, Runs]:
    """Returns the runs of each part."""
    return {part: Runs(measured[part]) for part in experiment.PARTS if measured.get(part)}


_PLACES = {"language": "the language", "large": "twice the width"}


REPORT = page.Report(
    slug="preference",
    title="Likelihood over-optimisation: the paper's claims on a small language",
    source="[Understanding Likelihood Over-optimisation in Direct Alignment Algorithms, arXiv\n"
    "2410.11677](https://arxiv.org/abs/2410.11677)",
    claims=claims.CLAIMS,
    places=_PLACES,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=exchanged,
    headline=page.Headline(
        claim="C1a",
        what="error that a parabola of quality on likelihood saves over a line",
        unit="%",
        paper=_PAPER["7B"],
        measure=claims.SAVES,
        part="language",
        why=_PROSE("why"),
        mind=_PROSE("mind"),
    ),
)
