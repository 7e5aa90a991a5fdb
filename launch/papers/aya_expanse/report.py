"""The page of Aya Expanse and its headline; claims.py has the claims."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.aya_expanse import (
    experiment,
    figures,
    lexicon,
    scores,
    small_answers,
    small_pool,
    small_stage,
)
from espalier.launch.papers.aya_expanse.claims import CLAIMS, PLACES, points_won
from espalier.launch.papers.aya_expanse.experiment import SINGLE
from espalier.launch.papers.aya_expanse.scores import (
    ARTEFACTS,
    LOSS,
    REWARD,
    Runs,
    S,
    of_kind,
    of_language,
    won_against,
)
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.page import Prose

_PROSE = Prose.of(__name__)

_SCORES = (
    S,
    LOSS,
    *map(of_kind, lexicon.KINDS),
    won_against(SINGLE),
    ARTEFACTS,
    REWARD,
)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("small")
    amount = f" {runs.amount()}." if runs else ""
    known = {
        "scores": scores,
        "small_answers": small_answers,
        "small_pool": small_pool,
        "small_stage": small_stage,
    }
    text = _PROSE("method", amount=amount, **known)
    missing = runs.missing(list(experiment.get_config().arms), experiment.SEEDS[0]) if runs else []
    return [text, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("small")
    if not runs:
        return []
    shown = [arm for arm in runs.arms if runs.values(arm, S).size]
    every = [
        (runs.title(arm), str(len(runs.find(arm))), *runs.cells(arm, _SCORES)) for arm in shown
    ]
    codes = lexicon.LANGUAGES
    by_language = [
        (runs.title(arm), *runs.cells(arm, [of_language(code) for code in codes])) for arm in shown
    ]
    return [
        *page.table(("arm", "seeds", *_SCORES), every, "All arms"),
        *page.table(("arm", *codes), by_language, "Scores by language"),
    ]


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with arms, single teachers, and models of the search exchanged at random."""
    rows = measured.get("small", [])
    asked = [bool((row.get("evaluations") or {}).get("answers")) for row in rows]
    answered = [row for row, is_asked in zip(rows, asked, strict=True) if is_asked]
    # Rewards and divergences are exchanged among the arms that have them.
    answered = claim.shuffle_arms({"small": answered}, rng)["small"]
    places = iter([_exchanged_languages(row, rng) for row in answered])
    every = zip(rows, asked, strict=True)
    exchanged = [next(places) if is_asked else _exchanged(row, rng) for row, is_asked in every]
    return {"small": exchanged} if rows else {}


def _exchanged_languages(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns a row with its languages exchanged, and wins and losses in about half of the comparisons."""
    answers = dict(row["evaluations"]["answers"])
    answers["score"] = claim.exchanged(answers["score"], rng)
    wins = {
        arm: {**one} if rng.random() < 0.5 else {code: _turned(some) for code, some in one.items()}
        for arm, one in (row.get("wins") or {}).items()
    }
    return {**row, "evaluations": {**row["evaluations"], "answers": answers}, "wins": wins}


def _turned(shares: Mapping[str, float]) -> dict[str, float]:
    return {**shares, "win": shares["loss"], "loss": shares["win"]}


def _exchanged(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    out = dict(row)
    if row.get("search"):
        gains = rng.permutation(row["search"]["gains"]).tolist()
        out["search"] = {**row["search"], "gains": gains}
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
    headline=page.Headline(
        claim="X4",
        what="win rate against a third model, routing by reward minus the best single teacher",
        unit="points",
        paper=9.1,
        measure=points_won,
        part="small",
        why=_PROSE("why"),
        mind=_PROSE("mind"),
    ),
)
