"""The claims of MoV and MoLORA and how each is measured, with plots, tables and the page.

Arms of the same seed share the frozen model, the rows and their order, so that they are compared in pairs. The score is
the accuracy of ranked answer choices: per held-out composition the median over prompt templates, then the mean over
compositions. Of four choices, chance is 0.25. Margins are shares of right answers, written down before the runs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from espalier.launch.papers.mov import experiment, rows
from espalier.launch.papers.mov.evaluations import KINDS
from espalier.launch.papers.mov.experiment import (
    ACCURACY,
    BASE,
    CHANCE,
    FULL,
    IA3,
    LORA,
    MOLORA,
    MOV,
    ROUTED,
    TUNED,
    VARIANTS,
    Runs,
)
from espalier.launch.papers.shared import claim, domains, page, results
from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.papers.shared.domain_panels import load_dots
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

_PROSE = Prose.of(__name__)

PART = "operations"
SEEDS = 4  # the least number for a verdict, of five: one frozen model may not have learned
MARGIN = 0.02  # what counts as no worse
SPECIALISED = 0.05  # of total variation: by how much tasks must differ in what routers choose
REACH = 0.05  # by how much a method may be worse than full tuning to be within reach
TOP_1, TOP_1_RENORMALISED, TOP_2, LAYER_INPUT, SENTENCE = (
    f"{MOV[0]}_{name}" for name in ("top1", "top1_renormalised", "top2", "layer_input", "sentence")
)

_better = functools.partial(results.compare, ACCURACY, seeds=SEEDS)


def saturating(runs: Runs, where: str) -> list[Effect]:
    """Compares the gain of the first vectors with the gain of the last ones."""
    first, middle, last = MOV
    scores = [runs.scores(arm, ACCURACY) for arm in (IA3, first, middle, last)]
    early, late = scores[1] - scores[0], scores[3] - scores[2]
    gaps = (early - late).dropna()
    if gaps.empty:
        return []
    one, other = (
        f"of {runs.label(a)} over {runs.label(b)}" for a, b in ((first, IA3), (last, middle))
    )
    by_seed = {int(seed): float(gap) for seed, gap in gaps.items()}
    note = f"{early[gaps.index].mean():.3f} and {late[gaps.index].mean():.3f}"
    return [_effect(where, f"accuracy, gain {one} less that {other}", by_seed, note)]


def by_task(runs: Runs, where: str, *, arm: str) -> list[Effect]:
    """Measures how much further apart routers keep two compositions than the halves of one's rows, by kind of site."""
    out = []
    for kind in KINDS:
        by_seed = runs.specialisation(arm, kind)
        if by_seed:
            layers, wordings = (
                ", ".join(f"{x:.3f}" for x in np.mean([*values.values()], axis=0))
                for values in (by_seed, runs.specialisation(arm, kind, "wordings"))
            )
            note = f"by layer, the encoder's first: {layers}; in place of halves, two wordings: {wordings}"
            what = f"distance of two compositions' experts less that of halves of rows, {runs.label(arm)}, {_plain(kind)}"
            means = {seed: float(values.mean()) for seed, values in by_seed.items()}
            out.append(_effect(where, what, means, note, above=SPECIALISED))
    return out


def _plain(kind: str) -> str:
    return kind.replace("_", "-")


def _effect(
    where: str, what: str, by_seed: dict[int, float], note: str, above: float = 0.0
) -> Effect:
    return Effect(where=where, what=what, by_seed=by_seed, above=above, note=note, seeds=SEEDS)


def _here(*measures: Measure) -> dict[str, Sequence[Measure]]:
    return {PART: measures}


CLAIMS = (
    _PROSE.claim("M1", _here(_better(*((arm, IA3) for arm in MOV))), required=True),
    _PROSE.claim("M2", _here(_better((MOV[1], MOV[0]), above=-MARGIN), saturating), required=True),
    _PROSE.claim("M3", _here(_better(*((arm, LORA[0]) for arm in MOLORA))), required=True),
    _PROSE.claim("M4", _here(_better((MOV[0], TOP_1), above=-MARGIN)), required=True),
    _PROSE.claim(
        "M5", _here(_better(*((arm, FULL) for arm in MOLORA), above=-REACH)), required=True
    ),
    _PROSE.claim("M6", _here(_better(*((arm, FULL) for arm in MOV[1:]), above=-REACH))),
    _PROSE.claim("M7", _here(_better((MOV[0], LORA[0])))),
    _PROSE.claim("M8", _here(_better((MOV[0], TOP_2), (TOP_2, TOP_1)))),
    _PROSE.claim("M9", _here(_better((TOP_1_RENORMALISED, TOP_1)))),
    _PROSE.claim("M10", _here(_better((MOV[0], LAYER_INPUT), above=-MARGIN))),
    _PROSE.claim(
        "M11", _here(*(functools.partial(by_task, arm=arm) for arm in (MOV[0], MOLORA[0])))
    ),
    _PROSE.claim("M12", _here(_better((MOV[0], SENTENCE)))),
)


COLOURS = {
    BASE: GREY,
    FULL: RED,
    IA3: PURPLE,
    **dict.fromkeys(LORA, ORANGE),
    **dict.fromkeys(MOV, BLUE),
    **dict.fromkeys(MOLORA, GREEN),
    **dict.fromkeys(VARIANTS, GREY),
}
_SIZES = (IA3, *MOV), LORA, MOLORA, (FULL,)  # lines of the figure of sizes
_MAPPED = MOV[0], MOLORA[0]


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for runs in parts.values():
        out |= {
            "accuracy.png": (
                _accuracy(runs),
                _PROSE("accuracy_figure"),
            ),
            "sizes.png": (
                _sizes(runs),
                _PROSE("sizes_figure"),
            ),
            "tasks.png": (
                _tasks(runs),
                _PROSE("tasks_figure"),
            ),
            "specialisation.png": (
                _specialisation(runs),
                _PROSE("specialisation_figure"),
            ),
            "choices.png": (
                _choices(runs),
                _PROSE("choices_figure"),
            ),
            "loads.png": (
                load_dots(runs, {arm: COLOURS[arm] for arm in ROUTED}),  # type: ignore[arg-type]
                _PROSE("loads_figure"),
            ),
        }
    return out


def _accuracy(runs: Runs) -> Any:
    rows = []
    for arm in (BASE, *TUNED):
        values = runs.values(arm, ACCURACY)
        if values.size:
            rows.append(_row(runs.label(arm), values, COLOURS[arm]))
    if not rows:
        return None
    figure, (axes,) = panels.panels(1, (7.5, 1.1 + 0.28 * len(rows)))
    panels.paired(axes, rows)
    axes.grid(axis="x", alpha=0.25)
    axes.axvline(CHANCE, color="black", ls="--", lw=1)
    axes.set_xlabel("accuracy on held-out compositions")
    return figure


def _row(label: str, values: np.ndarray, colour: str) -> tuple[str, list[float], dict, str]:
    mean = {"value": float(values.mean()), "low": np.nan, "high": np.nan}
    return label, [float(x) for x in values], mean, colour


def _sizes(runs: Runs) -> Any:
    lines = [
        [
            (arm, sizes.mean(), values)
            for arm in arms
            if (values := runs.values(arm, ACCURACY)).size
            and (sizes := runs.values(arm, "trained_parameters")).size
        ]
        for arms in _SIZES
    ]
    if not any(lines):
        return None
    figure, (axes,) = panels.panels(1, (7.5, 4.6))
    for line in filter(None, lines):
        colour = COLOURS[line[-1][0]]
        at = [size for _, size, _ in line]
        axes.plot(at, [values.mean() for *_, values in line], color=colour, lw=1.8)
        for arm, size, values in line:
            axes.plot(
                [size] * len(values), values, ls="", marker="o", ms=4, color=colour, alpha=0.5
            )
            axes.annotate(
                runs.label(arm),
                (size, values.mean()),
                xytext=(5, -11),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set(xlabel="trained parameters", ylabel="accuracy on held-out compositions")
    return figure


def _tasks(runs: Runs) -> Any:
    rows = {}
    for arm in (BASE, *TUNED):
        if by_seed := runs.by_task(arm):
            rows[runs.label(arm)] = np.mean([*by_seed.values()], axis=0)
    if not rows:
        return None
    names = runs.tasks()
    figure, axes = panels.heat_map_grid(1, 1, (len(rows), len(names)))
    panels.heat_map(axes[0, 0], np.array([*rows.values()]), [*rows], names)
    return figure


def _specialisation(runs: Runs) -> Any:
    by_kind: dict[str, list[tuple[str, np.ndarray, str]]] = {}
    for kind in KINDS:
        for arm in ROUTED:
            if by_seed := runs.specialisation(arm, kind):
                values_NL = np.array([*by_seed.values()])
                by_kind.setdefault(kind, []).append((runs.label(arm), values_NL, COLOURS[arm]))
    if not by_kind:
        return None
    layers = max(values_NL.shape[1] for rows in by_kind.values() for _, values_NL, _ in rows)
    arms = max(map(len, by_kind.values()))
    size = (3.2 + 2.4 * layers, len(by_kind) * (1.0 + 0.26 * arms))
    figure, every = panels.panels(layers, size, rows=len(by_kind))
    for line, (kind, drawn) in zip(np.reshape(every, (-1, layers)), by_kind.items(), strict=True):
        for layer, axes in enumerate(line):
            if layer >= drawn[0][1].shape[1]:  # the encoder has no cross-attention
                axes.set_visible(False)
                continue
            labelled = [
                (label if layer == 0 else "", values_NL, c) for label, values_NL, c in drawn
            ]
            panels.paired(axes, [_row(label, x[:, layer], c) for label, x, c in labelled])
            axes.axvline(0, color="black", lw=0.8)
            axes.axvline(SPECIALISED, color="black", ls="--", lw=1)
            title = f"{kind.replace('_', '-')}, {_layer_name(layer, drawn[0][1].shape[1], kind)}"
            axes.set_title(title, fontsize=9)
            axes.tick_params(axis="x", labelsize=8)
    return figure


def _layer_name(layer: int, layers: int, kind: str) -> str:
    """Returns the name of a layer; those of both stacks are one after the other, but for cross-attention."""
    if kind == "cross_attention":
        return f"decoder {layer}"
    half = layers // 2
    return f"encoder {layer}" if layer < half else f"decoder {layer - half}"


def _choices(runs: Runs) -> Any:
    tables = [
        (runs.label(arm), next(iter(by_seed.values()))[-1])
        for arm in _MAPPED
        if (by_seed := runs.choices(arm, "mlp"))
    ]
    if not tables:
        return None
    names = runs.tasks() or [str(i) for i in range(len(tables[0][1]))]
    figure, axes = panels.heat_map_grid(1, len(tables), tables[0][1].shape)
    for at, (label, chosen_TE) in enumerate(tables):
        experts = [str(i) for i in range(chosen_TE.shape[1])]
        panels.heat_map(axes[0, at], chosen_TE, names, experts, title=label, row_names=at == 0)
    return figure


# Trainable parameters of each method on T5 1.1, by formula, at the paper's sizes. An encoder-decoder of L layers in each stack has
# 3 L attentions and 2 L MLPs; heads of width k fill the width d.


class Size(NamedTuple):
    """Sizes of a T5: layers L of each stack, width d, hidden width f of its MLPs, width k of a head, all parameters."""

    layers: int
    width: int
    hidden: int
    head: int
    parameters: float


SIZES = {
    "770M": Size(24, 1024, 2816, 64, 783.15e6),
    "3B": Size(24, 2048, 5120, 64, 2_849.76e6),
    "11B": Size(24, 4096, 10240, 64, 11_135.33e6),
}


def ia3(size: Size) -> int:
    """Returns the parameters of (IA)3: keys and values of each attention, hidden units of each MLP."""
    return 6 * size.layers * size.width + 2 * size.layers * size.hidden


def mov(size: Size, experts: int) -> int:
    """Returns those of MoV: vectors, and routers that read a head or the hidden units."""
    return experts * (ia3(size) + 6 * size.layers * size.head + 2 * size.layers * size.hidden)


def lora(size: Size, rank: int) -> int:
    """Returns those of LoRA at all four projections of attention and two of the MLP's three."""
    layers, width, hidden = size.layers, size.width, size.hidden
    return 24 * layers * width * rank + 4 * layers * (width + hidden) * rank


def molora(size: Size, experts: int, rank: int = 4) -> int:
    """Returns those of MoLORA: factors, and routers that read the projections' inputs."""
    routers = 12 * size.layers * size.width + 2 * size.layers * (size.width + size.hidden)
    return experts * (lora(size, rank) + routers)


# Method as in the paper -> its parameters.
METHODS: dict[str, Callable[[Size], int]] = {
    "(IA)3": ia3,
    **{f"LoRA-{rank}": functools.partial(lora, rank=rank) for rank in (4, 8, 16)},
    **{f"MoV-{n}": functools.partial(mov, experts=n) for n in (10, 30, 60)},
    **{f"MoLORA-{n}": functools.partial(molora, experts=n) for n in (10, 15)},
}
# Per cent of the model's, as the paper reports them; those of MoV at 3B do not follow from the shapes.
REPORTED = {
    ("(IA)3", "3B"): 0.018,
    ("LoRA-4", "3B"): 0.3,
    ("LoRA-8", "3B"): 0.6,
    ("LoRA-16", "3B"): 1.2,
    ("MoV-10", "3B"): 0.32,
    ("MoV-30", "3B"): 0.68,
    ("MoV-60", "3B"): 1.22,
    ("MoLORA-10", "3B"): 3.18,
    ("MoLORA-15", "3B"): 4.69,
    ("MoV-60", "11B"): 0.86,
}


def per_cent(method: str, size: str) -> float:
    """Returns the parameters that a method trains, in per cent of the model's."""
    return 100 * METHODS[method](SIZES[size]) / SIZES[size].parameters


def _setup(parts: Mapping[str, Any]) -> list[str]:
    text = _PROSE(
        "method",
        known_words=", ".join(rows.KNOWN_WORDS.values()),
        new_words=", ".join(rows.NEW_WORDS.values()),
        held_out=len(rows.held_out()),
    )
    out, missing = [text], []
    for runs in parts.values():
        unlearned = [f"seed {seed} (a loss of {x:.2f})" for seed, x in runs.unlearned.items()]
        out.insert(0, f"- *runs*: {runs.amount()}. Left out: {', '.join(unlearned) or 'none'}.")
        missing = runs.missing((BASE, *TUNED), runs.seeds)
    return [*out, *page.missing(missing, tuple(experiment.PARTS), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, runs in parts.items():
        cells = [_cells(runs, arm) for arm in (BASE, *TUNED) if runs.has(arm)]
        header = (
            *("arm", "trained parameters", "per cent"),
            *("accuracy", "loss on trained compositions"),
        )
        lines += page.table(header, cells, f"All arms, {experiment.PARTS[name]}")
        lines += domains.load_table(name, runs)
    return [*lines, *_full_size()]


def _cells(runs: Runs, arm: str) -> tuple[str, ...]:
    trained = runs.values(arm, "trained_parameters")
    base = next((row["parameters"] for row in runs.find(arm).values() if row.get("parameters")), 0)
    own = "" if arm == BASE or not trained.size else f"{trained.mean():,.0f}"
    share = f"{100 * trained.mean() / base:.2f}" if own and base else ""
    return runs.title(arm), own, share, *runs.cells(arm, (ACCURACY, "trained_loss"))


def _full_size() -> list[str]:
    """Returns the table of trainable parameters at the paper's sizes."""
    cells = []
    for method in METHODS:
        shares = [f"{per_cent(method, size):.3g}" for size in SIZES]
        reported = [
            f"{value:g} ({size})" for (name, size), value in REPORTED.items() if name == method
        ]
        cells.append((method, *shares, ", ".join(reported)))
    header = ("method", *(f"T5 1.1, {size}" for size in SIZES), "the paper")
    title = "Trained parameters at full size, per cent of the model's, from its shapes"
    return page.table(header, cells, title)


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns rows with arms exchanged at random, whether or not they have routers, and with other distances.

    What routers choose stays with its arm; the distances of tasks and of rows are exchanged in half of the runs.
    """
    out = {}
    for part, every in measured.items():
        plain = [_with_routing(row, None) for row in every]
        exchanged = claim.shuffle_arms({part: plain}, rng)[part]
        out[part] = [
            _with_routing(row, _swapped(own["evaluations"].get("routing"), rng))
            for row, own in zip(exchanged, every, strict=True)
        ]
    return out


def _with_routing(row: Mapping[str, Any], routing: Mapping[str, Any] | None) -> dict[str, Any]:
    others = {name: one for name, one in row["evaluations"].items() if name != "routing"}
    return {**row, "evaluations": {**others, **({"routing": routing} if routing else {})}}


def _swapped(
    routing: Mapping[str, Any] | None, rng: np.random.Generator
) -> Mapping[str, Any] | None:
    if not routing or rng.integers(2):
        return routing
    distances = {
        kind: [{**x, "tasks": x["rows"], "rows": x["tasks"]} for x in layers]
        for kind, layers in routing["distances"].items()
    }
    return {**routing, "distances": distances}


def _read(measured: Mapping[str, Any]) -> dict[str, Runs]:
    parts = [part for part in experiment.PARTS if measured.get(part)]
    return {part: Runs.judging(measured[part]) for part in parts}


REPORT = page.Report(
    slug="mov",
    title="MoV and MoLORA: the paper's claims on a small T5",
    source="[Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning, arXiv "
    "2309.05444](https://arxiv.org/abs/2309.05444)",
    claims=CLAIMS,
    places=experiment.PARTS,
    read=_read,
    figures=figures,
    setup=_setup,
    tables=_tables,
    shuffle=shuffle,
)
