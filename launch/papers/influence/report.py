"""The claims of the paper, and of the estimator, and how each is measured, with the page. Margins were written down before the runs.

Rankings of documents are of scores over the norms of the documents' gradients, as the paper's second ranking; masses per nat
and retraining use scores as they are. Multipliers are shares at an end of a ranking over shares in the corpus.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from espalier.launch.papers.influence import (
    experiment,
    figures,
    page_tables,
    scoring,
    small_corpus,
    statistics,
)
from espalier.launch.papers.influence.experiment import (
    GROUPS,
    HALVES,
    METHODS,
    REMOVALS,
    SCORED,
    WIDE_SCORED,
    WORDS,
    Runs,
)
from espalier.launch.papers.influence.small_corpus import FACT, PROCEDURES
from espalier.launch.papers.influence.statistics import CODE, OTHER_WORDS, SAME_WORDS
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Effect, Measure, Planned
from espalier.launch.papers.shared.page import Prose

_PROSE = Prose.of(__name__)

EXACT, CORPUS = "exact", "corpus"
PLACES = {EXACT: "tiny models", CORPUS: "small corpus"}
MORE = 0.3  # by which the share of facts whose answer is on top is larger: the smaller one of the paper's two differences
ALIKE = 0.97  # correlation of Gauss-Newton scores with Bregman responses
BETTER = 0.1  # correlation with Gauss-Newton scores by which EK-FAC is ahead of the dot product
_TWICE = 0.69  # logarithm of the paper's multiplier of code, 2
ALIKE_MORE = 0.01  # correlation by which queries of one procedure are more alike; counts of digits alone give 0.004
_LOOKS = (5, 8)  # where twelve seeds would cost hours
_BEFORE = "seeds 10 to 14 of the round before"
_PILOT = "pilot, seed 0 with other second names, which shared letters with the first ones"

Record = Mapping[str, Any]


def number(
    what: str,
    *plus: str,
    less: Sequence[str] = (),
    arm: str = SCORED,
    log: bool = False,
    scale: float = 1.0,
    **settings: Any,
) -> Measure:
    """Returns the measure of a mean of numbers of an arm's record, minus the mean of others.

    Args:
      what: the number in words.
      *plus: paths of the numbers.
      less: paths of those that are subtracted.
      arm: of the runs; its model, or for retrained models that which they start like, must complete the queries.
      log: whether to take logarithms first, of multipliers of at least statistics.LEAST.
      scale: a factor.
      **settings: further fields of Effect.
    """
    model = WIDE_SCORED if arm == WIDE_SCORED else SCORED

    def measure(runs: Runs, where: str) -> list[Effect]:
        def mean(paths: Sequence[str]) -> pd.Series:
            found = pd.concat([runs.scores(arm, path) for path in paths], axis=1, join="inner")
            return scale * (np.log(found.clip(lower=statistics.LEAST)) if log else found).mean(
                axis=1
            )

        both = [mean(paths) for paths in (plus, less) if paths]
        values = (both[0] - both[1] if less else both[0]).dropna().sort_index()
        if values.empty:
            return []
        reasons = {seed: runs.degenerate(row) for seed, row in runs.find(model).items()}
        unmet = "; ".join(f"seed {seed}: {reason}" for seed, reason in reasons.items() if reason)
        digits = settings.get("digits", 3)
        note = " minus ".join(f"{one.mean():.{digits}f}" for one in both) if less else ""
        by_seed = {int(seed): float(value) for seed, value in values.items()}
        return [Effect(where=where, what=what, by_seed=by_seed, note=note, unmet=unmet, **settings)]

    return measure


def exact(kind: str, method: str, than: str | None = None) -> Measure:
    """Returns the measure of a correlation of a method in the tiny models, or how much it is ahead of another method's."""
    words = {"pbrf": "Bregman responses", "with_gauss_newton": "Gauss-Newton scores"}
    ahead = f", minus the {METHODS[than]}'s" if than else ""
    what = f"correlation of {METHODS[method]} with {words[kind]}{ahead}"

    def measure(rows: Sequence[Record], where: str) -> list[Effect]:
        by_seed = {
            int(row["seed"]): row[kind][method] - (row[kind][than] if than else 0.0) for row in rows
        }
        return [Effect(where=where, what=what, by_seed=by_seed)] if by_seed else []

    return measure


def _wide(arm: str) -> str:
    return f", width {experiment.WIDE}" if arm == WIDE_SCORED else ""


def pairs_gap(one: str, other: str, method: str = "ekfac") -> Measure:
    """Returns the measure of how much higher the correlations of one kind of pairs are than of another."""
    paths = [f"methods/{method}/correlations/{pairs}" for pairs in (one, other)]
    what = f"correlation of influences of two queries, {one} minus {other}, {METHODS[method]}"
    return number(what, paths[0], less=paths[1:])


def mass_gap(*procedures: str) -> Measure:
    """Returns the measure of how much more influence per nat the top documents of facts have."""
    named = " and ".join(GROUPS[one] for one in procedures)
    what = f"log of the influence per nat of the top {statistics.SHARE:.0%}, facts minus {named}"
    paths = [f"masses/ekfac/{group}/mass" for group in (FACT, *procedures)]
    return number(what, paths[0], less=paths[1:], digits=2)


def answers(*groups: str, method: str = "ekfac", arm: str = SCORED) -> Measure:
    """Returns the measure of the share of queries whose answer is in one of the top documents, of the mean of groups."""
    named = " and ".join(GROUPS[group] for group in groups)
    what = f"share of queries of {named} whose answer is in the top {statistics.TOP}, {METHODS[method]}"
    paths = [f"methods/{method}/answers/{group}/top" for group in groups]
    return number(what + _wide(arm), *paths, arm=arm)


def answers_gap(method: str = "ekfac", arm: str = SCORED, **settings: Any) -> Measure:
    """Returns the measure of how much larger that share is for facts than for procedures."""
    what = f"share of queries whose answer is in the top {statistics.TOP}, facts minus procedures, {METHODS[method]}"
    paths = [f"methods/{method}/answers/{group}/top" for group in small_corpus.GROUPS]
    return number(what + _wide(arm), paths[0], less=paths[1:], arm=arm, **settings)


def separates(
    method: str = "ekfac",
    kind: str = OTHER_WORDS,
    sources: Sequence[str] = tuple(WORDS),
    than: str | None = None,
    arm: str = SCORED,
) -> Measure:
    """Returns the measure of how well scores tell the documents of a query's procedure from the other's."""
    named = (
        ""
        if len(sources) == len(WORDS)
        else f" of queries {' and '.join(WORDS[x] for x in sources)}"
    )
    ahead = f" minus {METHODS[than]}" if than else ""
    what = f"area under the curve, own documents against the other procedure's, {kind}{named}, {METHODS[method]}{ahead}"
    paths = [[f"methods/{m}/separation/{kind}/{x}" for x in sources] for m in (method, than)]
    return number(what + _wide(arm), *paths[0], less=paths[1] if than else (), arm=arm)


def code(end: str, *groups: str, method: str = "ekfac") -> Measure:
    """Returns the measure of the logarithm of the multiplier of all code at an end of the ranking, the mean of groups."""
    named = " and ".join(GROUPS[group] for group in groups)
    what = f"log of the multiplier of code in the {end} {statistics.SHARE:.0%} of {named}, {METHODS[method]}"
    paths = [f"methods/{method}/code/{group}/{end}/share" for group in groups]
    return number(what, *paths, log=True, digits=2)


def lds_gap(method: str, other: str) -> Measure:
    """Returns the measure of how much a method's linear datamodeling score is above another's."""
    what = f"linear datamodeling score, {METHODS[method]} minus {METHODS[other]}"
    return number(what, f"lds/{method}/all", less=[f"lds/{other}/all"], arm=HALVES)


def removal(what: str, method: str) -> Measure:
    """Returns the measure of the log ratio of losses without a method's top documents and without random ones."""
    words = f"log ratio of the losses of {figures.REMOVED[what]}, without the top of {METHODS[method]} divided by without random ones of the same kind"
    return number(words, f"removal/{what}/{method}", arm=REMOVALS)


_OTHER_PAIRS = ("one procedure, other words", "two procedures, other words")
_BESIDE = ("ekfac_cg", "identity", "bm25", "bm25_characters", "embedding")

CLAIMS = (
    _PROSE.claim(
        "V1",
        EXACT,
        exact("pbrf", "gauss_newton"),
        above=ALIKE,
        looks=_LOOKS,
        planned=Planned(sd=0.0032, expected=0.995, source="seeds 15 to 19 of the round before"),
        required=True,
        control=True,
    ),
    _PROSE.claim(
        "V2",
        EXACT,
        exact("with_gauss_newton", "ekfac", "identity"),
        above=BETTER,
        planned=Planned(sd=0.103, expected=0.23, source="seeds 15 to 19 of the round before"),
        required=True,
        secondary={
            EXACT: [
                exact("with_gauss_newton", "ekfac"),
                exact("pbrf", "ekfac", "identity"),
                exact("pbrf", "ekfac"),
            ]
        },
    ),
    _PROSE.claim(
        "I1",
        CORPUS,
        pairs_gap(*_OTHER_PAIRS),
        above=ALIKE_MORE,
        looks=_LOOKS,
        planned=Planned(
            sd=0.0055, expected=0.026, source=f"{_PILOT}; deviation of {_BEFORE}, same words"
        ),
        required=True,
        secondary={
            CORPUS: [
                *(pairs_gap(*_OTHER_PAIRS, method) for method in _BESIDE),
                pairs_gap("one procedure", "two procedures"),
                pairs_gap("one procedure", "facts"),
            ]
        },
    ),
    _PROSE.claim(
        "I2",
        CORPUS,
        mass_gap(*PROCEDURES),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(
            sd=0.5,
            expected=1.0,
            source=f"{_BEFORE}: 1.87 with a deviation of 0.31, where nats below 0.1 counted as 0.1, or 1.03 with the procedures' "
            "mean nats; a larger deviation, since facts were not pooled",
        ),
        required=True,
        secondary={CORPUS: [mass_gap(one) for one in PROCEDURES]},
    ),
    _PROSE.claim(
        "I3",
        CORPUS,
        answers_gap(),
        above=MORE,
        looks=_LOOKS,
        planned=Planned(
            sd=0.068,
            expected=0.85,
            source=f"{_BEFORE}, where numbers that documents work on counted as answers too",
        ),
        required=True,
        secondary={
            CORPUS: [
                *(answers(group) for group in small_corpus.GROUPS),
                answers_gap(arm=WIDE_SCORED),
                answers(FACT, arm=WIDE_SCORED),
                answers(*PROCEDURES, arm=WIDE_SCORED),
                *(answers_gap(method) for method in ("ekfac_cg", "bm25", "random")),
            ]
        },
    ),
    _PROSE.claim(
        "I4",
        CORPUS,
        separates(than="bm25_characters"),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(
            sd=0.0143,
            expected=0.03,
            source=f"{_PILOT}: 0.53 without a baseline, so that the effect is a guess; deviation of its four kinds of queries, "
            "since there was one seed",
        ),
        required=True,
        secondary={
            CORPUS: [
                separates(),
                *(separates(sources=[one]) for one in WORDS),
                *(separates(method) for method in _BESIDE),
                separates(than="bm25"),
                separates(than="bm25_characters", arm=WIDE_SCORED),
                separates(kind=CODE),
                separates(kind=SAME_WORDS),
            ]
        },
    ),
    _PROSE.claim(
        "I6",
        CORPUS,
        code("top", *PROCEDURES),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(sd=0.42, expected=_TWICE, source=f"{_BEFORE}; the paper's multiplier"),
        secondary={
            CORPUS: [
                *(code("top", one) for one in PROCEDURES),
                code("top", FACT),
                *(
                    code("top", *PROCEDURES, method=method)
                    for method in ("ekfac_cg", "bm25", "bm25_characters")
                ),
            ]
        },
    ),
    _PROSE.claim(
        "I7",
        CORPUS,
        code("bottom", *PROCEDURES),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(sd=0.395, expected=_TWICE, source=f"{_BEFORE}; the paper's multiplier"),
        secondary={CORPUS: [*(code("bottom", one) for one in PROCEDURES), code("bottom", FACT)]},
    ),
    _PROSE.claim(
        "I8",
        CORPUS,
        lds_gap("ekfac", "identity"),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(sd=0.0364, expected=0.089, source=f"{_BEFORE}, 32 halves"),
        required=True,
        control=True,
        secondary={CORPUS: [lds_gap("ekfac", other) for other in ("bm25", "trak", "embedding")]},
    ),
    _PROSE.claim(
        "I9",
        CORPUS,
        lds_gap("ekfac_cg", "ekfac"),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(sd=0.0308, expected=0.105, source=f"{_BEFORE}, 32 halves"),
        control=True,
    ),
    _PROSE.claim(
        "I10",
        CORPUS,
        removal("fact", "ekfac_cg"),
        facts=scoring.REMOVED_FOR["fact"].share,
        above=0.0,
        looks=_LOOKS,
        planned=Planned(
            sd=0.224,
            expected=0.345,
            source=f"{_BEFORE}, a tenth fewer documents, against random documents of all sources",
        ),
        required=True,
        secondary={CORPUS: [removal("fact", "ekfac")]},
    ),
    _PROSE.claim(
        "I11",
        CORPUS,
        removal("procedure", "ekfac_cg"),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(
            sd=0.0279,
            expected=0.0433,
            source=f"{_BEFORE}, a fifth as many documents, against random documents of all sources",
        ),
        secondary={CORPUS: [removal("procedure", "ekfac")]},
    ),
    _PROSE.claim(
        "I12",
        CORPUS,
        removal("other_words", "ekfac_cg"),
        above=0.0,
        looks=_LOOKS,
        planned=Planned(
            sd=0.028,
            expected=0.073,
            source=f"{_PILOT}, against random documents of all sources; deviation of I11 in the round before",
        ),
        secondary={CORPUS: [removal("other_words", "ekfac")]},
    ),
)

HEADLINE = page.Headline(
    claim="I3",
    what="queries whose answer is in one of the first documents, facts minus procedures (the paper: 7B; 35B 30 points)",
    unit="points",
    paper=47.6,
    measure=answers_gap(scale=100.0, digits=1),
    part=CORPUS,
    why=_PROSE("headline_why"),
    mind=_PROSE("headline_mind"),
)


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with methods, groups of queries, kinds of pairs and procedures exchanged at random in each seed."""
    out = dict(measured)
    if "exact" in measured:
        kinds = ("pbrf", "loo", "lds", "with_gauss_newton")
        out["exact"] = [
            {**row, **{kind: claim.exchanged(row[kind], rng) for kind in kinds}}
            for row in measured["exact"]
        ]
    if "corpus" in measured:
        out["corpus"] = [
            {**row, "record": row.get("record") and _shuffled(row["record"], rng)}
            for row in measured["corpus"]
        ]
    return out


def _shuffled(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    out = dict(record)
    if "methods" in record:
        out["methods"] = {m: _shuffled_method(one, rng) for m, one in record["methods"].items()}
        out["masses"] = {m: claim.exchanged(one, rng) for m, one in record["masses"].items()}
    if "lds" in record:
        out["lds"] = claim.exchanged(record["lds"], rng)
    if "removal" in record:
        # A method's models and those without random documents are exchanged: the logarithm of their ratio changes its sign.
        out["removal"] = {
            what: {m: x * rng.choice((-1, 1)) for m, x in claim.exchanged(one, rng).items()}
            for what, one in record["removal"].items()
        }
    return out


def _shuffled_method(one: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    def mirrored(areas: Mapping[str, float]) -> dict[str, float]:
        """Exchanges the two procedures' documents."""
        return {name: x if rng.random() < 0.5 else 1 - x for name, x in areas.items()}

    def inverse(end: Mapping[str, Any]) -> dict[str, Any]:
        """Exchanges code's multiplier with one that is as far on the other side of 1."""
        x = max(end["share"], statistics.LEAST)
        return {**end, "share": x if rng.random() < 0.5 else 1 / x}

    return {
        **one,
        "correlations": claim.exchanged(one["correlations"], rng),
        "answers": claim.exchanged(one["answers"], rng),
        "separation": {kind: mirrored(areas) for kind, areas in one["separation"].items()},
        "code": {
            group: {end: inverse(shown) for end, shown in ends.items()}
            for group, ends in one["code"].items()
        },
    }


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    out = {part: measured[part] for part in ("exact", "smollm") if measured.get(part)}
    return {**out, "corpus": Runs(measured["corpus"])} if measured.get("corpus") else out


REPORT = page.Report(
    slug="influence",
    title="Procedural knowledge: the paper's claims by EK-FAC influence in small models",
    source="[Procedural Knowledge in Pretraining Drives Reasoning in Large Language Models, arXiv "
    "2411.12580](https://arxiv.org/abs/2411.12580), with the method of [Grosse et al., arXiv "
    "2308.03296](https://arxiv.org/abs/2308.03296)",
    claims=CLAIMS,
    places=PLACES,
    read=_read,
    figures=figures.figures,
    setup=page_tables.setup,
    tables=page_tables.tables,
    shuffle=shuffle,
    headline=HEADLINE,
)
