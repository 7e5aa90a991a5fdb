"""The report of the reproduction."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data.influence import small_corpus
from launch.attribution.analyses import tables
from launch.papers.influence import (
    claims,
    corpus,
    exact,
    figures,
    measure,
    scoring,
    statistics,
    sweep,
)
from launch.papers.influence.arms import GROUPS, LEARNED, METHODS, Seeds
from launch.papers.shared import page
from launch.plots import intervals

_TEXT = [
    f"- *tiny models*: two layers of width 6 in float64, of which the MLPs are trained to convergence on {exact.DOCUMENTS} texts "
    f"of a random table of successors, with a weight of {exact.DAMPING:g} on |θ|²/2, which is the damping too. Scores are compared "
    "with the response to one copy more of a document in the proximal Bregman objective, with training without it, and with "
    f"training on {exact.HALVES} random halves, all from the optimum. A start whose weights are driven to zero is drawn again: "
    "there no document has an influence. This was one of five seeds of a first run, and the seeds here are others.",
    "- *small corpus*: a model with the paper's kind of blocks, of two layers of width 64, reads "
    f"{sum(small_corpus.SIZES.values()):,} documents of at most {small_corpus.LONGEST} characters: capitals of invented "
    "countries, worked examples of two procedures on digits in words, results of the same procedures as code, lines of "
    f"docstrings of installed packages, and blank ones. It is trained for {sweep.STARTED} updates, and for {sweep.RETRAINED} more.",
    f"- *queries*: {small_corpus.QUERIES} of each group: a capital; the steps and the result of each procedure for a number that "
    f"no document works out by it. A seed whose model completes fewer than {LEARNED:.0%} of a group's queries greedily decides nothing.",
    f"- *scores*: of the MLPs' weights, factors from {scoring.FITTED:,} documents with sampled labels, damping of a tenth of the mean "
    f"eigenvalue, whole gradients of queries; conjugate gradients take {scoring.CG_STEPS} steps on {scoring.CG_DOCUMENTS} documents; TRAK has "
    f"{scoring.PROJECTION**2:,} random projections of the same gradients of one model. Embeddings are means of the final hidden "
    "states, compared by the cosine. BM25 and TF-IDF count words and signs, since single characters say little.",
    f"- *retraining*: {corpus.HALVES} halves of the corpus, and the corpus without the {statistics.SHARE:.0%} of the documents that "
    "a method ranks highest for the facts, or for both procedures; each from the start, for as many updates as the model. A "
    "document that is left out is replaced by dots of its length, so that all runs read the same places in the same order.",
    "- *where it falls short*: the paper's models are of 7 and 35 billion parameters and its queries those of people; its "
    "correlations of up to 0.96 are not to be expected at this size, so that claims ask for signs. Completions are the right ones, "
    "not the model's own. The controls (answers that are given in the prompt) and the comparison of two sizes of models are left out.",
]


_SNIPPET = 120  # characters of prompts and documents
_SHOWN_OF_REPORT = (
    *("Methods", "Answers in documents", "Procedures in documents"),
    *("Over-representation of sources", "Correlations of queries"),
    "Positive influence of the top documents",
)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out, missing = list(_TEXT), []
    if seeds := parts.get("corpus"):
        out.insert(0, f"- *runs*: {seeds.amount()}.")
        missing = [
            f"the {name} of seed {row['seed']}"
            for row in seeds.rows
            for name in ("scores", "losses")
            if not row.get(name)
        ]
    return [*out, *page.missing(missing, tuple(measure.PARTS), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if rows := parts.get("exact"):
        kinds = ("pbrf", "loo", "lds", "with_gauss_newton")
        cells = [
            (METHODS[method], *(_mean([row[kind][method] for row in rows]) for kind in kinds))
            for method in exact.METHODS
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
            {**row, **{kind: _permuted(row[kind], rng) for kind in kinds}}
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


def _permuted(table: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the values of a table under other names of it."""
    values = [*table.values()]
    return {name: values[i] for name, i in zip(table, rng.permutation(len(values)), strict=True)}


def _shuffled_scores(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    methods = {
        method: {
            "correlations": _permuted(one["correlations"], rng),
            "answers": _permuted(one["answers"], rng),
            "sources": {
                group: {
                    name: {end: _permuted(shown, rng) for end, shown in ends.items()}
                    for name, ends in names.items()
                }
                for group, names in one["sources"].items()
            },
        }
        for method, one in record["methods"].items()
    }
    masses = {method: _permuted(one, rng) for method, one in record["masses"].items()}
    return {**record, "methods": methods, "masses": masses}


def _shuffled_losses(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        **record,
        "lds": _permuted(record["lds"], rng),
        "removal": {what: _permuted(one, rng) for what, one in record["removal"].items()},
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
    claims=claims.CLAIMS,
    places=claims.PLACES,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=shuffle,
)
