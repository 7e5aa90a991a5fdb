"""The figures of code_mix: of the small experiment, and of any sweep with the paper's arms. They take the results of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.code_mix.experiment import BESIDE_TEXT, RECIPES, SHARES
from espalier.launch.papers.code_mix.scores import (
    ANSWER_LOSSES,
    ASKED,
    CODE_LOSS,
    GROUPS,
    PLAIN,
    SORTING,
    TEXT_LOSS,
    Results,
    arm_name,
    copied,
    wins,
)
from espalier.launch.plots import intervals
from espalier.launch.plots.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    dots,
    errors,
    legend_below,
    paired,
    panels,
)

_WIDE, _SMALL, _TITLE = (
    8.0,
    8.5,
    9.5,
)  # inches; points, legible where the figure is shown 800 pixels wide
_GROUP_COLOURS = dict(zip(GROUPS, (BLUE, ORANGE, GREEN), strict=True))
_COLOURS = {
    **_GROUP_COLOURS,
    **{SORTING: BLUE, PLAIN: GREEN, CODE_LOSS: GREEN, TEXT_LOSS: ORANGE},
}
_RECIPE_COLOURS = dict(zip(RECIPES, (GREY, GREEN, BLUE, RED), strict=True))
_BEGINNINGS = {"text_only": "share_0", "balanced_only": "share_50"}  # half of their own tokens
_ALL_SHARES = (0, 25, 50, 75, 90, 100)
_POINTS = "points of exact match"

# What the paper's models gain over other recipes by text after a balanced start, in % of the others' score, by parameters: its
# table of 470M, and at 2.8B what it says of growth with size (reasoning: 53.0 by 5.3 % and 51.8 by 5.2 %) and of code.
_PAPER: Mapping[str, Mapping[str, Mapping[float, float]]] = {
    "reasoning": {"text_only": {470e6: 8.2}, "balanced_only": {470e6: 2.3, 2.8e9: 2.4}},
    "knowledge": {"text_only": {470e6: 4.2}, "balanced_only": {470e6: 22.2}},
    "code": {"balanced_only": {470e6: -46.7, 2.8e9: -46.3}},
}
# The scores that are compared with these.
_OURS = {"reasoning": SORTING, "knowledge": "knowledge", "code": PLAIN}


def _gaps(axes: Any, results: Results, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Draws how much better arms are, of (label, score, arm, other arm) from the top; exact match in points, losses in nats."""
    shown = []
    for label, score, arm, base in rows:
        ones, others = results.paired(score, arm, base)
        gaps = others - ones if results.lower_is_better(score) else 100 * (ones - others)
        if gaps.size:
            shown.append((label, gaps, intervals.student(gaps), _COLOURS[score]))
    paired(axes, shown)
    _null(axes)


def _null(axes: Any) -> None:
    axes.axvline(0, color="black", lw=0.8)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="x", labelsize=_SMALL)


def _ceiling(axes: Any, results: Results, group: str, *, label: bool = False) -> None:
    """Draws what a model of generated code has right that copies the most frequent result."""
    if group == "code" and PLAIN in results.table:
        axes.axhline(copied(), color="black", lw=1, ls=":")
        if label:
            text = "copies web code"
            axes.annotate(
                text,
                (0.98, copied()),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="top",
                fontsize=_SMALL,
            )


def recipes(results: Results) -> Any:
    """The recipes against text alone. Code is left out: without any, its score is 0."""
    if not results.has(*RECIPES):
        return None
    results = results.shared(*RECIPES)
    groups = [group for group in results.groups if group != "code"]
    figure, axes = panels(len(groups), (_WIDE, 2.4))
    for group, one in zip(groups, axes, strict=True):
        others = [recipe for recipe in RECIPES if recipe != "text_only"]
        rows = [(arm_name(r), group, r, "text_only") for r in others]
        if group == "reasoning" and SORTING in results.table:
            rows += [(f"{arm_name(r)}, sorting", SORTING, r, "text_only") for r in others]
        _gaps(one, results, rows)
        (level,) = results.paired(group, "text_only")
        one.set_title(f"{group} (text only: {level.mean():.2f})", fontsize=_TITLE)
        one.set_xlabel(f"{_POINTS} above text only", fontsize=_SMALL)
    return figure


def phases(results: Results) -> Any:
    """The scores after each phase."""
    if not results.has(*RECIPES, *_BEGINNINGS.values()):
        return None
    cooldowns = (f"{recipe}_cooldown" for recipe in RECIPES)
    results = results.shared(*RECIPES, *_BEGINNINGS.values(), *cooldowns)
    figure, axes = panels(len(results.groups), (_WIDE, 3.6), share_y=True)
    steps = (("first half", ORANGE), ("all steps", BLUE), ("and cooldown with code", GREEN))
    for group, one in zip(results.groups, axes, strict=True):
        for i, recipe in enumerate(RECIPES):
            arms = (_BEGINNINGS.get(recipe) or RECIPES[recipe], recipe, f"{recipe}_cooldown")
            for j, (arm, (label, colour)) in enumerate(zip(arms, steps, strict=True)):
                values = results.values(str(arm), group)
                if values.size:
                    dots(one, i + (j - 1) * 0.28, values, colour, "" if i else label)
        names = [
            arm_name(recipe).replace(" → ", "\n→ ").replace(" only", "\nonly") for recipe in RECIPES
        ]
        one.set_xticks(range(len(RECIPES)), names, fontsize=_SMALL)
        one.set_title(group, fontsize=_TITLE)
        one.set_ylim(-0.03, 1.03)
        _ceiling(one, results, group)
    axes[0].set_ylabel("exact match; lines are means", fontsize=_SMALL)
    legend_below(figure, axes[0], 3)
    return figure


def proportion(results: Results) -> Any:
    """The scores against the share of code, and the loss on code."""
    shares = [share for share in _ALL_SHARES if results.has(f"share_{share}")]
    if not set(SHARES) <= set(shares):
        return None
    losses = [CODE_LOSS] if CODE_LOSS in results.table else []
    figure, axes = panels(len(results.groups) + len(losses), (_WIDE, 3.2))
    for score, one in zip([*results.groups, *losses], axes, strict=True):
        some = [share for share in shares if share or score != CODE_LOSS]
        curves_SN = np.array(results.paired(score, *(f"share_{share}" for share in some)))
        colour = _COLOURS[score]
        one.plot(some, curves_SN, color=colour, lw=0.8, alpha=0.5)
        one.plot(some, curves_SN.mean(axis=1), color=colour, lw=2.5, marker="o", ms=5)
        one.set(xticks=shares[:: 2 if len(shares) > 4 else 1])
        one.set_xlabel("% of code", fontsize=_SMALL)
        one.tick_params(labelsize=_SMALL)
        one.set_title(score, fontsize=_TITLE)
        if score == CODE_LOSS:
            one.set_ylabel("nats per token, 0 % left out", fontsize=_SMALL)
        else:
            one.set_ylim(-0.03, 1.03)
            _ceiling(one, results, score, label=True)
    axes[0].set_ylabel("exact match", fontsize=_SMALL)
    return figure


def quality(results: Results) -> Any:
    """Kinds of code: of a quarter of a phase in the small experiment, of whole runs at full size."""
    few = results.has("few_code")
    base = "few_code" if few else "share_100"
    kinds = {
        "a fifth markup": "markup",
        "15 % adjacent": "adjacent",
        "a tenth verified": "synth",
    }
    code = {label: f"{'few' if few else 'code'}_{kind}" for label, kind in kinds.items()}
    code = {label: arm for label, arm in code.items() if results.has(arm)}
    after = ("balanced_synth_to_text", "balanced_to_text")
    if "code" not in results.groups or not code or not results.has(base, *after):
        return None
    figure, (left, right) = panels(2, (_WIDE, 2.6))
    _gaps(left, results, [(label, "code", arm, base) for label, arm in code.items()])
    left.set_title("code alone: code", fontsize=_TITLE)
    left.set_xlabel(f"{_POINTS} above web code alone", fontsize=_SMALL)
    _gaps(right, results, [(group, group, *after) for group in results.groups])
    right.set_title("balanced → text, a tenth of its code verified", fontsize=_TITLE)
    right.set_xlabel(f"{_POINTS} above without", fontsize=_SMALL)
    return figure


def kinds(results: Results) -> Any:
    """Reasoning by kind of code: beside text in the small experiment, of code alone at full size."""
    names = ("text only", "web code", "with markup", "with adjacent", "with verified")
    of_code = ("share_0", "share_100", "code_markup", "code_adjacent", "code_synth")
    arms = BESIDE_TEXT if results.has(*BESIDE_TEXT) else of_code
    if "reasoning" not in results.groups or not results.has(*arms):
        return None
    results = results.shared(*arms)
    scores = [s for s in (SORTING, "reasoning", ANSWER_LOSSES["reasoning"]) if s in results.table]
    figure, axes = panels(len(scores), (_WIDE, 3.2))
    for score, one in zip(scores, axes, strict=True):
        for at, (arm, colour) in enumerate(zip(arms, _KIND_COLOURS, strict=True)):
            values = results.values(arm, score)
            dots(one, at, values, colour)
            if at < 2:
                one.axhline(values.mean(), color=colour, lw=1, ls=":", label=names[at])
        one.set_xticks(range(len(arms)), names, fontsize=_SMALL, rotation=35, ha="right")
        one.tick_params(axis="y", labelsize=_SMALL)
        one.set_title(score, fontsize=_TITLE)
    axes[0].set_ylabel("exact match; the last panel: nats", fontsize=_SMALL)
    legend_below(figure, axes[0], 2)
    return figure


_KIND_COLOURS = (GREY, GREEN, ORANGE, RED, BLUE)


def cooldown(results: Results) -> Any:
    """Exact match and losses after a cooldown minus those before it."""
    recipe, other = "balanced_to_text", "balanced_synth_to_text"
    named = {
        "with code": (f"{recipe}_cooldown", recipe),
        "without code": (f"{recipe}_cooldown_without_code", recipe),
        "with a new format": (f"{recipe}_cooldown_synth", recipe),
        "with a known one": (f"{other}_cooldown_synth", other),
    }
    arms = {words: pair for words, pair in named.items() if results.has(*pair)}
    if not arms:
        return None
    losses = [score for score in (CODE_LOSS, TEXT_LOSS) if score in results.table]
    figure, axes = panels(1 + len(losses), (_WIDE, 3.8))
    rows = [(f"{s}, {words}", s, *pair) for s in results.groups for words, pair in arms.items()]
    _gaps(axes[0], results, rows)
    axes[0].set_title("exact match", fontsize=_TITLE)
    axes[0].set_xlabel("points gained", fontsize=_SMALL)
    for score, one in zip(losses, axes[1:], strict=True):
        _gaps(one, results, [(words, score, *pair) for words, pair in arms.items()])
        one.set_title(score, fontsize=_TITLE)
        one.set_xlabel("nats per token gained", fontsize=_SMALL)
    return figure


def win_rates(results: Results) -> Any:
    """Prompts won minus those lost against text alone, by what is asked for: a dot for each seed, since seeds differ widely."""
    base = "text_only"
    asked = [kind for kind in (*ASKED, "prompts") if wins(base, kind) in results.table]
    arms = [
        arm
        for arm in results.arms
        if arm != base and any(results.values(arm, wins(base, kind)).size for kind in asked)
    ]
    if not arms:
        return None
    figure, axes = panels(len(asked), (_WIDE, 0.9 + 0.32 * len(arms)))
    for kind, one in zip(asked, axes, strict=True):
        values = {arm: 100 * results.values(arm, wins(base, kind)) for arm in arms}
        rows = [
            (arm_name(arm), x.tolist(), intervals.student(x), _WIN_COLOURS.get(kind, GREY))
            for arm, x in values.items()
            if x.size
        ]
        paired(one, rows)
        _null(one)
        one.set_title(kind, fontsize=_TITLE)
        one.set_xlabel("% of prompts won, less % lost", fontsize=_SMALL)
    for one in axes[1:]:
        one.set_yticklabels([])
    return figure


_WIN_COLOURS = dict(zip(ASKED, (BLUE, ORANGE), strict=True))


def sizes(ours: Mapping[int, Results]) -> Any:
    """What text after a balanced start gains over other recipes, by parameters: of our models and of the paper's.

    Args:
      ours: number of parameters -> the results.
    """
    arms = ("balanced_to_text", "text_only", "balanced_only")
    if len(ours) < 2 or not all(runs.has(*arms) for runs in ours.values()):
        return None
    figure, axes = panels(len(_PAPER), (_WIDE, 3.6))
    colours = {"text_only": GREY, "balanced_only": GREEN}
    for (group, of_paper), one in zip(_PAPER.items(), axes, strict=True):
        for at, (base, numbers) in enumerate(of_paper.items()):
            colour, label = colours[base], f"over {arm_name(base)}"
            means = {}
            for count, runs in ours.items():
                scores, others = runs.paired(_OURS[group], "balanced_to_text", base)
                gains = 100 * (scores - others) / others
                seen = means[count] = intervals.student(gains)
                place = count * 1.25 ** (2 * at - 1)  # the two beside each other
                one.plot([place] * len(gains), gains, "o", ms=3.5, color=colour, alpha=0.45, mew=0)
                one.errorbar(
                    place,
                    seen["value"],
                    errors([seen]),
                    color=colour,
                    fmt="_",
                    ms=11,
                    lw=1.5,
                    mew=2,
                )
            one.plot(
                list(numbers),
                list(numbers.values()),
                "D--",
                ms=6,
                lw=1,
                mfc="none",
                color=colour,
                label=label,
            )
        one.axhline(0, color="black", lw=0.8)
        one.set_xscale("log")
        one.set_xlim(1e4, 1e10)
        one.set_title(group, fontsize=_TITLE)
        one.set_xlabel("parameters", fontsize=_SMALL)
        one.tick_params(labelsize=_SMALL)
    axes[0].set_ylabel("gain, % of the other recipe's score", fontsize=_SMALL)
    legend_below(figure, axes[0], 2)
    return figure


def scale(results: Results) -> Any:
    """The recipes' scores by size, of a sweep over sizes."""
    arms = [arm for arm in RECIPES if arm != "text_only"]
    some = results.sizes
    if len(some) < 2 or not all(results.find(arm, size) for arm in arms for size in some):
        return None
    figure, axes = panels(len(results.groups), (_WIDE, 3.2))
    for group, one in zip(results.groups, axes, strict=True):
        for arm in arms:
            means = [float(results.values(arm, group, size).mean()) for size in some]
            colour = _RECIPE_COLOURS[arm]
            one.plot(range(len(some)), means, color=colour, marker="o", lw=2, label=arm_name(arm))
        one.set_xticks(range(len(some)), some)
        one.set_xlim(-0.3, len(some) - 0.7)
        one.set_title(group, fontsize=_TITLE)
    axes[0].set_ylabel("score")
    legend_below(figure, axes[0], len(arms))
    return figure
