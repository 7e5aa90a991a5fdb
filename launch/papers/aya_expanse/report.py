"""The claims of Aya Expanse and of the papers it is made of that small models can judge and how each is measured, with the page.

Arms of the same seed have the same base, pool and requests, so that they are compared in pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.aya_expanse import experiment, figures, lexicon, small_pool, small_stage
from espalier.launch.papers.aya_expanse.experiment import (
    ARTEFACTS,
    DIVERGENCE,
    HARMFUL,
    REWARD,
    STAGES,
    UNSEEN_SCORE,
    WINS,
    WORST,
    WORST_WINS,
    Runs,
    S,
    of_language,
)
from espalier.launch.papers.aya_expanse.small_pool import NOISES
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Claim, Effect
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import compare

_PROSE = Prose.of(__name__)

SAME = 0.02  # of the score: what counts as no worse
PLACES = {"small": "words of seven languages"}
_DISAGREEING = 3  # languages of the largest disagreement
_LAST, _THIRD = "round6", "round3"


def routed(*pairs: tuple[str, str], above: float = 0.0) -> Any:
    """Returns a measure that compares students of routings; it gives no verdict where the teachers have not learned."""

    def measure(runs: Runs, where: str) -> list[Effect]:
        return [
            effect
            for one, other in pairs
            for effect in runs.gain(
                where,
                S,
                f"student_{one}",
                f"student_{other}",
                above=above,
                unmet=runs.untaught() or runs.unmet(S, f"student_{one}", f"student_{other}"),
            )
        ]

    return measure


def where_they_disagree(runs: Runs, where: str) -> list[Effect]:
    """Compares the gain of routing in the languages in which teachers disagree most with that in the others."""
    gains = {
        code: runs.scores("student_reward", of_language(code))
        - runs.scores("student_single", of_language(code))
        for code in lexicon.LANGUAGES
    }
    by_seed = {}
    for seed, spread in runs.disagreement().items():
        if any(seed not in gain.dropna().index for gain in gains.values()):
            continue
        order = sorted(spread, key=lambda code, spread=spread: -spread[code])
        most, least = order[:_DISAGREEING], order[_DISAGREEING:]
        means = [np.mean([gains[code][seed] for code in some]) for some in (most, least)]
        by_seed[seed] = float(means[0] - means[1])
    what = f"gain of routing by reward over the best single teacher, {_DISAGREEING} languages of most disagreement less the others"
    unmet = runs.untaught() or runs.unmet(S, "student_reward", "student_single")
    if not by_seed:
        return []
    return [Effect(where=where, what=what, by_seed=by_seed, above=0.0, unmet=unmet)]


def falls_with_noise(runs: Runs, where: str) -> list[Effect]:
    """Compares the chosen answers under a reward without noise, with much, and with hardly anything else."""
    qualities, uniform = runs.pool("by_noise"), runs.pool("uniform")
    if not qualities:
        return []
    clean, some, noisy = (str(NOISES[i]) for i in (0, -2, -1))
    routings = runs.pool("routings")
    over = {
        noise: np.mean([one[noise] for one in qualities.values()])
        - np.mean([np.mean(list(one["fixed"].values())) for one in routings.values()])
        for noise in map(str, NOISES)
    }
    note = "less fixed routing: " + ", ".join(f"noise {n} {gap:+.3f}" for n, gap in over.items())
    settings: dict[str, Any] = {"where": where, "unmet": runs.untaught()}
    return [
        Effect(
            what=f"score of the chosen answers, reward without noise less with {some}",
            by_seed={seed: one[clean] - one[some] for seed, one in qualities.items()},
            above=0.0,
            note=note,
            **settings,
        ),
        Effect(
            what=f"score of the chosen answers, noise of {noisy} less a uniform choice",
            by_seed={seed: one[noisy] - uniform[seed] for seed, one in qualities.items()},
            above=-0.03,
            below=0.03,
            **settings,
        ),
    ]


def over_optimised(runs: Runs, where: str) -> list[Effect]:
    """Compares the reward and the score of the last rounds with those of the third."""
    reward = runs.gain(where, REWARD, _LAST, _THIRD)
    score = runs.gain(where, S, _LAST, _THIRD, above=-np.inf, below=0.01)
    return [*reward, *score]


def wins_everywhere(runs: Runs, where: str) -> list[Effect]:
    """Measures the win rate of the recipe's last model in its worst language."""
    rates = runs.scores("merged_online", WORST_WINS)
    if rates.empty:
        return []
    by_seed = {int(seed): float(rate) for seed, rate in rates.items()}
    what = "win rate of the last merge against the best single teacher's student, worst language"
    unmet = runs.unmet(S, "merged_online", "student_single")
    return [Effect(where=where, what=what, by_seed=by_seed, above=0.5, unmet=unmet)]


def smallest_gain(runs: Runs, where: str) -> list[Effect]:
    """Measures the smallest gain of a stage over the one before it."""
    every = {arm: runs.scores(arm, S) for arm in STAGES}
    seeds = set.intersection(*(set(scores.index) for scores in every.values()))
    arms = list(STAGES)
    gains = {
        seed: [every[b][seed] - every[a][seed] for a, b in zip(arms, arms[1:], strict=False)]
        for seed in sorted(seeds)
    }
    if not gains:
        return []
    means = np.mean(list(gains.values()), axis=0)
    named = zip(list(STAGES.values())[1:], means, strict=True)
    return [
        Effect(
            where=where,
            what="score, smallest gain of a stage over the one before it",
            by_seed={int(seed): float(min(some)) for seed, some in gains.items()},
            above=-SAME,
            note=", ".join(f"{name} {gain:+.3f}" for name, gain in named),
            unmet=runs.unmet(S, *arms),
        )
    ]


def harmful_collides(runs: Runs, where: str) -> list[Effect]:
    """Compares what leaving out the harmful expert gains with the most that leaving out another does."""
    gains = {seed: one["gains"] for seed, one in runs.searches().items()}
    by_seed = {
        seed: some[HARMFUL] - max(gain for i, gain in enumerate(some) if i != HARMFUL)
        for seed, some in gains.items()
    }
    what = "lower loss without the harmful expert, less the most that leaving out another gains"
    if not by_seed:
        return []
    return [Effect(where=where, what=what, by_seed=by_seed, above=0.0, unit="nats per token")]


def minimum_costs(runs: Runs, where: str) -> list[Effect]:
    """Measures what weights chosen by the worst language lose in the mean, against those chosen by the mean."""
    by_seed = {}
    for seed, one in runs.searches().items():
        trials = np.array(one["trials"])
        by_mean, by_worst = trials[trials[:, 0].argmin()], trials[trials[:, 1].argmin()]
        by_seed[seed] = float(100 * (by_worst[0] / by_mean[0] - 1))
    what = "mean loss of the weights with the best worst language, above that of the best mean"
    return [Effect(where=where, what=what, by_seed=by_seed, below=5.0, unit="%")] if by_seed else []


def _pairs(*pairs: tuple[str, str], score: str = S, **settings: Any) -> Any:
    return compare(score, *pairs, **settings)


CLAIMS: Sequence[Claim] = (
    _PROSE.claim(
        "X1",
        {"small": [routed(("reward", "fixed"), ("fixed", "learned"), above=-SAME)]},
        required=True,
    ),
    _PROSE.claim(
        "X2",
        {
            "small": [
                routed(("learned", "random"), above=0.01),
                routed(("random", "translated"), ("single", "translated")),
            ]
        },
        required=True,
    ),
    _PROSE.claim("X3", {"small": [where_they_disagree]}, required=True),
    _PROSE.claim("X4", {"small": [routed(("reward", "single"), above=SAME)]}),
    _PROSE.claim(
        "X5", {"small": [falls_with_noise]}, required=True, noise=NOISES[-2], most_noise=NOISES[-1]
    ),
    _PROSE.claim("X6", {"small": [wins_everywhere]}),
    _PROSE.claim(
        "X7",
        {
            "small": [
                _pairs(
                    ("offline_languages7", "offline_languages1"),
                    ("offline_languages3", "offline_languages1"),
                ),
                _pairs(("offline_languages3", "offline_languages1"), score=UNSEEN_SCORE),
            ]
        },
    ),
    _PROSE.claim("X8", {"small": [_pairs((_THIRD, "offline_long"), (_THIRD, "online4"))]}),
    _PROSE.claim("X9", {"small": [over_optimised]}),
    _PROSE.claim(
        "X10", {"small": [_pairs(("offline_beta03", "offline_beta001"), score=DIVERGENCE)]}
    ),
    _PROSE.claim("X11", {"small": [_pairs(("native", "student_translated"), score=ARTEFACTS)]}),
    _PROSE.claim(
        "X12",
        {
            "small": [
                _pairs(
                    ("merged", "student_reward"),
                    ("merged_offline", "offline"),
                    ("merged_online", "round1"),
                    above=-SAME,
                )
            ]
        },
    ),
    _PROSE.claim("X13", {"small": [smallest_gain]}),
    _PROSE.claim(
        "X14", {"small": [harmful_collides, _pairs(("six_searched", "six_uniform"))]}, required=True
    ),
    _PROSE.claim(
        "X15",
        {
            "small": [
                _pairs(("six_searched", "six_spherical"), ("six_searched", "six_ties"), above=-SAME)
            ]
        },
    ),
    _PROSE.claim(
        "X16", {"small": [_pairs(("polish_tenth", "merged"), ("polish_tenth", "polish_full"))]}
    ),
    _PROSE.claim("X17", {"small": [minimum_costs]}),
)


# Of the stored measurement; goes with the next one.
_SCORES = (S, WORST, WINS, WORST_WINS, ARTEFACTS, DIVERGENCE, REWARD)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("small")
    amount = f" {runs.amount()}." if runs else ""
    text = _PROSE("method", amount=amount, small_pool=small_pool, small_stage=small_stage)
    missing = runs.missing(list(experiment.get_config().arms), runs.seeds) if runs else []
    return [text, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("small")
    if not runs:
        return []
    shown = [arm for arm in runs.arms if runs.values(arm, S).size]
    every = [(runs.title(arm), *runs.cells(arm, _SCORES)) for arm in shown]
    codes = lexicon.LANGUAGES
    by_language = [
        (runs.title(arm), *runs.cells(arm, [of_language(code) for code in codes])) for arm in shown
    ]
    return [
        *page.table(("arm", *_SCORES), every, "All arms"),
        *page.table(("arm", *codes), by_language, "Scores by language"),
    ]


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with arms, teachers, noises and models of the search exchanged at random."""
    rows = measured.get("small", [])
    answered = [row for row in rows if (row.get("evaluations") or {}).get("answers")]
    # Rewards and divergences are exchanged among the arms that have them.
    answered = claim.shuffle_arms({"small": answered}, rng)["small"]
    answered = [_sides_exchanged(row, rng) for row in answered]
    other = [
        _exchanged(row, rng) for row in rows if not (row.get("evaluations") or {}).get("answers")
    ]
    return {"small": [*answered, *other]} if rows else {}


def _sides_exchanged(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns a row with wins and losses exchanged in about half of the languages."""
    if not row.get("wins"):
        return dict(row)
    wins = {
        code: {**one, "win": one["loss"], "loss": one["win"]} if rng.random() < 0.5 else one
        for code, one in row["wins"].items()
    }
    return {**row, "wins": wins}


def _exchanged(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    out = dict(row)
    if row.get("qualities"):
        mixed = dict(row["qualities"])
        # Together with the uniform choice, which is one of the values that noise is compared with.
        noises = {**mixed["by_noise"], "uniform": mixed["uniform"]}
        noises = claim.exchanged(noises, rng)
        mixed["uniform"] = noises.pop("uniform")
        mixed["by_noise"] = noises
        for key in ("teachers", "routings"):
            mixed[key] = {name: claim.exchanged(one, rng) for name, one in mixed[key].items()}
        out["qualities"] = mixed
    if row.get("search"):
        search = dict(row["search"])
        search["gains"] = rng.permutation(search["gains"]).tolist()
        worst = rng.permutation([trial[1] for trial in search["trials"]]).tolist()
        search["trials"] = [[t[0], w] for t, w in zip(search["trials"], worst, strict=True)]
        out["search"] = search
    return out


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {"small": Runs(measured["small"])} if measured.get("small") else {}


REPORT = page.Report(
    slug="aya_expanse",
    title="Aya Expanse: the claims of its recipe on small models",
    source="[Aya Expanse: Combining Research Breakthroughs for a New Multilingual Frontier, arXiv 2412.04261]"
    "(https://arxiv.org/abs/2412.04261)",
    claims=CLAIMS,
    places=PLACES,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
)
