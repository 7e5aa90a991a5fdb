"""The claims on likelihood and quality and how each is measured, with the page.

Only the paper's methods are judged. The stopping rule is in rule.py.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.preference import experiment, figures, numbers, rule
from espalier.launch.papers.preference.numbers import (
    ARMS,
    METHODS,
    ONLINE,
    Arm,
    Course,
    Number,
    arms_of,
    by_seed,
    change,
    find,
    of_arm,
)
from espalier.launch.papers.shared import page
from espalier.launch.papers.shared.claim import FEW_SEEDS, Effect, Measure
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import Results
from espalier.launch.plots import intervals

_PROSE = Prose.of(__name__)

APART = 0.05  # of P_win, by which the middle is better than both ends
REDUCTION = 0.15  # of RMSE
GAP_LOSES = 0.05  # of P_win
LARGE = 0.9  # quantile of the gap above which it is large
FRONT_LOSES = 0.01  # of P_win
SPEARMAN = 0.5
PEARSON = 0.2
SMALL = (0.01, 0.1)  # strengths of DPO whose entropy is to turn
TURN = (5, 20)  # updates between which entropy is to be above the start
WEAK, STRONG = 0.1, 50.0  # of DPO beside an NLL term
WEIGHTS = (0.0, 0.1, 1.0)  # of the NLL term; at the strong one the last against the first
HELD = 0.1  # nats that the strong one's likelihood may move without an NLL term
LLH_MOVES, P_WIN_MOVES = 0.02, 0.05  # at most, by an NLL term beside the strong one
TURNS = 0.01  # of P_win, by which the weight in the middle is better than both others


def effect(
    what: str,
    number: Number,
    unmet: Callable[[Sequence[Course]], str] | None = None,
    **settings: Any,
) -> Measure:
    """Returns a measure of one number of the runs of each seed; of seeds where it is None there is no value.

    Args:
      unmet: of the runs of all seeds, why the number gives no verdict.
    """

    def measure(courses: Sequence[Course], where: str) -> list[Effect]:
        known = {seed: number(mine) for seed, mine in by_seed(courses).items()}
        values = {seed: float(x) for seed, x in known.items() if x is not None}
        if not values:
            return []
        why = "" if unmet is None else unmet(courses)
        return [Effect(where=where, what=what, by_seed=values, unmet=why, **settings)]

    return measure


def ranks(score: str, name: str, beside: Sequence[str] = ("",), **bounds: float) -> list[Measure]:
    """Returns measures of the correlations of a score with better LLH, for each method."""
    return [
        effect(
            f"Spearman's correlation of {name} and better LLH, {label}"
            + (f", at equal {fixed}" if fixed else ""),
            functools.partial(numbers.spearman, score, method, fixed),
            digits=2,
            **bounds,
        )
        for fixed in beside
        for method, (label, _) in METHODS.items()
    ]


def moved_without_nll(courses: Sequence[Course]) -> str:
    """Returns how far the strong DPO moves better LLH by itself, if that is too far."""
    moves = [change("llh_chosen", one) for one in find(courses, Arm("dpo", STRONG))]
    mean = float(np.mean(moves)) if moves else 0.0
    return "" if abs(mean) <= HELD else f"better LLH moves by {mean:.2f} without an NLL term"


_low, _high = numbers.MIDDLE
_span = f"{_low:g} to {_high:g} nats"
_INTERMEDIATE = [
    *(
        effect(
            f"P_win where better LLH is {_span} below its start, less where it is {words}",
            functools.partial(numbers.middle_less, *bounds),
            above=APART,
        )
        for words, bounds in (
            (
                f"less than {numbers.EDGES[0]:g} below",
                (-np.inf, numbers.EDGES[0]),
            ),
            (
                f"{numbers.EDGES[-1]:g} or more below",
                (numbers.EDGES[-1], np.inf),
            ),
        )
    ),
    effect(
        "quadratic term of the fit",
        functools.partial(numbers.of_fit, "curvature"),
        below=0.0,
    ),
    effect(
        "share of a line's RMSE that a parabola saves",
        functools.partial(numbers.of_fit, "reduction"),
        above=REDUCTION,
    ),
]
_GAP = [
    effect(
        "P_win at the end, other runs less the run of the largest gap",
        numbers.others_less_largest_gap,
        above=GAP_LOSES,
    ),
    effect(
        "P_win, other evaluations less the tenth with the largest gaps",
        functools.partial(numbers.others_less_large_gaps, LARGE),
        above=GAP_LOSES,
    ),
    effect(
        "P_win, other evaluations less those that none surpasses in both likelihoods",
        numbers.others_less_front,
        above=FRONT_LOSES,
    ),
]
_TURN = [
    measure
    for strength in SMALL
    for measure in (
        effect(
            f"entropy after {TURN[0]} to {TURN[1]} updates less at the start, DPO β = {strength:g}",
            of_arm(Arm("dpo", strength), functools.partial(numbers.rise, "entropy", *TURN)),
            above=0.0,
            unit="bits",
        ),
        effect(
            f"entropy at the end less at the start, DPO β = {strength:g}",
            of_arm(Arm("dpo", strength), functools.partial(change, "entropy")),
            below=0.0,
            unit="bits",
        ),
    )
]
_MASS = [
    effect(
        f"mass at the end less at the start, {arms_of(method)[0].label}",
        of_arm(arms_of(method)[0], functools.partial(change, "mass")),
        below=0.0,
    )
    for method in METHODS
]
_NLL = [
    *(
        effect(
            f"{words} at the end, λ = {WEIGHTS[-1]:g} less λ = 0, β = {STRONG:g}",
            functools.partial(
                numbers.difference,
                name,
                Arm("dpo", STRONG, WEIGHTS[-1]),
                Arm("dpo", STRONG),
            ),
            moved_without_nll,
            above=-most,
            below=most,
        )
        for name, words, most in (
            ("llh_chosen", "better LLH", LLH_MOVES),
            ("p_win", "P_win", P_WIN_MOVES),
        )
    ),
    *(
        effect(
            f"P_win at the end, λ = {WEIGHTS[1]:g} less λ = {weight:g}, β = {WEAK:g}",
            functools.partial(
                numbers.difference,
                "p_win",
                Arm("dpo", WEAK, WEIGHTS[1]),
                Arm("dpo", WEAK, weight),
            ),
            above=TURNS,
        )
        for weight in (WEIGHTS[0], WEIGHTS[-1])
    ),
]
_LENGTH = effect(
    "Pearson's correlation of better LLH and length",
    numbers.length_link,
    above=-PEARSON,
    below=PEARSON,
)
_RATES = (
    f"of runs that are not over-optimised at most {rule.WRONG['false'][1]:.0%} raise an alarm; of those that are at most "
    f"{rule.WRONG['missed'][1]:.0%} raise none, and as many raise it more than an evaluation before the best P_win; "
    f"over-optimised: P_win at the end is more than {rule.LOSS} below its best"
)

CLAIMS = (
    _PROSE.claim("C1", {"language": _INTERMEDIATE}, required=True, last_edge=numbers.EDGES[-1]),
    _PROSE.claim("C2", {"language": _GAP}, required=True),
    _PROSE.claim(
        "C3", {"language": ranks("ead", "EAD", ("", "length"), below=-SPEARMAN)}, required=True
    ),
    _PROSE.claim(
        "C4", {"language": ranks("facts", "fact accuracy", above=SPEARMAN)}, required=True
    ),
    _PROSE.claim(
        "C5", {"language": _TURN}, required=True, small=" and ".join(f"{s:g}" for s in SMALL)
    ),
    _PROSE.claim("C6", {"language": _MASS}),
    _PROSE.claim(
        "C7", {"language": _NLL}, required=True, rate=experiment.RATES[STRONG], largest=WEIGHTS[-1]
    ),
    _PROSE.claim("C8", {"language": [_LENGTH]}, required=True),
    _PROSE.claim(
        "C9", {"language": [rule.rates(rule.PLAIN)], "smollm": [rule.rates(rule.PLAIN, FEW_SEEDS)]}
    ),
    _PROSE.claim(
        "C10",
        {"language": [rule.rates(rule.CHOSEN)], "smollm": [rule.rates(rule.CHOSEN, FEW_SEEDS)]},
    ),
)


# Columns that are exchanged together, of evaluations of all runs of a seed.
_TOGETHER = (("p_win", "reward"), ("ead",), ("facts",), ("entropy", "mass"))


def exchanged(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements without any relation to likelihood, arm and time.

    Quality, diversity, facts and the likeliest tokens are exchanged at random among all evaluations of a seed's runs, the
    first ones included. That would make C8 true, which says that there is no relation: lengths are exchanged so that they
    follow the likelihood.
    """
    out = {part: [{**row} for row in rows] for part, rows in measured.items()}
    for rows in out.values():
        for seed in {row["seed"] for row in rows}:
            mine = [row for row in rows if row["seed"] == seed and row["course"]]
            for row in mine:
                row["course"] = {**row["course"]}
            if mine:
                _exchange([row["course"] for row in mine], rng)
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
        order = rng.permutation(sum(sizes))
        for name in names:
            put(name, pooled(name)[order])
    likelihood = pooled("llh_chosen")
    noisy = likelihood + rng.normal(0, likelihood.std(), likelihood.size)
    put("length", np.sort(pooled("length"))[np.argsort(np.argsort(noisy))])


# Per cent by which the paper's parabolas have the lower RMSE, by size of its models.
_PAPER = {"7B": 24.42, "35B": 25.78}


def _setup(parts: Mapping[str, Any]) -> list[str]:
    """Returns how it was measured, how many runs there are, how long they took, and which are missing."""
    edges = ", ".join(f"{edge:g}" for edge in numbers.EDGES)
    text = _PROSE("method", edges=edges)
    not_run = [part for part in ("language", "smollm") if not parts.get(part)]
    if not (rows := parts.get("rows")):
        return [text, *page.missing([], not_run, parts)]
    runs = Results(rows)
    evaluated = Results([{"arm": one.arm.name, "seed": one.seed} for one in parts["courses"]])
    first, _, rest = runs.amount().partition(", ")
    seconds = {
        arm: np.mean([row["seconds"] for row in runs.find(arm).values()]) for arm in runs.arms
    }
    slowest = sorted(seconds, key=seconds.__getitem__)[-3:]
    words = (
        f"- {first}, of which {len(evaluated.rows)} are evaluated; {rest} (a mean of "
        f"{np.mean(list(seconds.values())):.0f} s a run, most for {', '.join(f'{arm} ({seconds[arm]:.0f} s)' for arm in slowest)})."
    )
    one_seed = set(ONLINE)
    names = [
        *evaluated.missing([arm for arm in ARMS if arm not in one_seed], runs.seeds),
        *evaluated.missing([*one_seed & set(ARMS)], runs.seeds[:1]),
    ]
    return [text, words, *page.missing(names, not_run, parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    if not (courses := parts.get("courses")):
        return []
    direct = parts["language"]
    paper = " and ".join(f"{value} % ({size})" for size, value in _PAPER.items())
    return [
        *_arms(courses),
        *_best_of(parts["rows"]),
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
        *_smollm(parts.get("smollm", [])),
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
            peaks = [int(np.argmax(one.every["entropy"])) for one in mine]
            peak = np.mean([one.every["entropy"].max() for one in mine])
            at = _steps(one["step"][one.best] for one in mine)
            turned = _steps(one.every["step"][i] for one, i in zip(mine, peaks, strict=True))
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


def _smollm(courses: Sequence[Course]) -> list[str]:
    """Returns the table of the real model's runs."""
    rows = []
    for name, arm in numbers.SMOLLM.items():
        for one in numbers.find(courses, arm):
            alarms = [rule.outcome(one, which) for which in (rule.PLAIN, rule.CHOSEN)]
            kinds = [f"{x.alarm.step if x.alarm else '–'} ({x.kind})" for x in alarms]
            best = one.moving("p_win")[one.best]
            ends = (f"{one.end('p_win'):.3f}", f"{one.start('llh_chosen'):.2f}")
            llh = f"{one.end('llh_chosen'):.2f}"
            at = f"{one['step'][one.best]:.0f}"
            rows.append((name, str(one.seed), f"{best:.3f}", at, *ends, llh, *kinds))
    if not rows:
        return []
    header = (
        *("arm", "seed", "best P_win", "after updates", "P_win at the end", "better LLH at first"),
        *("at the end", "alarm of the plain rule", "of the rule that waits"),
    )
    return page.table(header, rows, "SmolLM2-135M")


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rows and courses of the language, under 'language' those of the paper's methods, and the real model's."""
    rows = measured.get("language", ())
    courses = numbers.courses_of(rows)
    smollm = numbers.courses_of(measured.get("smollm", ()), numbers.SMOLLM)
    parts = {"rows": rows, "courses": courses, "language": numbers.direct(courses)}
    return {**parts, "smollm": smollm} if smollm else parts


REPORT = page.Report(
    slug="preference",
    title="Likelihood over-optimisation: the paper's claims on a small language",
    source="[Understanding Likelihood Over-optimisation in Direct Alignment Algorithms, arXiv\n"
    "2410.11677](https://arxiv.org/abs/2410.11677)",
    claims=CLAIMS,
    places={"language": "the language", "smollm": "SmolLM2-135M"},
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=exchanged,
)
