"""Plots of the results; None where there is nothing to plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.influence import scoring, small_corpus, statistics
from espalier.launch.papers.influence.experiment import GROUPS, METHODS, Seeds
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
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
    "tfidf": RED,
    "random": GREY,
}
_EXACT = {
    "pbrf": "Bregman responses",
    "loo": "leave-one-out",
    "lds": "halves (linear datamodeling score)",
}
_GRADIENTS = ("ekfac_cg", "ekfac", "kfac", "identity")
_SHOWN = (*_GRADIENTS, "trak", "embedding", "bm25", "tfidf", "random")
_MAPPED = ("ekfac", "identity", "bm25")  # methods whose sources are drawn
_BRIGHT = 5.0  # multiplier of the darkest square


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    seeds = parts.get("corpus", Seeds([]))
    return {
        "exact.png": (
            _exact(parts.get("exact", ())),
            _PROSE("exact_figure"),
        ),
        "correlations.png": (
            _correlations(seeds),
            _PROSE("correlations_figure"),
        ),
        "sources.png": (
            _sources(seeds),
            _PROSE("sources_figure"),
        ),
        "answers.png": (
            _answers(seeds),
            _PROSE("answers_figure"),
        ),
        "lds.png": (
            _lds(seeds),
            _PROSE("lds_figure"),
        ),
        "removal.png": (
            _removal(seeds),
            _PROSE("removal_figure"),
        ),
    }


def _row(label: str, values: Sequence[float], colour: str) -> tuple[str, list[float], dict, str]:
    mean = {"value": float(np.mean(values)), "low": np.nan, "high": np.nan}
    return label, [float(x) for x in values], mean, colour


def _dots(
    titles: Mapping[str, str],
    methods: Sequence[str],
    values: Callable[[str, str], Sequence[float]],
    label: str,
) -> Any:
    """Returns a figure with a panel for each title and a row for each method; None without values."""
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
    rows = max(map(len, tables.values()))
    figure, every = panels.panels(len(titles), (3.4 * len(titles) + 1, 1.3 + 0.28 * rows))
    for axes, (name, title) in zip(every, titles.items(), strict=True):
        panels.paired(axes, tables[name])
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    for axes in every[1:]:
        axes.set_yticklabels([])
    return figure


def _exact(rows: Sequence[Mapping[str, Any]]) -> Any:
    methods = ("hessian", "gauss_newton", *_GRADIENTS)
    return _dots(
        _EXACT, methods, lambda kind, method: [row[kind][method] for row in rows], "correlation"
    )


def _correlations(seeds: Seeds) -> Any:
    titles = {kind: kind for kind in statistics.PAIRS}

    def values(kind: str, method: str) -> list[float]:
        def value(record: Mapping[str, Any]) -> float:
            return record["methods"][method]["correlations"][kind]

        return [*seeds.scores(value).values()]

    return _dots(titles, (*_GRADIENTS, "trak"), values, "correlation")


def _answers(seeds: Seeds) -> Any:
    titles = {group: GROUPS[group] for group in small_corpus.GROUPS}

    def values(place: str, group: str, method: str) -> list[float]:
        def value(record: Mapping[str, Any]) -> float:
            return record["methods"][method]["answers"][group][place]

        return [*seeds.scores(value).values()]

    figure = _dots(
        titles, _SHOWN, lambda group, method: values("top", group, method), "share of queries"
    )
    if figure is not None:
        for axes, group in zip(figure.axes, titles, strict=True):
            axes.axvline(np.mean(values("corpus", group, "ekfac")), color="black", ls="--", lw=1)
            axes.set_xlim(-0.05, 1.05)
    return figure


def _sources(seeds: Seeds) -> Any:
    rows = [row["scores"] for row in seeds.rows if row.get("scores")]
    if not rows:
        return None
    names = [source.replace("_", " ") for source in statistics.SOURCES]
    groups = small_corpus.GROUPS
    figure, axes = panels.heat_map_grid(1, len(_MAPPED), (len(groups), len(names)))
    for at, method in enumerate(_MAPPED):
        found = np.mean(
            [
                [[*one["methods"][method]["sources"][g]["first"]["top"].values()] for g in groups]
                for one in rows
            ],
            axis=0,
        )
        panels.heat_map(
            axes[0, at],
            found,
            [GROUPS[group] for group in groups],
            names,
            title=METHODS[method],
            row_names=at == 0,
            most=_BRIGHT,
        )
    return figure


def _lds(seeds: Seeds) -> Any:
    titles = {"all": "all queries", **{group: GROUPS[group] for group in small_corpus.GROUPS}}

    def values(group: str, method: str) -> list[float]:
        return [*seeds.losses(lambda record: record["lds"][method][group]).values()]

    return _dots(titles, _SHOWN, values, "linear datamodeling score")


def _removal(seeds: Seeds) -> Any:
    titles = {what: GROUPS[what] for what in scoring.REMOVED_FOR}
    methods = [method for method in scoring.REMOVED_BY if method != scoring.RANDOM]

    def values(what: str, method: str) -> list[float]:
        return [*seeds.losses(lambda record: record["removal"][what][method]).values()]

    return _dots(titles, methods, values, "nats per completion")
