"""The claims of the paper, and of the estimator, and how each is measured. Margins were written down before the runs.

Rankings of documents are of scores over the norms of the documents' gradients, as the paper's second ranking; masses per nat
and retraining use scores as they are. Multipliers are shares at an end of a ranking over shares in the corpus.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.influence.small_corpus import FACT, PROCEDURES
from launch.papers.influence import statistics
from launch.papers.influence.arms import GROUPS, METHODS, Seeds
from launch.papers.shared.claim import Claim, Effect, Measure, RequiredClaim

EXACT, CORPUS = "exact", "corpus"
PLACES = {EXACT: "tiny models", CORPUS: "small corpus"}
FOUND, NOT_FOUND = 0.5, 0.25  # of queries, whose answer is in a top document
ALIKE = 0.97  # correlation of Gauss-Newton scores with Bregman responses
BETTER = 0.02  # correlation by which EK-FAC is ahead of the dot product there
NEAR, SOLVED = 0.85, 0.99  # correlation of EK-FAC's, and of EK-FAC + CG's, scores with exact ones
CHANCE = 0.1  # linear datamodeling score of random scores

Record = Mapping[str, Any]


def _effect(where: str, what: str, by_seed: Mapping[int, float], **settings: Any) -> list[Effect]:
    return [Effect(where=where, what=what, by_seed=by_seed, **settings)] if by_seed else []


def scores(
    seeds: Seeds,
    where: str,
    *,
    what: str,
    value: Callable[[Record], float],
    groups: Sequence[str] = (),
    **settings: Any,
) -> list[Effect]:
    """Measures a number of the scores; `groups` are those whose queries the models must complete."""
    by_seed = seeds.scores(value)
    return _effect(where, what, by_seed, unmet=seeds.unmet(*groups), **settings)


def losses(
    seeds: Seeds, where: str, *, what: str, value: Callable[[Record], float], **settings: Any
) -> list[Effect]:
    """Measures a number of the retrained models."""
    by_seed = seeds.losses(value)
    unmet = seeds.unmet(FACT, *PROCEDURES)
    return _effect(where, what, by_seed, unmet=unmet, **settings)


def exact(
    rows: Sequence[Record],
    where: str,
    *,
    kind: str,
    method: str,
    than: str | None = None,
    **settings: Any,
) -> list[Effect]:
    """Measures a correlation of a method in the tiny models, or how much it is ahead of another method's."""
    words = {"pbrf": "Bregman responses", "with_gauss_newton": "Gauss-Newton scores"}
    ahead = f", less the {METHODS[than]}'s" if than else ""
    by_seed = {
        int(row["seed"]): row[kind][method] - (row[kind][than] if than else 0.0) for row in rows
    }
    what = f"correlation of {METHODS[method]} with {words[kind]}{ahead}"
    return _effect(where, what, by_seed, **settings)


def lds_gap(method: str, other: str) -> Measure:
    """Returns the measure of how much a method's linear datamodeling score is above another's."""
    return functools.partial(
        losses,
        what=f"linear datamodeling score, {METHODS[method]} less {METHODS[other]}",
        value=lambda record: record["lds"][method]["all"] - record["lds"][other]["all"],
        above=0.0,
    )


def removal(method: str, other: str, what: str) -> Measure:
    """Returns the measure of how much more a group's loss rises without a method's top documents than another's."""
    return functools.partial(
        losses,
        what=f"rise of the loss of {GROUPS[what]}, without the top of {METHODS[method]} less that of {METHODS[other]}",
        value=lambda record: record["removal"][what][method] - record["removal"][what][other],
        above=0.0,
        unit="nats",
    )


def pairs_gap(one: str, other: str, method: str = "ekfac") -> Measure:
    """Returns the measure of how much higher the correlations of one kind of pairs are than of another."""

    def value(record: Record) -> float:
        found = record["methods"][method]["correlations"]
        return found[one] - found[other]

    return functools.partial(
        scores,
        what=f"correlation of influences of two queries, {one} less {other}",
        value=value,
        above=0.0,
        groups=(FACT, *PROCEDURES),
    )


def answers(group: str, method: str = "ekfac", **bounds: float) -> Measure:
    """Returns the measure of the share of queries whose answer is in one of the top documents."""
    return functools.partial(
        scores,
        what=f"share of queries of {GROUPS[group]} whose answer is in the top {statistics.TOP}, {METHODS[method]}",
        value=lambda record: record["methods"][method]["answers"][group]["top"],
        groups=(group,),
        **bounds,
    )


def separates(procedure: str, method: str = "ekfac", than: str | None = None) -> Measure:
    """Returns the measure of how many more own worked examples than the other procedure's are on top."""

    def value(record: Record) -> float:
        own = statistics.own_share(record["methods"][method], procedure)
        return own - (statistics.own_share(record["methods"][than], procedure) if than else 0.0)

    ahead = f", {METHODS[method]} less {METHODS[than]}" if than else f", {METHODS[method]}"
    return functools.partial(
        scores,
        what=f"multiplier of own worked examples less the other's in the top {statistics.TOP} of {GROUPS[procedure]}{ahead}",
        value=value,
        above=0.0,
        groups=(procedure,),
        digits=2,
    )


def code(
    group: str, end: str, *, above: float | None = None, below: float | None = None
) -> Measure:
    """Returns the measure of the multiplier of code at an end of a group's ranking."""
    bounds = {name: x for name, x in (("above", above), ("below", below)) if x is not None}
    return functools.partial(
        scores,
        what=f"multiplier of code in the {end} {statistics.SHARE:.0%} of {GROUPS[group]}",
        value=lambda record: statistics.code_share(record["methods"]["ekfac"], group, end),
        groups=(group,),
        digits=2,
        **bounds,
    )


def mass_gap(procedure: str) -> Measure:
    """Returns the measure of how much more influence per nat the top documents of facts have."""

    def value(record: Record) -> float:
        masses = record["masses"]["ekfac"]
        return masses[FACT]["mass"] - masses[procedure]["mass"]

    return functools.partial(
        scores,
        what=f"log of the influence per nat of the top {statistics.SHARE:.0%}, facts less {GROUPS[procedure]}",
        value=value,
        above=0.0,
        groups=(FACT, procedure),
        digits=2,
    )


def random_lds(seeds: Seeds, where: str) -> list[Effect]:
    """Measures the linear datamodeling score of random scores, a check of the measure."""
    what = "linear datamodeling score of random scores"
    return losses(
        seeds,
        where,
        what=what,
        value=lambda record: record["lds"]["random"]["all"],
        above=-CHANCE,
        below=CHANCE,
    )


def _here(*measures: Measure) -> dict[str, Sequence[Measure]]:
    return {CORPUS: measures}


def _tiny(*settings: Mapping[str, Any]) -> dict[str, Sequence[Measure]]:
    return {EXACT: [functools.partial(exact, **one) for one in settings]}


CLAIMS = (
    RequiredClaim(
        "V1",
        "Influence by the exact Gauss-Newton matrix is the proximal Bregman response",
        f"mean correlation over documents above {ALIKE}",
        _tiny({"kind": "pbrf", "method": "gauss_newton", "above": ALIKE}),
    ),
    RequiredClaim(
        "V2",
        "EK-FAC tracks it better than the dot product, and is near the exact matrix",
        f"correlation with Bregman responses more than {BETTER} above the dot product's; with Gauss-Newton scores above {NEAR}",
        _tiny(
            {"kind": "pbrf", "method": "ekfac", "than": "identity", "above": BETTER},
            {"kind": "with_gauss_newton", "method": "ekfac", "above": NEAR},
        ),
        paper="Grosse et al.: clearly better, shown as plots",
    ),
    RequiredClaim(
        "V3",
        "Conjugate gradients on all documents give the exact scores",
        f"correlation with Gauss-Newton scores above {SOLVED}",
        _tiny({"kind": "with_gauss_newton", "method": "ekfac_cg", "above": SOLVED}),
    ),
    RequiredClaim(
        "I1",
        "Documents influence queries of the same procedure alike",
        "EK-FAC: the mean correlation of the influences of two queries of one procedure is higher than that of queries of two "
        "procedures, and than that of two facts",
        _here(
            pairs_gap("same procedure", "two procedures"),
            pairs_gap("same procedure", "facts"),
        ),
        paper="positive within a task, p < 4e-8, up to 0.96; facts 0.06 (7B) and 0.03 (35B) in the mean",
    ),
    RequiredClaim(
        "I2",
        "Single documents matter more for facts than for procedures",
        f"EK-FAC: the positive influence of the top {statistics.SHARE:.0%} over the nats of the completion is larger for facts "
        "than for each procedure",
        _here(*map(mass_gap, PROCEDURES)),
        paper="less influence per nat for reasoning, at any part of the ranking",
    ),
    RequiredClaim(
        "I3",
        "Answers of facts are in the top documents, answers of procedures are not",
        f"EK-FAC: the answer is in the top {statistics.TOP} for more than {FOUND:.0%} of the facts and fewer than {NOT_FOUND:.0%} "
        "of the queries of each procedure",
        _here(
            answers(FACT, above=FOUND),
            *(answers(one, below=NOT_FOUND) for one in PROCEDURES),
        ),
        paper="of the facts answered correctly 55 % (7B) and 30 % (35B), of the reasoning queries 7.4 % and 0 %, in the top 500",
    ),
    RequiredClaim(
        "I4",
        "Documents that show a procedure are on top of the queries that need it",
        f"EK-FAC: own worked examples have a larger multiplier in the top {statistics.TOP} than the other procedure's",
        _here(*map(separates, PROCEDURES)),
        paper="16 and 20 of 20 queries of slopes have a document with the procedure in their top 100",
    ),
    Claim(
        "I5",
        "The dot product separates procedures less",
        "the difference of I4 is larger by EK-FAC than by the dot product",
        _here(*(separates(one, than="identity") for one in PROCEDURES)),
    ),
    Claim(
        "I6",
        "Code is over-represented on top of reasoning, not of facts",
        f"EK-FAC: the multiplier of the procedure's own code in the top {statistics.SHARE:.0%} is above 1 for each procedure, "
        "and that of all code below 1 for facts",
        _here(
            *(code(one, "top", above=1.0) for one in PROCEDURES),
            code(FACT, "top", below=1.0),
        ),
        paper="about 2 for reasoning and 0.5 for facts, at 5,000 to 50,000 of 5 million",
    ),
    Claim(
        "I7",
        "and at the bottom too",
        f"EK-FAC: the multiplier of the procedure's own code in the bottom {statistics.SHARE:.0%} is above 1",
        _here(*(code(one, "bottom", above=1.0) for one in PROCEDURES)),
        paper="code is over-represented at both ends of the reasoning ranking",
    ),
    RequiredClaim(
        "I8",
        "EK-FAC predicts retraining better than the dot product and BM25",
        "its linear datamodeling score over halves of the corpus is higher",
        _here(lds_gap("ekfac", "identity"), lds_gap("ekfac", "bm25")),
        paper="not of the paper; bergson's GPT-2: EK-FAC 0.454, BM25 0.220",
    ),
    Claim(
        "I9",
        "and conjugate gradients predict it better still",
        "the linear datamodeling score of EK-FAC + CG is higher than EK-FAC's",
        _here(lds_gap("ekfac_cg", "ekfac")),
        paper="not of the paper; bergson's GPT-2: 0.685 against 0.454",
    ),
    RequiredClaim(
        "I10",
        "Facts are lost with their top documents",
        f"without the top {statistics.SHARE:.0%} of EK-FAC for facts, their loss is higher than without random documents",
        _here(removal("ekfac", "random", FACT)),
        paper="perplexity of a fine-tuned GPT-2 on WikiText-2 without 50 to 300 documents: 22.5 to 23.1 against 22.1 to 22.2",
    ),
    Claim(
        "I11",
        "and so are procedures",
        f"without the top {statistics.SHARE:.0%} of EK-FAC for procedures, their loss is higher than without random documents, "
        "and than without the top of the dot product",
        _here(
            removal("ekfac", "random", "procedure"),
            removal("ekfac", "identity", "procedure"),
        ),
    ),
    Claim(
        "I12",
        "Shared words do not suffice for procedures",
        "without the top documents of EK-FAC for procedures, their loss is higher than without those of BM25; for facts a tie is "
        "expected, and the difference is in the tables",
        _here(removal("ekfac", "bm25", "procedure")),
        paper="not of the paper; bergson's GPT-2: intervals of EK-FAC and BM25 overlap",
    ),
    RequiredClaim(
        "I13",
        "Random scores predict nothing (a check of the measure, not a claim of the paper)",
        f"their linear datamodeling score is between -{CHANCE} and {CHANCE}",
        _here(random_lds),
    ),
)
