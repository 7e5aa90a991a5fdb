"""The report of the reproduction."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import claims, exchange, figures, fits, results, rule
from launch.papers.preference.results import ARMS, METHODS, ONLINE, Course, by_seed
from launch.papers.shared import page
from launch.papers.shared.results import Results
from launch.plots import intervals

# Per cent by which the paper's parabolas have the lower RMSE, by size of its models.
_PAPER = {"7B": 24.42, "35B": 25.78}
_TEXT = [
    "- *language*: prompts of three symbols and completions of at most twelve, of two languages of 244 symbols each. Any of 32 "
    "symbols may follow a symbol, the r-th with a probability proportional to 1 / r. Texts of "
    "language A on a topic prefer six symbols; other documents are texts of language B, and 72 facts of language A. "
    "The quality of an answer to a topic is known: 0.8 for each different symbol that the topic prefers, -4 times the "
    "share of symbols outside A, -3 for each repeat, -0.5 without an end, and -4 for an empty answer (data/preference/topic_language.py).",
    "- *runs*: a decoder of 0.1 million parameters (2 layers of width 64) learns all documents, 1,500 updates. Two samples of "
    "it are judged 2,048 times by Bradley and Terry's model of their quality, six or seven times for each of 320 prompts, "
    "and 600 updates of 32 such pairs follow, about nine epochs, with DPO, IPO (sums over tokens) or SLiC's hinge (means "
    "over tokens; α weighs its regulariser, which is of sums), of several strengths and with an NLL term (a mean over "
    "tokens) of weight λ beside some. The rate is 1e-3, and 3e-4 with β = 50, which holds the policy only then (chosen on a pilot seed). A sample that was cut without an end is trained on with one. For comparison SimPO (β = 2, γ = 1) and the "
    "likelihood of the better completions alone learn from the same pairs, online DPO, RLOO, GRPO and PPO "
    "from the quality of 25,600 samples of their own (PPO in 800 updates, the others in 200; one seed), and the best of n samples of the "
    "first model needs no training; claims, fits and rates exclude them (t5x_configs/experiments/preference/cpu).",
    "- *evaluations*: every 20 updates (and every 5 up to 60 for C5), of 256 held-out pairs and of an output to each of their prompts, with temperature 0.5 "
    "and top-p 0.75; held-out prompts are of the topics that were trained on, in other words. *Better* and *worse LLH*: mean log-likelihood per token of the held-out completions that were "
    "preferred and that were not. *P_win*: mean of σ(quality - quality of the output before the first update). *EAD*: "
    "distinct n-grams among 256 that are drawn from those of all outputs, over the number expected of uniform draws from V^n, mean of n = 1 to 3: "
    "it depends on neither the number nor the length of outputs, and is at most 1.09. *Entropy* and *mass*: of the ten likeliest "
    "tokens in outputs, renormalised for the entropy. *Facts*: share of them that greedy decoding still states. *Outside A*: share of "
    "symbols of outputs that are not of language A. docs/preference_indicators.md has the definitions.",
    "- *choices that the paper leaves open*, made on seeds 0 to 2 of a language with four successors, which judge nothing here: runs of a seed share their "
    "evaluation before the first update, which counts once; bins and fits are of falls of better LLH below its start, with edges at "
    f"{', '.join(f'{edge:g}' for edge in fits.EDGES)}, of which the third and the fourth bin together are the middle; the end of "
    f"a run is the mean of its last {results.WINDOW} evaluations, and its best P_win the highest moving mean of as many, at "
    "the middle one; β is small below 1; the mass is measured on the arm of each method that moves furthest. Better LLH and facts are compared "
    "without NLL terms, which forget facts at a high likelihood, since they train on other texts.",
    f"- *stopping rule*: trainers/preference/indicators/alarm.py with an `llh_drop` of 0 (C9) and of {rule.CHOSEN.llh_drop:g} nats (C10), "
    "other settings as by default, on every 20th update. A run is over-optimised if P_win at its end is "
    f"more than {rule.LOSS} below its best. An alarm is false if it is not; early if it comes more than an "
    "evaluation before the best P_win; missed if an over-optimised run has none; and in time otherwise, however late.",
    "- *where it falls short*: the paper's models are of 7 and 35 billion parameters, its preferences people's or a large "
    "model's, and its judge a reward model; here quality is exact, and a text is a dozen symbols. Its sizes are in "
    "t5x_configs/experiments/preference/full, which were not run.",
]
_RULE = [
    "P_win in these tables is a mean of three evaluations, and its differences are means over runs. *Before the alarm* (of the rule that waits): of "
    "the checkpoint of the evaluation before it, which is released without a reward (the last one of a run without an "
    "alarm); *best reward*: of the checkpoint with the best mean reward of the whole run, which a reward selects, whatever the rule does. "
    "Other settings are for information. Methods that are not the paper's are in the first two tables alone."
]


def _setup(parts: Mapping[str, Any]) -> list[str]:
    """Returns how it was measured, how many runs there are, how long they took, and which are missing."""
    not_run = [part for part in ("language", "smollm") if not parts.get(part)]
    if not (rows := parts.get("rows")):
        return [*_TEXT, *page.missing([], not_run, parts)]
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
    return [*_TEXT, words, *page.missing(names, not_run, parts)]


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
            ("evaluations", "quadratic term", f"within {fits.CLIP:g} nats of the start", "all"),
            _reductions(direct),
        ),
        "Mean P_win by how far better LLH is below its start.",
        "",
        *page.table(("evaluations", *_bin_names()), _bins(direct)),
        *("## The stopping rule", "", *_RULE, ""),
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
        if mine := results.find(courses, arm):
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
        f"{label}, all seeds": results.of_method(courses, method)
        for method, (label, _) in METHODS.items()
    }
    for name, mine in {**_groups(courses), **methods}.items():
        points = results.points(mine, "fall", "p_win")
        near, whole = fits.fit(*fits.near(*points)), fits.fit(*points)
        if near is not None and whole is not None:
            shares = (f"{one.reduction:.1%}" for one in (near, whole))
            yield name, f"{near.curvature:.3f}", *shares


def _bin_names() -> list[str]:
    edges = [f"{edge:g}" for edge in fits.EDGES]
    between = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)]
    return [f"less than {edges[0]}", *between, f"{edges[-1]} or more"]


def _bins(courses: Sequence[Course]) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table of the bins of C1."""
    for name, mine in _groups(courses).items():
        means = fits.binned(*results.points(mine, "fall", "p_win"))
        yield name, *("–" if mean is None else f"{mean:.3f}" for mean in means)


def _smollm(courses: Sequence[Course]) -> list[str]:
    """Returns the table of the real model's runs."""
    rows = []
    for name, arm in results.SMOLLM.items():
        for one in results.find(courses, arm):
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
    courses = results.courses(rows)
    smollm = results.courses(measured.get("smollm", ()), results.SMOLLM)
    parts = {"rows": rows, "courses": courses, "language": results.direct(courses)}
    return {**parts, "smollm": smollm} if smollm else parts


REPORT = page.Report(
    slug="preference",
    title="Likelihood over-optimisation: the paper's claims on a small language",
    source="[Understanding Likelihood Over-optimisation in Direct Alignment Algorithms, arXiv\n"
    "2410.11677](https://arxiv.org/abs/2410.11677)",
    claims=claims.CLAIMS,
    places={"language": "the language", "smollm": "SmolLM2-135M"},
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=exchange.exchanged,
)
