"""The claims of Aya 23 that small models can judge and how each is measured, with plots and the page.

Arms of the same seed have the same order of data where they read the same mixture, so that they are compared in pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.aya23 import experiment, fertility
from espalier.launch.papers.aya23.experiment import (
    ANSWERS,
    BASE,
    COUNTS,
    LOSS,
    PLAIN,
    RIGHT,
    SCORES,
    SECOND,
    TUNED,
    WIDTHS,
    Runs,
    breadth,
    heads,
    little,
)
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Effect, Measure, Planned
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import average, compare
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE

_PROSE = Prose.of(__name__)

COST = 0.05  # nats per doubling of the languages: what counts as a cost of them
SAME = 1.0  # per cent of the loss: what counts as no worse than another FFN
BLOCK, CACHE = 3.0, 4.0  # the same of another block, and of fewer heads of keys and values
FORMAT = 0.5  # nats per symbol of the answers that the format must be worth
PLACES = {"toy": "made languages", "fertility": "real languages"}
_FEWEST, *_, _MOST = COUNTS
_PILOT = "seeds 10 to 14"


def cost(width: str) -> Measure:
    """Returns a measure of the loss that each doubling of the languages adds, from the fewest to the most."""

    def measure(runs: Runs, where: str) -> list[Effect]:
        cases = breadth(_FEWEST, width), breadth(_MOST, width)
        scores = [runs.scores(arm, LOSS) for arm in cases]
        fewest, most = (one[one.index.isin(scores[1 - i].index)] for i, one in enumerate(scores))
        rise = (most - fewest) / np.log2(_MOST / _FEWEST)
        if rise.empty:
            return []
        return [
            Effect(
                where=where,
                what=f"loss that each doubling of the languages adds, {width} model",
                by_seed={int(seed): float(value) for seed, value in rise.items()},
                unit="nats",
                note=f"{_FEWEST} languages {fewest.mean():.3f}, {_MOST} languages {most.mean():.3f}",
                unmet=runs.unmet(LOSS, *cases),
            )
        ]

    return measure


def less_by_width(runs: Runs, where: str) -> list[Effect]:
    """Compares what each doubling of the languages costs a narrow and a wide model."""
    both = [effect for width in WIDTHS for effect in cost(width)(runs, where)]
    if len(both) < len(WIDTHS):
        return []
    narrow, wide = both
    seeds = sorted(set(narrow.by_seed) & set(wide.by_seed))
    return [
        Effect(
            where=where,
            what="loss that each doubling of the languages adds, narrow minus wide model",
            by_seed={seed: narrow.by_seed[seed] - wide.by_seed[seed] for seed in seeds},
            unit="nats",
            note=", ".join(
                f"{width} {np.mean([one.by_seed[seed] for seed in seeds]):.3f}"
                for width, one in zip(WIDTHS, both, strict=True)
            ),
            unmet="; ".join(filter(None, (narrow.unmet, wide.unmet))),
        )
    ]


def format_matters(runs: Runs, where: str) -> list[Effect]:
    """Compares the loss of a tuned model's answers without turns and with them."""
    arm = "tuned_full"
    losses = [runs.scores(arm, score) for score in (PLAIN, ANSWERS)]
    gaps = (losses[0] - losses[1]).dropna()
    if gaps.empty:
        return []
    return [
        Effect(
            where=where,
            what="loss of the answers, without turns minus with turns",
            by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
            unit="nats per symbol",
            note=f"without {losses[0].mean():.3f}, with {losses[1].mean():.3f}",
            unmet=runs.unmet(ANSWERS, arm),
        )
    ]


def spread(measured: Mapping[str, Any], where: str) -> list[Effect]:
    """Compares the deviation of the log parity over languages under vocabularies of unequal and of equal shares."""
    raw, balanced = (
        {int(seed): one[name]["spread"] for seed, one in measured.items()}
        for name in fertility.SHARES
    )
    return [
        Effect(
            where=where,
            what="deviation over languages of the logarithm of their tokens over English's, raw minus balanced",
            by_seed={seed: raw[seed] - balanced[seed] for seed in raw},
            note=f"raw {np.mean(list(raw.values())):.3f}, balanced {np.mean(list(balanced.values())):.3f}",
        )
    ]


CLAIMS = (
    _PROSE.claim(
        "Y1",
        "toy",
        average(
            "loss that each doubling of the languages adds, mean of both widths",
            *map(cost, WIDTHS),
        ),
        above=COST,
        planned=Planned(sd=0.009, expected=0.118, source=_PILOT),
        required=True,
        secondary={
            "toy": [
                *map(cost, WIDTHS),
                compare(LOSS, *((breadth(_MOST, width), little(width)) for width in WIDTHS)),
            ]
        },
    ),
    _PROSE.claim(
        "Y2",
        "toy",
        less_by_width,
        above=0.0,
        planned=Planned(sd=0.0175, expected=0.039, source=_PILOT),
        required=True,
    ),
    _PROSE.claim(
        "Y3",
        "toy",
        compare(ANSWERS, ("tuned", "scratch")),
        above=0.0,
        planned=Planned(sd=0.233, expected=0.465, source=f"{_PILOT}, three of the tasks"),
        required=True,
        secondary={
            "toy": [
                compare(
                    ANSWERS, ("tuned_full", "scratch"), (f"tuned_{SECOND}", f"scratch_{SECOND}")
                ),
                compare(RIGHT, ("tuned", "scratch"), (f"tuned_{SECOND}", f"scratch_{SECOND}")),
            ]
        },
    ),
    _PROSE.claim(
        "Y4",
        "toy",
        compare(LOSS, (BASE, "sequential"), relative=True),
        above=-BLOCK,
        planned=Planned(sd=0.982, expected=-1.46, source=_PILOT),
        control=True,
    ),
    _PROSE.claim(
        "Y5",
        "toy",
        compare(LOSS, (BASE, "gelu"), relative=True),
        above=-SAME,
        planned=Planned(sd=1.172, expected=0.551, source=_PILOT),
        required=True,
    ),
    _PROSE.claim(
        "Y6",
        "toy",
        compare(LOSS, (heads(1), heads(4)), relative=True),
        above=-CACHE,
        planned=Planned(sd=1.205, expected=-1.62, source=_PILOT),
        required=True,
        secondary={"toy": [compare(LOSS, (BASE, heads(4)), relative=True)]},
    ),
    _PROSE.claim(
        "Y7",
        "fertility",
        spread,
        above=0.0,
        planned=Planned(sd=0.028, expected=0.094, source=_PILOT),
        required=True,
    ),
    _PROSE.claim(
        "Y8",
        "toy",
        format_matters,
        above=FORMAT,
        planned=Planned(
            sd=1.2, expected=4.2, source="four tuned models of seed 0, from 2.4 to 5.3 nats"
        ),
        control=True,
    ),
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
    runs = runs.shared(*(breadth(count, width) for count in COUNTS for width in WIDTHS))
    figure, (ends, course) = panels.panels(2, (8.0, 3.6))
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
    ends.legend(frameon=False, fontsize=9)
    course.set(xlabel="updates", ylabel="loss, nats per token")
    course.legend(frameon=False, fontsize=8)
    return figure


def _blocks(runs: Runs | None) -> Any:
    runs = runs and runs.shared(*_BLOCKS)
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
    runs = runs.shared(*TUNED)
    figure, (losses, right) = panels.panels(2, (8.0, 3.4), share_y=True)
    shown = ((ANSWERS, BLUE, "with turns"), (PLAIN, GREEN, "without turns"))
    for axes, scores in ((losses, shown), (right, ((RIGHT, BLUE, ""),))):
        for score, colour, label in scores:
            for at, arm in enumerate(TUNED):
                values = runs.values(arm, score)
                if values.size:
                    style = {"color": colour, "ls": "", "mew": 0}
                    axes.plot(values, [at] * len(values), marker="o", ms=4, alpha=0.5, **style)
                    name = "" if at else label
                    style["mew"] = 2.5
                    axes.plot(values.mean(), at, marker="|", ms=14, label=name, **style)
        axes.grid(axis="x", alpha=0.25)
    losses.set_yticks(range(len(TUNED)), [runs.label(arm) for arm in TUNED], fontsize=8)
    losses.set_ylim(len(TUNED) - 0.4, -0.6)
    losses.set_xlim(left=0)
    losses.set_xlabel("loss of the answers, nats per symbol", fontsize=9)
    drawn = losses.get_legend_handles_labels()
    figure.legend(*drawn, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    right.set_xlim(-0.03, 1.03)
    right.set_xlabel("share of right answers, with turns", fontsize=9)
    return figure


def _fertility(measured: Mapping[str, Any] | None) -> Any:
    if not measured:
        return None
    seeds = list(measured.values())
    codes = [code for code in seeds[0]["raw"] if code in fertility.LANGUAGES]
    means = {
        name: {code: np.mean([one[name][code] for one in seeds]) for code in codes}
        for name in fertility.SHARES
    }
    codes.sort(key=lambda code: means["balanced"][code])
    figure, (axes,) = panels.panels(1, (8.0, 3.8))
    for i, (name, colour) in enumerate(_SHARE_COLOURS.items()):
        for at, code in enumerate(codes):
            values = np.array([one[name][code] for one in seeds])
            label = f"{name} shares" if not at else ""
            panels.dots(axes, at + 0.36 * i - 0.18, values, colour, label)
    axes.set_xticks(range(len(codes)), codes)
    axes.axhline(1.0, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="language", ylabel="tokens over those of the same text in English")
    axes.legend(frameon=False)
    return figure


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out = []
    runs = parts.get("toy")
    if runs:
        out.append(_PROSE("made", amount=runs.amount()))
    out.append(
        _PROSE("real", languages=len(fertility.LANGUAGES), kilobytes=fertility.TOTAL // 1000)
    )
    missing = runs.missing(list(experiment.get_config().arms), experiment.SEEDS[0]) if runs else []
    return [*out, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    runs = parts.get("toy")
    if not runs:
        return []
    scores = (LOSS, *SCORES)
    rows = [
        (runs.title(arm), str(len(runs.find(arm))), *runs.cells(arm, scores)) for arm in runs.arms
    ]
    by_kind = [part for score in SCORES for part in runs.parts(score)]
    kinds = [(runs.label(arm), *runs.cells(arm, by_kind)) for arm in TUNED if runs.has(arm)]
    return [
        *page.table(("arm", "seeds", *scores), rows, "All arms"),
        *page.table(("arm", *by_kind), kinds, "Answers by kind of instruction"),
    ]


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the measurements with arms, formats of the answers and vocabularies exchanged at random."""
    out = claim.shuffle_arms(measured, rng)
    if rows := out.get("toy"):
        out["toy"] = [_formats_exchanged(row, rng) for row in rows]
    if trained := out.get("fertility"):
        out["fertility"] = {
            seed: claim.exchanged({name: one[name] for name in fertility.SHARES}, rng)
            for seed, one in trained.items()
        }
    return out


def _formats_exchanged(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    losses = row["held_out"]
    if row["arm"] not in TUNED or rng.random() < 0.5:
        return dict(row)
    turned = {
        task.replace("toy_plain_", "toy_")
        if task.startswith("toy_plain_")
        else task.replace("toy_", "toy_plain_"): loss
        for task, loss in losses.items()
    }
    return {**row, "held_out": turned}


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    runs = {"toy": Runs(measured["toy"])} if measured.get("toy") else {}
    return runs | {name: measured[name] for name in ("fertility",) if measured.get(name)}


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
    headline=page.Headline(
        claim="Y1",
        what="loss that each doubling of the languages adds at equal compute, mean of two widths",
        unit="nats",
        paper=None,
        measure=CLAIMS[0].measure,
        part="toy",
        why=_PROSE("why"),
        mind=_PROSE("mind"),
        digits=3,
    ),
)
