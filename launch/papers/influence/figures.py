"""Plots of the results; None where there is nothing to plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.influence import small_corpus, statistics
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
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import intervals, panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_PROSE = Prose.of(__name__)

COLOURS = {
    "hessian": GREY,
    "gauss_newton": GREY,
    "ekfac_cg": GREEN,
    "ekfac": BLUE,
    "kfac": PURPLE,
    "identity": ORANGE,
    "cosine": ORANGE,
    "trak": ORANGE,
    "embedding": RED,
    "bm25": RED,
    "bm25_characters": RED,
    "tfidf": RED,
    "random": GREY,
}
REMOVED = {
    "fact": "facts",
    "procedure": "procedures",
    "other_words": "procedures, in other words",
}
_EXACT = {
    "pbrf": "Bregman responses",
    "loo": "leave-one-out",
    "lds": "halves (LDS)",
}
_GRADIENTS = ("ekfac_cg", "ekfac", "kfac", "identity")
_SHOWN = (*_GRADIENTS, "trak", "embedding", "bm25", "bm25_characters", "tfidf", "random")
_MAPPED = ("ekfac", "identity", "bm25")  # methods whose sources are drawn
_BRIGHT = 5.0  # multiplier of the darkest square
_WIDTH = 7.6  # inches: text of 8 points is legible at 800 pixels
_GROUP_COLOURS = {FACT: ORANGE, PROCEDURES: BLUE}
_NAMES = {FACT: "facts", PROCEDURES: "procedures"}
# Parameters -> share of queries with the answer in the first 500 of 5 million documents: facts that are answered, reasoning.
PAPER = {7e9: (0.55, 0.074), 35e9: (0.30, 0.0)}


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    runs = parts.get("corpus", Runs([]))
    return {
        "answers.png": (_answers(runs), _PROSE("answers_figure")),
        "sizes.png": (_sizes(runs), _PROSE("sizes_figure")),
        "curves.png": (_curves(runs), _PROSE("curves_figure")),
        "separation.png": (_separation(runs), _PROSE("separation_figure")),
        "correlations.png": (_correlations(runs), _PROSE("correlations_figure")),
        "sources.png": (_sources(runs), _PROSE("sources_figure")),
        "removal.png": (_removal(runs), _PROSE("removal_figure")),
        "lds.png": (_lds(runs), _PROSE("lds_figure")),
        "exact.png": (_exact(parts.get("exact", ())), _PROSE("exact_figure")),
    }


def _row(label: str, values: Sequence[float], colour: str) -> tuple[str, list[float], dict, str]:
    found = [float(x) for x in values]
    return label, found, intervals.over_seeds(np.asarray(found)), colour


def _dots(
    titles: Mapping[str, str],
    methods: Sequence[str],
    values: Callable[[str, str], Sequence[float]],
    label: str,
    *,
    null: float = 0.0,
    columns: int = 3,
) -> Any:
    """Returns a figure with a panel for each title and a row for each method, on one axis; None without values."""
    tables = {
        name: [
            _row(METHODS[method], found, COLOURS[method])
            for method in methods
            if len(found := values(name, method))
        ]
        for name in titles
    }
    if not all(tables.values()):
        return None
    lines = -(-len(titles) // columns)
    height = lines * (0.95 + 0.2 * max(map(len, tables.values())))
    figure, every = panels.panels(
        min(columns, len(titles)), (_WIDTH, height), rows=lines, share_y=True
    )
    numbers = [x for rows in tables.values() for _, found, *_ in rows for x in found] + [null]
    pad = 0.06 * (max(numbers) - min(numbers))
    for at, axes in enumerate(every):
        axes.set_visible(at < len(titles))
    for axes, (name, title) in zip(every, titles.items(), strict=False):
        panels.paired(axes, tables[name])
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(null, color="black", lw=0.8)
        axes.set_xlim(min(numbers) - pad, max(numbers) + pad)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    figure.supxlabel(label, fontsize=9)
    return figure


def _exact(rows: Sequence[Mapping[str, Any]]) -> Any:
    methods = ("hessian", "gauss_newton", *_GRADIENTS)
    return _dots(
        *(_EXACT, methods, lambda kind, method: [row[kind][method] for row in rows]),
        "correlation with what retraining changes, mean over queries",
    )


def _correlations(runs: Runs) -> Any:
    def values(kind: str, method: str) -> Sequence[float]:
        return runs.values(SCORED, f"methods/{method}/correlations/{kind}")

    label = "correlation of the influences of two queries over all documents"
    methods = (*_GRADIENTS, "bm25", "bm25_characters")
    return _dots({kind: kind for kind in statistics.PAIRS}, methods, values, label)


def _separation(runs: Runs) -> Any:
    def values(kind: str, method: str) -> Sequence[float]:
        paths = [f"methods/{method}/separation/{kind}/{source}" for source in WORDS]
        return np.mean([runs.values(SCORED, path) for path in paths], axis=0)

    titles = {kind: f"documents: {kind}" for kind in statistics.KINDS}
    label = "area under the curve: documents of the query's procedure against the other's"
    return _dots(titles, _SHOWN, values, label, null=0.5)


def _answers(runs: Runs) -> Any:
    titles = {group: GROUPS[group] for group in small_corpus.GROUPS}

    def values(group: str, method: str, place: str = "top") -> Sequence[float]:
        return runs.values(SCORED, f"methods/{method}/answers/{group}/{place}")

    label = f"share of queries with the answer in one of the top {statistics.TOP} documents"
    figure = _dots(titles, _SHOWN, values, label)
    if figure is not None:
        for axes, group in zip(figure.axes, titles, strict=True):
            anywhere = np.mean(values(group, "ekfac", "corpus"))
            axes.axvline(anywhere, color="black", ls="--", lw=1)
            axes.set_xlim(-0.05, 1.05)
    return figure


def _lds(runs: Runs) -> Any:
    titles = {"all": "all queries", **{group: GROUPS[group] for group in small_corpus.GROUPS}}

    def values(group: str, method: str) -> Sequence[float]:
        return runs.values(HALVES, f"lds/{method}/{group}")

    return _dots(titles, _SHOWN, values, "linear datamodeling score", columns=4)


def _removal(runs: Runs) -> Any:
    def values(what: str, method: str) -> Sequence[float]:
        return runs.values(REMOVALS, f"removal/{what}/{method}")

    methods = ("ekfac_cg", "ekfac")
    label = "log ratio of the queries' losses: without the top documents, divided by without random ones"
    return _dots(REMOVED, methods, values, label)


def _sources(runs: Runs) -> Any:
    records = runs.record(SCORED)
    if not records:
        return None
    names = [source.replace("_", " ") for source in statistics.SOURCES]
    groups = small_corpus.GROUPS
    figure, axes = panels.heat_map_grid(len(_MAPPED), 1, (len(groups), len(names)))
    for at, method in enumerate(_MAPPED):
        found = np.mean(
            [
                [[*one["methods"][method]["sources"][g]["first"]["top"].values()] for g in groups]
                for one in records
            ],
            axis=0,
        )
        own = axes[at, 0]
        rows = [GROUPS[group] for group in groups]
        panels.heat_map(own, found, rows, names, title=METHODS[method], most=_BRIGHT)
        own.set_ylabel("queries", fontsize=9)
        if at < len(_MAPPED) - 1:
            own.set_xticklabels([])
    axes[-1, 0].set_xlabel("source of the documents", fontsize=9)
    return figure


def _group_values(
    records: Sequence[Mapping[str, Any]],
    groups: Any,
    value: Callable[[Mapping[str, Any], str], Any],
) -> np.ndarray:
    """Returns a number, or a curve, of each record: the mean over the groups."""
    listed = (groups,) if isinstance(groups, str) else groups
    return np.array([np.mean([value(one, group) for group in listed], axis=0) for one in records])


def _curves(runs: Runs) -> Any:
    records = runs.record(SCORED)
    if not records:
        return None
    figure, (answers, mass, code) = panels.panels(3, (_WIDTH, 3.2))

    def draw(axes: Any, lines_RK: np.ndarray, colour: str, style: str, label: str) -> None:
        for line_K in lines_RK:
            axes.plot(statistics.COUNTS, line_K, style, color=colour, lw=0.6, alpha=0.35)
        axes.plot(statistics.COUNTS, lines_RK.mean(0), style, color=colour, lw=2, label=label)

    for groups, colour in _GROUP_COLOURS.items():
        for method, style in (("ekfac", "-"), ("random", ":")):
            lines = _group_values(
                records, groups, lambda one, g, m=method: one["methods"][m]["answers"][g]["curve"]
            )
            name = _NAMES[groups] + (", random order" if method == "random" else "")
            draw(answers, lines, colour, style, name)
        lines = _group_values(records, groups, lambda one, g: one["masses"]["ekfac"][g]["curve"])
        draw(mass, np.exp(lines), colour, "-", _NAMES[groups])
        for end, style in (("top", "-"), ("bottom", "--")):
            lines = _group_values(
                records,
                groups,
                lambda one, g, e=end: one["methods"]["ekfac"]["code"][g][e]["curve"],
            )
            draw(code, lines, colour, style, f"{_NAMES[groups]}, {end}")
    code.axhline(1.0, color="black", lw=0.8)
    mass.set_yscale("log")
    titles = (
        "queries with the answer\nin the first k (share)",
        "influence per nat\nof the first k (log scale)",
        "share of code in the first k\nover its share of all",
    )
    for axes, title in zip((answers, mass, code), titles, strict=True):
        axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("documents k", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _sizes(runs: Runs) -> Any:
    arms = [arm for arm in (SCORED, WIDE_SCORED) if runs.record(arm)]
    if not arms:
        return None
    figure, (axes,) = panels.panels(1, (_WIDTH, 3.6))
    for at, (groups, colour) in enumerate(_GROUP_COLOURS.items()):
        means = []
        for arm in arms:
            records = runs.record(arm)
            shares = _group_values(
                records, groups, lambda one, g: one["methods"]["ekfac"]["answers"][g]["top"]
            )
            size = records[0]["parameters"]
            spread = size * np.linspace(0.9, 1.1, len(shares))
            axes.plot(spread, shares, ls="", marker="o", ms=4, color=colour, alpha=0.5, mew=0)
            means.append((size, shares.mean()))
        axes.plot(*zip(*means, strict=True), color=colour, lw=1.5, marker="_", ms=16, mew=2.5)
        paper = [(size, shares[at]) for size, shares in PAPER.items()]
        axes.plot(*zip(*paper, strict=True), color=colour, lw=1.5, ls="--", marker="s", mfc="white")
        axes.annotate(_NAMES[groups], means[0], (6, -12), textcoords="offset points", fontsize=9)
    for size, word in (
        (means[0][0], "here: top 20 of 5,500"),
        (6e10, "paper: top 500 of 5 million"),
    ):
        axes.annotate(
            word,
            (size, 1.06),
            fontsize=9,
            ha="right" if size > 1e9 else "left",
            annotation_clip=False,
        )
    axes.set_xscale("log")
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("parameters of the model (log scale)", fontsize=9)
    axes.set_ylabel("share of queries with the\nanswer in a top document", fontsize=9)
    return figure
