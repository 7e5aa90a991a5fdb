"""The report of the reproduction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.aya_expanse import lexicon
from launch.papers.aya_expanse import claims, figures, small_pool, small_stage, small_sweep
from launch.papers.aya_expanse.arms import (
    ARTEFACTS,
    DIVERGENCE,
    REWARD,
    WINS,
    WORST,
    WORST_WINS,
    Runs,
    S,
    of_language,
)
from launch.papers.shared import claim, page

# Of the stored measurement; goes with the next one.
_CHANGED = (
    "Two arms have changed since they were measured: the merge by TIES (`six_ties`) took the base of the students in place of the joint "
    "model from which five of the six part, so that its scores say nothing about TIES; and the search compared losses in nats, where it "
    "now compares them with those of the best single model."
)
_SCORES = (S, WORST, WINS, WORST_WINS, ARTEFACTS, DIVERGENCE, REWARD)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("small")
    amount = f" {runs.amount()}." if runs else ""
    out = [
        "- *words*: days, months, numbers and names of languages are messages of Django with their translations, in English and in "
        "two languages each of three families. Requests are to translate two words, to add days or months, or to sort three names "
        f"(data/aya_expanse/lexicon.py); {small_stage.POOL} of each language for the pool, other ones held out.",
        "- *score* S: the share of places with the right concept, times the share of words in the right language, less 0.1 for each "
        f"further length of the reference. The *reward* is S with Gaussian noise of deviation {small_pool.DEVIATION:g}, a function "
        "of request and answer; the *judge* of win rates has independent noise of the same size. Ties are equal answers.",
        "- *models*: Cohere decoders of two layers of width 64. A base reads dictionary entries, calendars, sorted lists and messages "
        f"of Django and Sphinx; a teacher of each family is tuned for {small_sweep.TEACHER_STEPS} updates on its languages, English and a tenth of the "
        f"other requests; students start from the base and have {small_sweep.STUDENT_STEPS} updates. An expert parts from the student of routing by "
        f"reward, the joint one, after {small_sweep.SHARED_STEPS} updates, and reads the data of a family and English from there, as often as the joint one.{amount}",
        "- *preferences*: DPO; offline, the likelihood of the preferred answers is added with a weight of 1.",
        "- *translated*: an English answer, said word by word in the language, with 15 % of the words in the other language of the family.",
        f"- *rounds*: best against worst of 4 samples, {small_sweep.ONLINE_STEPS} updates each on {small_stage.ONLINE} requests of each language; the reference is the "
        "model that the round starts from. *six*: the three experts, the joint student, one that was tuned on answers of other requests, and a copy "
        f"of the first expert; weights by at most {small_stage.BUDGET} trials on requests apart.",
        "- *where it falls short*: models know a few hundred words; the judge is the exact score with noise, so that no judge prefers a "
        "style; teachers and students are of one size; the merge of a cluster has one run each, without checkpoints within a run. "
        + _CHANGED,
    ]
    missing = runs.missing(list(small_sweep.get_config().arms), runs.seeds) if runs else []
    return [*out, *page.missing(missing, tuple(claims.PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("small")
    if not runs:
        return []
    shown = [arm for arm in runs.arms if runs.values(arm, S).size]
    every = [(_name(runs, arm), *(_cell(runs, arm, score) for score in _SCORES)) for arm in shown]
    codes = lexicon.LANGUAGES
    by_language = [
        (_name(runs, arm), *(_cell(runs, arm, of_language(code)) for code in codes))
        for arm in shown
    ]
    return [
        *page.table(("arm", *_SCORES), every, "All arms"),
        *page.table(("arm", *codes), by_language, "Scores by language"),
    ]


def _name(runs: Runs, arm: str) -> str:
    return f"{runs.label(arm)} (`{arm}`)"


def _cell(runs: Runs, arm: str, score: str) -> str:
    values = runs.values(arm, score)
    return runs.mean(values, score) if values.size else ""


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
        noises = _permuted(noises, rng)
        mixed["uniform"] = noises.pop("uniform")
        mixed["by_noise"] = noises
        for key in ("teachers", "routings"):
            mixed[key] = {name: _permuted(one, rng) for name, one in mixed[key].items()}
        out["qualities"] = mixed
    if row.get("search"):
        search = dict(row["search"])
        search["gains"] = rng.permutation(search["gains"]).tolist()
        worst = rng.permutation([trial[1] for trial in search["trials"]]).tolist()
        search["trials"] = [[t[0], w] for t, w in zip(search["trials"], worst, strict=True)]
        out["search"] = search
    return out


def _permuted(values: Mapping[str, float], rng: np.random.Generator) -> dict[str, float]:
    order = rng.permutation(len(values))
    listed = list(values.values())
    return dict(zip(values, [listed[i] for i in order], strict=True))


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {"small": Runs(measured["small"])} if measured.get("small") else {}


REPORT = page.Report(
    slug="aya_expanse",
    title="Aya Expanse: the claims of its recipe on small models",
    source="[Aya Expanse: Combining Research Breakthroughs for a New Multilingual Frontier, arXiv 2412.04261]"
    "(https://arxiv.org/abs/2412.04261)",
    claims=claims.CLAIMS,
    places=claims.PLACES,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
)
