"""The claims of the paper, and of the estimator, and how each is measured, with the page. Margins were written down before the runs.

Rankings of documents are of scores over the norms of the documents' gradients, as the paper's second ranking; masses per nat
and retraining use scores as they are. Multipliers are shares at an end of a ranking over shares in the corpus.
"""

import functools
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.influence import tables
from espalier.launch.papers.influence import (
    corpus,
    experiment,
    figures,
    scoring,
    small_corpus,
    statistics,
)
from espalier.launch.papers.influence import exact as tiny
from espalier.launch.papers.influence.experiment import GROUPS, METHODS, Seeds
from espalier.launch.papers.influence.small_corpus import FACT, PROCEDURES
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import intervals

_PROSE = Prose.of(__name__)

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
    _PROSE.claim(
        "V1", _tiny({"kind": "pbrf", "method": "gauss_newton", "above": ALIKE}), required=True
    ),
    _PROSE.claim(
        "V2",
        _tiny(
            {"kind": "pbrf", "method": "ekfac", "than": "identity", "above": BETTER},
            {"kind": "with_gauss_newton", "method": "ekfac", "above": NEAR},
        ),
        required=True,
    ),
    _PROSE.claim(
        "V3",
        _tiny({"kind": "with_gauss_newton", "method": "ekfac_cg", "above": SOLVED}),
        required=True,
    ),
    _PROSE.claim(
        "I1",
        _here(
            pairs_gap("same procedure", "two procedures"),
            pairs_gap("same procedure", "facts"),
        ),
        required=True,
    ),
    _PROSE.claim("I2", _here(*map(mass_gap, PROCEDURES)), required=True),
    _PROSE.claim(
        "I3",
        _here(
            answers(FACT, above=FOUND),
            *(answers(one, below=NOT_FOUND) for one in PROCEDURES),
        ),
        required=True,
    ),
    _PROSE.claim("I4", _here(*map(separates, PROCEDURES)), required=True),
    _PROSE.claim("I5", _here(*(separates(one, than="identity") for one in PROCEDURES))),
    _PROSE.claim(
        "I6",
        _here(
            *(code(one, "top", above=1.0) for one in PROCEDURES),
            code(FACT, "top", below=1.0),
        ),
    ),
    _PROSE.claim("I7", _here(*(code(one, "bottom", above=1.0) for one in PROCEDURES))),
    _PROSE.claim(
        "I8", _here(lds_gap("ekfac", "identity"), lds_gap("ekfac", "bm25")), required=True
    ),
    _PROSE.claim("I9", _here(lds_gap("ekfac_cg", "ekfac"))),
    _PROSE.claim("I10", _here(removal("ekfac", "random", FACT)), required=True),
    _PROSE.claim(
        "I11",
        _here(
            removal("ekfac", "random", "procedure"),
            removal("ekfac", "identity", "procedure"),
        ),
    ),
    _PROSE.claim("I12", _here(removal("ekfac", "bm25", "procedure"))),
    _PROSE.claim("I13", _here(random_lds), required=True),
)


_SNIPPET = 120  # characters of prompts and documents
_SHOWN_OF_REPORT = (
    *("Methods", "Answers in documents", "Procedures in documents"),
    *("Over-representation of sources", "Correlations of queries"),
    "Positive influence of the top documents",
)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    text = _PROSE(
        "method",
        corpus=corpus,
        documents=sum(small_corpus.SIZES.values()),
        projections=scoring.PROJECTION**2,
    )
    out, missing = [text], []
    if seeds := parts.get("corpus"):
        out.insert(0, f"- *runs*: {seeds.amount()}.")
        missing = [
            f"the {name} of seed {row['seed']}"
            for row in seeds.rows
            for name in ("scores", "losses")
            if not row.get(name)
        ]
    return [*out, *page.missing(missing, tuple(experiment.PARTS), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if rows := parts.get("exact"):
        kinds = ("pbrf", "loo", "lds", "with_gauss_newton")
        cells = [
            (METHODS[method], *(_mean([row[kind][method] for row in rows]) for kind in kinds))
            for method in tiny.METHODS
        ]
        header = (
            *("method", "Bregman responses", "leave-one-out"),
            *("halves (LDS)", "Gauss-Newton scores"),
        )
        lines += page.table(header, cells, "Tiny models: correlations")
    if (seeds := parts.get("corpus")) and seeds.rows:
        lines += _by_group(seeds)
        lines += _lds(seeds)
        lines += _removal(seeds)
        lines += _answers(seeds)
    if found := parts.get("smollm"):
        lines += _smollm(found)
    return lines


def _smollm(found: Mapping[str, Any]) -> list[str]:
    """Returns the tables of the report of the demonstration, and the first document of each query."""
    fit, score = (found["seconds"][arm] / 60 for arm in ("factors", "ekfac"))
    lines = [
        "## A real model: SmolLM2-135M",
        "",
        f"{found['documents']:,} pieces of texts of installed packages are scored; factors took {fit:.0f} minutes, scores {score:.0f}. "
        "Nothing is judged: it shows the report of a real model. Scores are divided by the norms of the documents' gradients.",
        "",
    ]
    for table in tables.tables(found["analyses"]):
        if table["title"] in _SHOWN_OF_REPORT:
            cells = [[_cell(cell) for cell in row] for row in table["rows"]]
            lines += [f"**{table['title']}.** {table['text']}", ""]
            lines += page.table(table["header"], cells)
    rows = [
        (
            *(_cell(_short(query["prompt"])), _cell(_short(query["completion"]))),
            *(query["first"]["source"] or "", _cell(_short(query["first"]["text"] or ""))),
        )
        for query in found["queries"]
    ]
    header = ("prompt", "completion", "source", "first document by EK-FAC")
    return [*lines, "**First documents.**", "", *page.table(header, rows)]


def _short(text: str) -> str:
    return text if len(text) <= _SNIPPET else f"{text[:_SNIPPET]} ..."


def _cell(text: str) -> str:
    """Returns a text in one line that ends no cell of a table and is no markup."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;")


def _mean(values: Sequence[float], digits: int = 3) -> str:
    return intervals.text(intervals.over_seeds(np.asarray(values)), digits) if values else ""


def _of(found: Mapping[int, float], digits: int = 3) -> str:
    return _mean([*found.values()], digits)


def _by_group(seeds: Seeds) -> list[str]:
    def cells(group: str) -> tuple[str, ...]:
        values: tuple[Callable[[Mapping[str, Any]], float], ...] = (
            lambda record: record["answered"][group],
            lambda record: record["nats"][group],
            lambda record: record["masses"]["ekfac"][group]["mass"],
            lambda record: record["masses"]["ekfac"][group]["slope"],
        )
        return (GROUPS[group], *(_of(seeds.scores(value)) for value in values))

    header = (
        *("queries", "completed", "nats"),
        *("log of influence per nat, EK-FAC", "slope of the power law"),
    )
    return page.table(header, map(cells, small_corpus.GROUPS), "The model and its queries")


def _lds(seeds: Seeds) -> list[str]:
    groups = ("all", *small_corpus.GROUPS)
    rows = [
        (
            METHODS[method],
            *(_of(seeds.losses(lambda r, m=method, g=group: r["lds"][m][g])) for group in groups),
        )
        for method in scoring.METHODS
    ]
    header = ("method", "all queries", *(GROUPS[group] for group in small_corpus.GROUPS))
    return page.table(header, rows, "Linear datamodeling scores")


def _removal(seeds: Seeds) -> list[str]:
    rows = [
        (
            METHODS[method],
            *(
                _of(seeds.losses(lambda r, m=method, w=what: r["removal"][w][m]), 4)
                for what in scoring.REMOVED_FOR
            ),
        )
        for method in scoring.REMOVED_BY
        if method != scoring.RANDOM
    ]
    header = ("method", *(GROUPS[what] for what in scoring.REMOVED_FOR))
    title = f"Rise of the loss without the top {statistics.SHARE:.0%}, over random documents, nats per completion"
    return page.table(header, rows, title)


def _answers(seeds: Seeds) -> list[str]:
    def cell(method: str, group: str, place: str) -> str:
        return _of(seeds.scores(lambda r: r["methods"][method]["answers"][group][place]), 2)

    rows = [
        (METHODS[method], *(cell(method, group, "top") for group in small_corpus.GROUPS))
        for method in scoring.METHODS
    ]
    anywhere = [cell("ekfac", group, "corpus") for group in small_corpus.GROUPS]
    rows.append(("any document of the corpus", *anywhere))
    header = ("method", *(GROUPS[group] for group in small_corpus.GROUPS))
    title = f"Share of queries whose answer is in the top {statistics.TOP}"
    return page.table(header, rows, title)


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with methods, groups of queries and kinds of pairs exchanged at random in each seed."""
    out = dict(measured)
    if "exact" in measured:
        kinds = ("pbrf", "loo", "lds", "with_gauss_newton")
        out["exact"] = [
            {**row, **{kind: claim.exchanged(row[kind], rng) for kind in kinds}}
            for row in measured["exact"]
        ]
    if "corpus" in measured:
        out["corpus"] = [
            {
                **row,
                "scores": row.get("scores") and _shuffled_scores(row["scores"], rng),
                "losses": row.get("losses") and _shuffled_losses(row["losses"], rng),
            }
            for row in measured["corpus"]
        ]
    return out


def _shuffled_scores(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    methods = {
        method: {
            "correlations": claim.exchanged(one["correlations"], rng),
            "answers": claim.exchanged(one["answers"], rng),
            "sources": {
                group: {
                    name: {end: claim.exchanged(shown, rng) for end, shown in ends.items()}
                    for name, ends in names.items()
                }
                for group, names in one["sources"].items()
            },
        }
        for method, one in record["methods"].items()
    }
    masses = {method: claim.exchanged(one, rng) for method, one in record["masses"].items()}
    return {**record, "methods": methods, "masses": masses}


def _shuffled_losses(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        **record,
        "lds": claim.exchanged(record["lds"], rng),
        "removal": {what: claim.exchanged(one, rng) for what, one in record["removal"].items()},
    }


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if measured.get("smollm"):
        out["smollm"] = measured["smollm"]
    if measured.get("exact"):
        out["exact"] = measured["exact"]
    if measured.get("corpus"):
        out["corpus"] = Seeds(measured["corpus"])
    return out


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
    setup=_setup,
    tables=_tables,
    shuffle=shuffle,
)
