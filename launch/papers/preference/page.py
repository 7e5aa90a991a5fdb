"""The report of the reproduction."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import claims, figures, fits, results, rule
from launch.papers.preference.results import ARMS, METHODS, Course, by_seed
from launch.papers.shared import page
from launch.papers.shared.results import Results

_DIGITS = 4
# Per cent by which the paper's parabolas have the lower RMSE, by size of its models.
_PAPER = {"7B": 24.42, "35B": 25.78}
_INTRO = """\
Each condition is judged in every seed, and on the means over seeds with 95 % intervals (Student's
t); conditions on the stopping rule on shares of all runs (Wilson's intervals, as if runs of a seed were independent). A claim
holds if all of them meet its condition. Claims in bold must hold at this scale too; other claims may fail."""
_TEXT = [
    "- *language*: prompts of three symbols and completions of at most twelve, of two languages of 244 symbols each. Texts of "
    "language A on a topic prefer six symbols; other documents are texts of language B, and 72 facts of language A. "
    "The quality of an answer to a topic is known: 0.8 for each different symbol that the topic prefers, -4 times the "
    "share of symbols outside A, -3 for each repeat, -0.5 without an end, and -4 for an empty answer (data/preference/topic_language.py).",
    "- *runs*: a decoder of 0.1 million parameters (2 layers of width 64) learns all documents, 1,500 updates. Two samples of "
    "it are judged 2,048 times by Bradley and Terry's model of their quality, six or seven times for each of 320 prompts, "
    "and 600 updates of 32 such pairs follow, about nine epochs, with DPO, IPO (sums over tokens) or SLiC's hinge (means "
    "over tokens; α weighs its regulariser, which is of sums), of several strengths and with an NLL term (a mean over "
    "tokens) of weight λ beside some. A sample that was cut without an end (3 % at most) is trained on with one. For comparison online DPO, RLOO, GRPO and PPO "
    "learn from the quality of 25,600 samples of their own (PPO in 800 updates, the others in 200); claims, fits and rates exclude them "
    "(t5x_configs/experiments/preference/cpu).",
    "- *evaluations*: every 20 updates, of 256 held-out pairs and of an output to each of their prompts, with temperature 0.5 "
    "and top-p 0.75; held-out prompts are of the topics that were trained on, in other words. *Better* and *worse LLH*: mean log-likelihood per token of the held-out completions that were "
    "preferred and that were not. *P_win*: mean of σ(quality - quality of the output before the first update). *EAD*: "
    "distinct n-grams of all outputs together, n = 1 to 5, adjusted for their number. *Entropy* and *mass*: of the ten likeliest "
    "tokens in outputs, renormalised for the entropy. *Facts*: share of them that greedy decoding still states. *Outside A*: share of "
    "symbols of outputs that are not of language A. docs/preference_indicators.md has the definitions.",
    "- *choices that the paper leaves open*, made when runs of the first seed had ended, before they were judged: runs of a seed share their "
    "evaluation before the first update, which counts once; fits and bins are of evaluations with a better LLH above "
    f"{fits.CLIP:g}, below which texts have broken down, and the {fits.BINS} bins have as many evaluations each; the end of "
    f"a run is the mean of its last {results.WINDOW} evaluations, and its best P_win the highest moving mean of as many, at "
    "the middle one; the largest gap is that at the end; β is small below 1; the mass is measured on the arm of each method "
    "that moves furthest; for C2 one evaluation on the better side of both likelihoods is enough; C5 reads single evaluations, so "
    "that a rise may be noise. That bins are read with the tail too was added when some runs of the first seed had been seen.",
    f"- *stopping rule*: trainers/preference/indicators/alarm.py with its default settings. A run is over-optimised if P_win at its end is "
    f"more than {rule.LOSS} below its best. An alarm is false if it is not; early if it comes more than an "
    "evaluation before the best P_win; missed if an over-optimised run has none; and in time otherwise, however late.",
    "- *where it falls short*: the paper's models are of 7 and 35 billion parameters, its preferences people's or a large "
    "model's, and its judge a reward model; here quality is exact, and a text is a dozen symbols.",
]


_RULE = [
    "P_win in these tables is a mean of three evaluations, and its differences are means over runs. *Before the alarm*: of "
    "the checkpoint of the evaluation before it, which is released without a reward (the last one of a run without an "
    "alarm); *best reward*: of the checkpoint with the best mean reward of the whole run, which a reward selects, whatever the rule does. "
    "Other thresholds are for information: the default is not chosen by them. Online methods are in the first two tables alone."
]


def _setup(parts: Mapping[str, Any]) -> list[str]:
    """Returns how it was measured, how many runs there are, and which are missing."""
    if not (rows := parts.get("rows")):
        return [*_TEXT, *page.missing([], ("language",), parts)]
    runs, evaluated = (
        Results(rows),
        [{"arm": one.arm.name, "seed": one.seed} for one in parts["courses"]],
    )
    first, _, rest = runs.amount().partition(", ")
    words = f"- {first}, of which {len(evaluated)} are evaluated; {rest}."
    return [
        *_TEXT,
        words,
        *page.missing(Results(evaluated).missing(list(ARMS), runs.seeds), (), parts),
    ]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    if not (courses := parts.get("courses")):
        return []
    direct = parts["language"]
    paper = " and ".join(f"{value} % ({size})" for size, value in _PAPER.items())
    fitted = [
        (name, f"{one['curvature']:.3f}", f"{one['above']:.1f} %", f"{one['all']:.1f} %")
        for name, one in _reductions(direct).items()
    ]
    return [
        *_arms(courses),
        *("## A line and a parabola", ""),
        f"Reduction of the RMSE of a fit of P_win on better LLH by a parabola instead of a line; the paper has {paper}.",
        "",
        *page.table(
            ("evaluations", "quadratic term", f"better LLH above {fits.CLIP:g}", "all"), fitted
        ),
        "Mean P_win in bins of as many evaluations each, from the lowest better LLH to the highest; in brackets their mean "
        "better LLH.",
        "",
        *page.table(("evaluations", *map(str, range(1, fits.BINS + 1))), _bins(direct)),
        *("## The stopping rule", "", *_RULE, "", *rule.tables(courses)),
    ]


_NAMES = ("p_win", "llh_chosen", "entropy", "mass", "outside", "facts")
_FORMATS = dict(zip(_NAMES, (".3f", ".2f", ".2f", ".3f", ".1%", ".2f"), strict=True))


def _arms(courses: Sequence[Course]) -> list[str]:
    """Returns the table of means over seeds: the start, and the best and the end of each arm's runs."""
    header = (
        *("arm", "best P_win @ update (better LLH)", "P_win at the end", "better LLH at the end"),
        *("entropy at its peak @ update → at the end", "mass", "outside A", "facts"),
    )
    firsts = [mine[0] for mine in by_seed(courses).values()]
    p_win, *cells = _means(firsts, Course.start)
    rows = [("before the first update", p_win, "–", *cells)]
    for arm in ARMS.values():
        if mine := results.find(courses, arm):
            *best, peak, peak_at = np.mean([_best(one) for one in mine], axis=0)
            p_win, llh, entropy, *cells = _means(mine, Course.end)
            entropy = f"{peak:.2f} @ {peak_at:.0f} → {entropy}"
            shown = "{:.3f} @ {:.0f} ({:.2f})".format(*best)
            rows.append((arm.label, shown, p_win, llh, entropy, *cells))
    return page.table(header, rows, "All arms")


def _best(one: Course) -> tuple[float, ...]:
    """Returns the best P_win, its update and likelihood, and the peak of entropy and its update."""
    peak = int(np.argmax(one["entropy"]))
    p_win, llh = (one.moving(name)[one.best] for name in ("p_win", "llh_chosen"))
    return p_win, one["step"][one.best], llh, one["entropy"][peak], one["step"][peak]


def _means(runs: Sequence[Course], value: Callable[[Course, str], float]) -> list[str]:
    """Returns the means of _FORMATS over runs, as text."""
    return [f"{np.mean([value(one, name) for one in runs]):{f}}" for name, f in _FORMATS.items()]


def _groups(courses: Sequence[Course]) -> dict[str, Sequence[Course]]:
    return {
        **{f"seed {seed}": mine for seed, mine in by_seed(courses).items()},
        "all seeds": courses,
    }


def _reductions(courses: Sequence[Course]) -> dict[str, dict[str, float]]:
    """Returns by how many per cent a parabola's RMSE is lower than a line's, above the clip and with the tail."""
    methods = {
        f"{label}, all seeds": results.of_method(courses, method)
        for method, (label, _) in METHODS.items()
    }
    out = {}
    for name, mine in {**_groups(courses), **methods}.items():
        points = results.points(mine, "llh_chosen", "p_win")
        near, whole = fits.fit(*fits.above(*points)), fits.fit(*points)
        if near is not None and whole is not None:
            out[name] = {
                "curvature": round(near.curvature, 4),
                "above": round(near.reduction, 2),
                "all": round(whole.reduction, 2),
            }
    return out


def _bins(courses: Sequence[Course]) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table of the bins of C1."""
    for name, mine in _groups(courses).items():
        points = results.points(mine, "llh_chosen", "p_win")
        for of, (x_E, y_E) in (("", points), (f", above {fits.CLIP:g}", fits.above(*points))):
            if len(x_E) >= fits.BINS:
                centres_means = zip(*fits.binned(x_E, y_E), strict=True)
                yield name + of, *(f"{y:.3f} ({x:.2f})" for x, y in centres_means)


def _record(parts: Mapping[str, Any]) -> dict[str, Any]:
    runs = [
        {
            "arm": one.arm.name,
            "seed": one.seed,
            **{
                name: [round(x, _DIGITS) if np.isfinite(x) else None for x in values.tolist()]
                for name, values in one.values.items()
            },
        }
        for one in parts.get("courses", ())
    ]
    return {"fits": _reductions(parts.get("language", ())), "runs": runs}


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rows, the courses of their runs, and under 'language' those that learn from pairs."""
    rows = measured.get("language", ())
    courses = results.courses(rows)
    return {"rows": rows, "courses": courses, "language": results.direct(courses)}


REPORT = page.Report(
    slug="preference",
    title="Likelihood over-optimisation: the paper's claims on a small language",
    source="[Understanding Likelihood Over-optimisation in Direct Alignment Algorithms, arXiv\n"
    "2410.11677](https://arxiv.org/abs/2410.11677)",
    intro=_INTRO,
    claims=claims.CLAIMS,
    places={"language": "seed"},  # how the places of all evidence begin
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    record=_record,
    run_lines=True,
)
write = REPORT.write
