"""How the runs were measured, and the tables of the page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.influence import tables as report_tables
from espalier.launch.papers.influence import (
    corpus,
    experiment,
    figures,
    scoring,
    small_corpus,
    statistics,
)
from espalier.launch.papers.influence import exact as tiny
from espalier.launch.papers.influence.experiment import (
    GROUPS,
    HALVES,
    METHODS,
    REMOVALS,
    SCORED,
    WIDE,
    WIDE_SCORED,
    WORDS,
    Runs,
)
from espalier.launch.papers.influence.small_corpus import FACT, PROCEDURES
from espalier.launch.papers.influence.statistics import OTHER_WORDS
from espalier.launch.papers.shared import page
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import intervals

_PROSE = Prose.of(__name__)

_SNIPPET = 120  # characters of prompts and documents
_SHOWN_OF_REPORT = (
    *("Methods", "Answers in documents", "Procedures in documents"),
    *("Over-representation of sources", "Correlations of queries"),
    "Positive influence of the top documents",
)
_SOURCES = {FACT: (FACT,)} | {one: small_corpus.names(one) for one in PROCEDURES}


def setup(parts: Mapping[str, Any]) -> list[str]:
    """Returns how it was measured."""
    out = [
        _PROSE(
            "method",
            corpus=corpus,
            documents=sum(small_corpus.SIZES.values()),
            projections=scoring.PROJECTION**2,
            facts=scoring.REMOVED_FOR[FACT].share,
        )
    ]
    missing = []
    if runs := parts.get("corpus"):
        out.insert(0, f"- *runs*: {runs.amount()}.")
        missing = runs.missing((SCORED, WIDE_SCORED, HALVES, REMOVALS), experiment.SEEDS[0])
    if rows := parts.get("exact"):
        minutes = sum(row["seconds"] for row in rows) / 60
        out.insert(
            0,
            f"- *tiny models*: seeds {', '.join(str(row['seed']) for row in rows)}; {minutes:.0f} minutes.",
        )
    return [*out, *page.missing(missing, tuple(experiment.PARTS), parts)]


def tables(parts: Mapping[str, Any]) -> list[str]:
    """Returns the tables below the measurements."""
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
    if (runs := parts.get("corpus")) and runs.rows:
        lines += _models(runs)
        for title, arm, paths, digits in _TABLES:
            lines += _by_method(runs, title, arm, paths, digits)
    if found := parts.get("smollm"):
        lines += _smollm(found)
    return lines


_COLUMNS = {GROUPS[group]: group for group in small_corpus.GROUPS}
# (title, arm, column -> path in the record with {method}, decimals).
_TABLES: tuple[tuple[str, str, Mapping[str, str], int], ...] = (
    (
        f"Share of queries whose answer is in the top {statistics.TOP}",
        SCORED,
        {
            name: f"methods/{{method}}/answers/{group}/{place}"
            for place, word in (("top", ""), ("corpus", ", any document"))
            for group in small_corpus.GROUPS
            for name in [GROUPS[group] + word]
        },
        2,
    ),
    (
        "Area under the curve: documents of the query's procedure against the other's, in other words",
        SCORED,
        {
            f"asked by {name}": f"methods/{{method}}/separation/{OTHER_WORDS}/{source}"
            for source, name in WORDS.items()
        },
        2,
    ),
    (
        "Linear datamodeling scores",
        HALVES,
        {"all queries": "lds/{method}/all"}
        | {name: f"lds/{{method}}/{group}" for name, group in _COLUMNS.items()},
        3,
    ),
    (
        "Log ratio of the losses without the top documents and without random ones",
        REMOVALS,
        {name: f"removal/{what}/{{method}}" for what, name in figures.REMOVED.items()},
        3,
    ),
)


def _by_method(
    runs: Runs, title: str, arm: str, paths: Mapping[str, str], digits: int
) -> list[str]:
    rows = []
    for method, name in METHODS.items():
        found = [runs.values(arm, path.format(method=method)) for path in paths.values()]
        if any(values.size for values in found):
            rows.append((name, *(_mean(values, digits) for values in found)))
    return page.table(("method", *paths), rows, title)


def _models(runs: Runs) -> list[str]:
    rows = []
    for arm, width in ((SCORED, experiment.WIDTH), (WIDE_SCORED, WIDE)):
        for group, sources in _SOURCES.items():
            for source in sources:
                paths = (f"answered/{source}", f"nats/{source}")
                paths += (f"masses/ekfac/{group}/mass", f"masses/ekfac/{group}/slope")
                found = [_mean(runs.values(arm, path)) for path in paths]
                rows.append((str(width), source.replace("_", " "), *found))
    header = (
        *("width", "queries", "completed", "nats"),
        *("log of influence per nat, EK-FAC, of the group", "slope of the power law, of the group"),
    )
    return page.table(header, rows, "The models and their queries")


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
    for table in report_tables.tables(found["analyses"]):
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


def _mean(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    found = np.asarray(values, float)
    return intervals.text(intervals.over_seeds(found), digits) if found.size else ""
