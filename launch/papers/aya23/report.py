"""The claims of Aya 23 that small models can judge and how each is measured, with plots and the page.

Arms of the same seed have the same order of data where they read the same mixture, so that they are compared in pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.aya23 import experiment
from espalier.launch.papers.aya23.experiment import (
    BASE,
    CACHED_KV,
    COUNTS,
    LANGUAGES,
    LOSS,
    PLAIN,
    SHARES,
    TOTAL,
    TUNED,
    TURNS,
    WIDTHS,
    Runs,
    breadth,
    heads,
)
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Effect
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import compare
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE

_PROSE = Prose.of(__name__)

SAME = 1.0  # per cent of the loss: what counts as no worse
CACHE = 2.0  # the same for fewer heads of keys and values
PLACES = {"toy": "made languages", "fertility": "real languages", "caches": "models"}
_FEWEST, *_, _MOST = COUNTS


def less_by_width(runs: Runs, where: str) -> list[Effect]:
    """Compares what many languages cost a narrow and a wide model."""
    cases = [breadth(count, width) for width in WIDTHS for count in (_MOST, _FEWEST)]
    narrow_most, narrow_fewest, wide_most, wide_fewest = (runs.scores(arm, LOSS) for arm in cases)
    costs = (narrow_most - narrow_fewest).dropna(), (wide_most - wide_fewest).dropna()
    gaps = (costs[0] - costs[1]).dropna()
    if gaps.empty:
        return []
    note = ", ".join(
        f"{width} {cost.mean():.3f}" for width, cost in zip(WIDTHS, costs, strict=True)
    )
    return [
        Effect(
            where=where,
            what=f"what {_MOST} languages cost over {_FEWEST}, narrow less wide model",
            by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
            above=0.0,
            unit="nats",
            note=note,
            unmet=runs.unmet(LOSS, *cases),
        )
    ]


def format_matters(runs: Runs, where: str) -> list[Effect]:
    """Compares the answers of a tuned model with turns and without them."""
    gaps = (runs.scores("tuned_full", TURNS) - runs.scores("tuned_full", PLAIN)).dropna()
    if gaps.empty:
        return []
    means = [runs.scores("tuned_full", score).mean() for score in (TURNS, PLAIN)]
    return [
        Effect(
            where=where,
            what="share of right answers, with turns less without",
            by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
            above=0.0,
            note=f"with {means[0]:.3f}, without {means[1]:.3f}",
            unmet="nothing is answered" if max(means) < 0.02 else "",
        )
    ]


def spread(measured: Mapping[str, Any], where: str) -> list[Effect]:
    """Compares the highest over the lowest parity under vocabularies of unequal and of equal shares."""
    by_seed = {
        int(seed): one["raw"]["spread"] - one["balanced"]["spread"]
        for seed, one in measured.items()
    }
    means = {
        name: sum(one[name]["spread"] for one in measured.values()) / len(measured)
        for name in ("raw", "balanced")
    }
    note = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    what = "highest over lowest parity to English, raw less balanced"
    return [Effect(where=where, what=what, by_seed=by_seed, above=0.0, note=note)]


def caches(measured: Mapping[str, int], where: str) -> list[Effect]:
    """Measures the bytes of caches in units of that of one head, less the number of heads."""
    excess = {count: measured[str(count)] / measured["1"] - count for count in CACHED_KV}
    what = "bytes of a cache in those of one head, less the heads of keys and values, by heads"
    exact = {"above": -1e-9, "below": 1e-9, "exact": True, "digits": 0}
    note = ", ".join(f"{count}: {measured[str(count)]:,}" for count in CACHED_KV)
    return [Effect(where=where, what=what, by_seed=excess, note=note, **exact)]


_BREADTH = [
    (breadth(fewer, width), breadth(more, width))
    for width in WIDTHS
    for fewer, more in zip(COUNTS, COUNTS[1:], strict=False)
]
CLAIMS = (
    _PROSE.claim("Y1", {"toy": [compare(LOSS, *_BREADTH)]}, required=True),
    _PROSE.claim("Y2", {"toy": [less_by_width]}, required=True),
    _PROSE.claim(
        "Y3",
        {"toy": [compare(TURNS, ("tuned", "scratch"), ("tuned_full", "scratch"))]},
        required=True,
    ),
    _PROSE.claim(
        "Y4",
        {"toy": [compare(LOSS, (BASE, "sequential"), relative=True, above=-SAME)]},
        required=True,
    ),
    _PROSE.claim(
        "Y5", {"toy": [compare(LOSS, (BASE, "gelu"), relative=True, above=-SAME)]}, required=True
    ),
    _PROSE.claim(
        "Y6",
        {
            "caches": [caches],
            "toy": [
                compare(LOSS, (BASE, heads(4)), (heads(1), heads(4)), relative=True, above=-CACHE)
            ],
        },
        required=True,
    ),
    _PROSE.claim("Y7", {"fertility": [spread]}, required=True),
    _PROSE.claim("Y8", {"toy": [format_matters]}, required=True),
)


_WIDTHS = {"narrow": ORANGE, "wide": BLUE}
_SHARE_COLOURS = {"raw": ORANGE, "balanced": BLUE}
_BLOCKS = (BASE, "sequential", "gelu", heads(4), heads(1))


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    runs = parts.get("toy")
    return {
        "languages.png": (
            _languages(runs),
            _PROSE("languages_figure"),
        ),
        "blocks.png": (
            _blocks(runs),
            _PROSE("blocks_figure"),
        ),
        "answers.png": (
            _answers(runs),
            _PROSE("answers_figure"),
        ),
        "fertility.png": (
            _fertility(parts.get("fertility")),
            _PROSE("fertility_figure"),
        ),
    }


def _languages(runs: Runs | None) -> Any:
    if not runs or not any(runs.has(breadth(c, w)) for c in COUNTS for w in WIDTHS):
        return None
    figure, (ends, course) = panels.panels(2, (10.5, 4.0))
    for width, colour in _WIDTHS.items():
        means = []
        for at, count in enumerate(COUNTS):
            values = runs.values(breadth(count, width), LOSS)
            if values.size:
                panels.dots(
                    ends, at, values, colour, f"{width}, width {WIDTHS[width][0]}" if not at else ""
                )
                means.append((at, values.mean()))
        ends.plot(*zip(*means, strict=True), color=colour, lw=1) if means else None
        for count, style in zip(COUNTS, ("-", "--", ":"), strict=True):
            curves = [row["curve"] for row in runs.find(breadth(count, width)).values()]
            if curves and all(len(curve) == len(curves[0]) for curve in curves):
                steps, losses = np.mean(np.array(curves, float), axis=0).T
                label = f"{width}, {count} languages"
                course.plot(steps, losses, style, color=colour, lw=1.5, label=label)
    ends.set_xticks(range(len(COUNTS)), [str(count) for count in COUNTS])
    ends.set(xlabel="languages in training", ylabel="loss, nats per token")
    ends.legend(frameon=False)
    course.set(xlabel="updates", ylabel="loss, nats per token")
    course.legend(**panels.BESIDE)
    return figure


def _blocks(runs: Runs | None) -> Any:
    rows = [
        (
            runs.label(arm),
            list(values),
            {"value": values.mean(), "low": np.nan, "high": np.nan},
            BLUE if arm == BASE else GREY,
        )
        for arm in (_BLOCKS if runs else ())
        if runs and (values := runs.values(arm, LOSS)).size
    ]
    if not rows:
        return None
    figure, (axes,) = panels.panels(1, (7.5, 1.1 + 0.35 * len(rows)))
    panels.paired(axes, rows)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("loss, nats per token")
    return figure


def _answers(runs: Runs | None) -> Any:
    if not runs or not any(runs.has(arm) for arm in TUNED):
        return None
    figure, (axes,) = panels.panels(1, (8.0, 3.8))
    for i, (score, colour, label) in enumerate(
        ((TURNS, BLUE, "with turns"), (PLAIN, GREEN, "without turns"))
    ):
        for at, arm in enumerate(TUNED):
            values = runs.values(arm, score)
            if values.size:
                panels.dots(axes, at + 0.3 * i - 0.15, values, colour, "" if at else label)
    axes.set_xticks(range(len(TUNED)), [runs.label(arm) for arm in TUNED])
    axes.set(ylim=(-0.03, 1.03), ylabel="share of right answers")
    axes.legend(**panels.BESIDE)
    return figure


def _fertility(measured: Mapping[str, Any] | None) -> Any:
    if not measured:
        return None
    seeds = list(measured.values())
    codes = [code for code in seeds[0]["raw"] if code != "spread"]
    means = {
        name: {code: np.mean([one[name][code] for one in seeds]) for code in codes}
        for name in SHARES
    }
    codes.sort(key=lambda code: means["balanced"][code])
    figure, (axes,) = panels.panels(1, (9.0, 4.0))
    for i, (name, colour) in enumerate(_SHARE_COLOURS.items()):
        for at, code in enumerate(codes):
            values = np.array([one[name][code] for one in seeds])
            label = f"{name} shares" if not at else ""
            panels.dots(axes, at + 0.36 * i - 0.18, values, colour, label)
    axes.set_xticks(range(len(codes)), codes)
    axes.axhline(1.0, color=GREY, lw=0.8, ls=":")
    axes.set_ylabel("tokens over those of the same text in English")
    axes.legend(frameon=False)
    return figure


_SCORES = (LOSS, TURNS, PLAIN)


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out = []
    runs = parts.get("toy")
    if runs:
        out.append(_PROSE("made", amount=runs.amount()))
    out.append(_PROSE("real", languages=len(LANGUAGES), kilobytes=TOTAL // 1000))
    missing = runs.missing(list(experiment.get_config().arms), runs.seeds) if runs else []
    return [*out, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("toy")
    if not runs:
        return []
    rows = [(runs.title(arm), *runs.cells(arm, _SCORES)) for arm in runs.arms]
    return page.table(("arm", *_SCORES), rows, "All arms")


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with arms, formats of the answers and vocabularies exchanged at random."""
    out = claim.shuffle_arms(measured, rng)
    out["toy"] = [_formats_exchanged(row, rng) for row in out.get("toy", [])]
    if trained := out.get("fertility"):
        out["fertility"] = {seed: claim.exchanged(one, rng) for seed, one in trained.items()}
    if cached := out.get("caches"):
        out["caches"] = claim.exchanged(cached, rng)
    return out


def _formats_exchanged(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    answers = (row.get("evaluations") or {}).get("answers")
    if not answers or rng.random() < 0.5:
        return dict(row)
    other = {"turns": "plain", "plain": "turns"}
    turned = {
        f"{kind}_{other[name]}": value
        for (kind, name), value in ((key.split("_"), value) for key, value in answers.items())
    }
    return {**row, "evaluations": {**row["evaluations"], "answers": turned}}


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    runs = {"toy": Runs(measured["toy"])} if measured.get("toy") else {}
    return runs | {name: measured[name] for name in ("fertility", "caches") if measured.get(name)}


REPORT = page.Report(
    slug="aya23",
    title="Aya 23: the paper's claims on small models",
    source="[Aya 23: Open Weight Releases to Further Multilingual Progress, arXiv 2405.15032](https://arxiv.org/abs/2405.15032)",
    claims=CLAIMS,
    places=PLACES,
    read=_read,
    figures=figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
)
