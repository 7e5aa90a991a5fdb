"""Plots of the measurements; None where there is nothing to plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.snapkv import accuracy, experiment, needles, sentences
from espalier.launch.papers.snapkv.results import (
    EXACT,
    LABELS,
    LOSS,
    OVERLAP,
    Latency,
    Needles,
    Retrieval,
    Sentences,
    Values,
    rates,
)
from espalier.launch.plots.panels import BLUE, GREY, ORANGE, panels

_PROSE = Prose.of(__name__)

_ACCURACY = {
    "SnapKV and its relatives": ("snapkv", "snapkv_avg", "snapkv_int8", "adakv", "oracle"),
    "other policies": ("snapkv", "tova", "h2o", "streaming_llm", "truncation", "random"),
    "pooling": ("snapkv", "kernel_5", "kernel_3", "kernel_1"),
}
_MAPPED = ("full", "snapkv", "h2o", "streaming_llm")
Figure = tuple[Any, str]


def figures(parts: Mapping[str, Any]) -> dict[str, Figure]:
    """Returns file name -> (figure, caption)."""
    plots: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
        "accuracy": (("retrieval",), _accuracy),
        "depth": (("retrieval",), _depth),
        "windows": (("retrieval", "needles"), _windows),
        "questions": (("retrieval", "needles"), _questions),
        "needles": (("needles",), _needles),
        "sentences": (("sentences",), _sentences),
        "latency": (("latency",), _latency),
    }
    return {
        f"{name}.png": (
            plot(*(parts[p] for p in needed)) if set(needed) <= set(parts) else None,
            _PROSE(f"{name}_figure"),
        )
        for name, (needed, plot) in plots.items()
    }


def _accuracy(runs: Retrieval) -> Any:
    if not runs.sound:
        return None
    figure, axes = panels(len(_ACCURACY), (8, 4.6), share_y=True)
    capacities = experiment.CAPACITIES
    full = np.mean(list(runs.exact("full", 0).values()))
    for one, (title, names) in zip(axes, _ACCURACY.items(), strict=True):
        one.axhline(full, color="black", ls="--", lw=1.2, label="full cache")
        for name in names:
            colour, marker, label = STYLE[name]
            by_capacity = [list(runs.exact(name, c).values()) for c in capacities]
            # Above int8, which gives the same answers.
            style = {"color": colour, "marker": marker, "zorder": 3 if name == "snapkv" else 2}
            one.plot(
                capacities, [np.mean(v) for v in by_capacity], lw=1.6, ms=6, label=label, **style
            )
            for capacity, values in zip(capacities, by_capacity, strict=True):
                one.plot([capacity] * len(values), values, ls="", ms=3, alpha=0.45, **style)
        one.set_xscale("log", base=2)
        one.set_xticks(capacities, [f"{c}\n{c / runs.length:.0%}" for c in capacities], fontsize=8)
        one.set_title(title, fontsize=10)
        one.set_xlabel(f"C, and its share of {runs.length}")
        one.set_ylim(-0.03, 1.03)
        one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.25))
    axes[0].set_ylabel("exact answers of four tokens")
    return figure


def _depth(runs: Retrieval) -> Any:
    if not runs.sound:
        return None
    lines = [*experiment.SHORTER, experiment.LINES]
    figure, axes = panels(2, (8, 4.4), rows=2)
    for name, one in zip(_MAPPED, axes, strict=True):
        cells = [
            [runs.right(seed, name, experiment.CAPACITY, n) for seed in runs.sound] for n in lines
        ]
        shares = [np.mean([cell["depths"] for cell in row if cell], axis=0) for row in cells]
        fifths = 100 // accuracy.FIFTHS
        names = [f"{at}-{at + fifths}" for at in range(0, 100, fifths)]
        capacity = "" if name == "full" else f", C = {experiment.CAPACITY}"
        shares_map(one, np.stack(shares), names, [str(7 + 5 * n) for n in lines])
        one.set_title(STYLE[name][2] + capacity, fontsize=10)
        one.set(xlabel="depth, %", ylabel="prompt, tokens")
    return figure


def _windows(runs: Retrieval, answers: Needles) -> Any:
    haystacks = answers.haystacks
    if not (runs.sound and haystacks):
        return None
    figure, (small, chat, tokens) = panels(3, (8, 3.6), share_y=True)
    rates_SLW = np.stack([runs.window_rates(seed) for seed in runs.sound])
    _by_window(small, {f"layer {i}": rates_SLW[:, i] for i in range(rates_SLW.shape[1])})
    small.set_title("retrieval models", fontsize=10)
    rates_HLW = np.stack([rates(one["hits"]) for one in haystacks])
    thirds = np.array_split(np.arange(rates_HLW.shape[1]), 3)
    labels = [f"layers {third[0]} to {third[-1]}" for third in thirds]
    by_third = [rates_HLW[:, third].mean(1) for third in thirds]
    _by_window(chat, dict(zip(labels, by_third, strict=True)))
    chat.set_title("SmolLM2-135M", fontsize=10)
    for one in (small, chat):
        one.set_xlabel("windows before the last")
    small.set_ylabel("hit rate of the window's choices")
    rates_SLA = np.stack([rates(runs.models[seed]["hits"]["tokens"]) for seed in runs.sound])
    for layer in range(rates_SLA.shape[1]):
        at = np.arange(rates_SLA.shape[2]) + 2
        with_dots(tokens, at, rates_SLA[:, layer], layer, f"layer {layer}")
    tokens.set_xticks(at)
    tokens.set_xlabel("generated token")
    tokens.set_title("the last window", fontsize=10)
    for one in (small, chat, tokens):
        one.set_ylim(0, None)
        one.legend(frameon=False, fontsize=8)
    return figure


def _by_window(axes: Any, curves: Mapping[str, np.ndarray]) -> None:
    for number, (label, values_NW) in enumerate(curves.items()):
        with_dots(axes, np.arange(values_NW.shape[1] - 1, -1, -1), values_NW, number, label)
    axes.invert_xaxis()


def _questions(runs: Retrieval, answers: Needles) -> Any:
    haystacks = answers.haystacks
    if not (runs.sound and haystacks):
        return None
    figure, (small, chat, place, time) = panels(2, (8, 6.4), rows=2)
    models = [runs.models[seed] for seed in runs.sound]
    for axes, overlaps, title in (
        (small, [one["overlaps"] for one in models], "retrieval models"),
        (chat, [one["overlap"] for one in haystacks], "SmolLM2-135M"),
    ):
        for number, (key, label) in enumerate(
            (("same", "one question asked twice"), ("different", "two questions"))
        ):
            values_NL = np.array([one[key] for one in overlaps])
            with_dots(axes, np.arange(values_NL.shape[1]), values_NL, number, label)
        chance = np.mean([one["chance"] for one in overlaps])
        axes.axhline(chance, color="black", ls=":", label="by chance")
        axes.set(xlabel="layer", ylabel="share of kept positions", ylim=(0, 1.03))
        axes.set_title(f"in common, {title}", fontsize=10)
        # Above the line of chance.
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.2))
    small.set_xticks(range(len(models[0]["overlaps"]["same"])))
    chat.set_xticks(range(0, len(haystacks[0]["overlap"]["same"]), 5))
    both = runs.sound_at_both
    joined(place, [[runs.kept_rate(s, q) for q in ("last", "first")] for s in both], 0, "hit rate")
    exact = [[runs.models[s]["positions"][q]["snapkv"] for q in ("last", "first")] for s in both]
    joined(place, exact, 1, "exact answers, SnapKV")
    place.set_xticks([0, 1], ["question last", "question first"])
    place.set(ylabel="share", ylim=(0, 1.03))
    place.set_title("place of the question, retrieval models", fontsize=10)
    when = ("before", "after")
    joined(time, [[one["agnostic"][w] for w in when] for one in models], 0, "retrieval models")
    exact = [answers.scores(EXACT, name).values() for name in ("before", "snapkv")]
    joined(time, list(zip(*exact, strict=True)), 1, "SmolLM2-135M")
    time.set_xticks([0, 1], ["before the question", "after it"])
    time.set(ylabel="exact answers", ylim=(-0.03, 1.03))
    time.set_title("time of compression", fontsize=10)
    for one in (place, time):
        one.set_xlim(-0.4, 1.4)
        one.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _needles(answers: Needles) -> Any:
    if not answers.haystacks:
        return None
    every = {(name, capacity): method.label for name, method, capacity in needles.cases()}
    every |= {("full", 0): "full cache", ("before", needles.CAPACITY): "SnapKV before the question"}
    best = {  # of a method, so that its capacities stay together
        name: max(_mean(answers.scores(EXACT, case)) for case in every if case[0] == name)
        for name, _ in every
    }
    cases = sorted(every, key=lambda case: (-best[case[0]], case[0], -case[1]))
    labels = [f"{every[case]}, {case[1]}" if case[1] else every[case] for case in cases]
    figure, (exact, loss) = panels(2, (8, 1.0 + 0.28 * len(cases)), share_y=True)
    for axes, score in ((exact, EXACT), (loss, LOSS)):
        _rows(axes, [answers.scores(score, case) for case in cases])
    exact.set(xlabel=f"{EXACT}, share of needles", ylabel="method, capacity C", xlim=(-0.03, 1.03))
    exact.set_yticks(range(len(cases)), labels, fontsize=8)
    loss.set_xlabel("loss of the numbers, nats per token")
    return figure


def _sentences(answers: Sentences) -> Any:
    main = answers.of(sentences.MAIN)
    if not main:
        return None
    names = [name for name in LABELS if name in next(iter(main.values()))["losses"]]
    names = sorted(set(names) - {"none", "full"}, key=lambda name: -_mean(answers.kept(name)))
    figure, (kept, overlap) = panels(2, (8, 1.2 + 0.36 * len(names)), share_y=True)
    for size, colour, shift in ((sentences.MAIN, BLUE, -0.14), (sentences.LONG, ORANGE, 0.14)):
        label = f"{size.tokens:,} tokens, C = {size.capacity:,}"
        _rows(kept, [answers.kept(name, size) for name in names], colour, shift, label)
        overlaps = [answers.scores(OVERLAP, name, size) for name in names]
        _rows(overlap, overlaps, colour, shift)
        if full := answers.scores(OVERLAP, "full", size):
            overlap.axvline(_mean(full), color=colour, ls="--", lw=1.2)
    for at, word in ((0, "no context"), (1, "full cache")):
        kept.axvline(at, color=GREY, ls=":", lw=1)
        kept.annotate(word, (at, 1.0), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    kept.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
    kept.set_xlabel("share of the context's worth that is kept", fontsize=9)
    figure.legend(
        *kept.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    overlap.set_xlabel(f"{OVERLAP} of its own answers (dashed: full cache)", fontsize=9)
    overlap.set_xlim(-0.03, 1.03)
    return figure


def _mean(values: Values) -> float:
    return float(np.mean(list(values.values())))


def _rows(
    axes: Any, rows: Sequence[Values], colour: str = BLUE, shift: float = 0.0, label: str = ""
) -> None:
    """Draws each row's values as dots and their mean as a line, from the top; nothing where there are no values."""
    for at, values in enumerate(rows):
        if values:
            every, style = list(values.values()), {"color": colour, "ls": ""}
            axes.plot(every, [at + shift] * len(every), marker="o", ms=3, alpha=0.4, mew=0, **style)
            axes.plot(_mean(values), at + shift, marker="|", ms=10, mew=2.5, label=label, **style)
            label = ""
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25)


def _latency(timed: Latency) -> Any:
    figure, axes = panels(len(timed.batches), (8, 3.6), share_y=True)
    capacity = timed.settings["capacity"]
    for (batch, methods), one in zip(timed.batches.items(), axes, strict=True):
        for name, label in (("full", "full cache"), ("snapkv", f"SnapKV, C = {capacity:,}")):
            colour, marker, _ = STYLE[name]
            at = [int(length) for length in methods[name]]
            ms = np.array([cell["ms"] for cell in methods[name].values()])
            one.plot(at, np.median(ms, 1), color=colour, marker=marker, label=label)
            one.plot(at, ms, color=colour, ls="", marker=marker, ms=3, alpha=0.4)
        one.set_xticks(at, [f"{n // 1024}K" for n in at], fontsize=8)
        one.set_xlabel("prompt, tokens")
        one.set_title(f"batch {batch}", fontsize=10)
    axes[0].set(ylabel="ms per generated token", ylim=(0, None))  # of both, once all is drawn
    axes[0].legend(frameon=False, fontsize=8)
    return figure


# Okabe and Ito's colours, which people with colour blindness can distinguish; markers differ too.
STYLE = {
    "full": ("black", "s", "full cache"),
    "snapkv": ("#0072B2", "o", "SnapKV"),
    "snapkv_avg": ("#56B4E9", "v", "average pooling"),
    "snapkv_int8": ("#CC79A7", "D", "int8"),
    "adakv": ("#009E73", "s", "Ada-KV"),
    "oracle": ("#777777", "*", "oracle"),
    "tova": ("#CC79A7", "D", "TOVA"),
    "h2o": ("#D55E00", "^", "H2O"),
    "streaming_llm": ("#E69F00", "P", "StreamingLLM"),
    "truncation": ("#009E73", "<", "truncation"),
    "random": ("#777777", "x", "random"),
    "kernel_1": ("#D55E00", "^", "no pooling"),
    "kernel_3": ("#E69F00", "P", "max pooling over 3"),
    "kernel_5": ("#56B4E9", "v", "max pooling over 5"),
}
_LINES = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"))


def shares_map(axes: Any, table: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Draws shares as colours and numbers."""
    axes.grid(False)
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "white" if value > 0.55 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)


def with_dots(axes: Any, at: Any, values_NX: np.ndarray, number: int, label: str) -> None:
    """Draws the mean of each column as a line, and its values as dots."""
    colour, marker = _LINES[number % len(_LINES)]
    axes.plot(at, values_NX.mean(0), color=colour, marker=marker, ms=5, label=label)
    for row in values_NX:
        axes.plot(at, row, ls="", color=colour, marker=marker, ms=2.5, alpha=0.4)


def joined(axes: Any, rows: Sequence[Sequence[float]], number: int, label: str) -> None:
    """Draws each row as dots that a line joins."""
    colour, marker = _LINES[number]
    for at, row in enumerate(rows):
        style = {"color": colour, "marker": marker, "lw": 0.8, "ms": 5, "alpha": 0.7}
        axes.plot(range(len(row)), row, label=label if not at else None, **style)
