"""Plots of the sweeps' results; None where there is nothing to plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.code_mix.arms import GROUPS, Results, arm_name
from launch.papers.code_mix.judged import SHARES as OUTCOMES
from launch.papers.code_mix.sweep import COOLDOWNS, RECIPES
from launch.papers.code_mix.sweep import SHARES as SMALL_SHARES
from launch.plots import intervals
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, RED, dots, legend_below, paired, panels

_GROUP_COLOURS = dict(zip(GROUPS, (BLUE, ORANGE, GREEN), strict=True))
_RECIPE_COLOURS = dict(zip(RECIPES, (GREY, GREEN, BLUE, RED), strict=True))
_STARTS = {"text_only": "share_0", "balanced_only": "share_50"}  # half of their own tokens
_ALL_SHARES = (0, 25, 50, 75, 90, 100)


def figures(parts: Mapping[str, Results]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    small = parts.get("skills", Results(()))
    scored = {
        "recipes.png": (
            _recipes,
            "Scores less those of text alone, by group and recipe, in points",
        ),
        "phases.png": (_phases, "Scores after each phase, by recipe"),
        "proportion.png": (_proportion, "Scores against the share of code; thin lines are seeds"),
        "quality.png": (_quality, "Kinds of code, in points of exact match"),
        "cooldown.png": (_cooldown, "Scores after a cooldown less those before it; learning rate"),
        "win_rates.png": (_win_rates, "Judged answers against text alone, mean over seeds"),
        "scale.png": (_scale, "Scores by size, mean over seeds"),
    }
    return {
        name: (plot(small) if small.groups else None, caption)
        for name, (plot, caption) in scored.items()
    }


def _gaps(axes: Any, results: Results, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Draws differences of pairs of arms in points: (label, group, arm, other arm) from the top."""
    shown = []
    for label, group, arm, base in rows:
        ones, others = results.paired(group, arm, base)
        gaps = 100 * (ones - others)
        if gaps.size:
            shown.append((label, gaps, intervals.student(gaps), _GROUP_COLOURS[group]))
    paired(axes, shown)
    axes.axvline(0, color="black", lw=0.8)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.grid(visible=False, axis="y")


def _recipes(results: Results) -> Any:
    if not results.has(*RECIPES):
        return None
    figure, axes = panels(len(results.groups), (12, 2.6))
    for group, one in zip(results.groups, axes, strict=True):
        others = [recipe for recipe in RECIPES if recipe != "text_only"]
        _gaps(one, results, [(arm_name(r), group, r, "text_only") for r in others])
        (level,) = results.paired(group, "text_only")
        one.set_title(f"{group} (text only: {level.mean():.2f})", fontsize=10)
        one.set_xlabel("points above text only", fontsize=9)
    for one in axes[1:]:
        one.set_yticklabels([])
    return figure


def _phases(results: Results) -> Any:
    if not results.has(*RECIPES, *_STARTS.values()):
        return None
    figure, axes = panels(len(results.groups), (12, 4.2), share_y=True)
    phases = (("first half", ORANGE), ("all steps", BLUE), ("and cooldown with code", GREEN))
    for group, one in zip(results.groups, axes, strict=True):
        for i, recipe in enumerate(RECIPES):
            arms = (_STARTS.get(recipe) or RECIPES[recipe], recipe, f"{recipe}_cooldown")
            for j, (arm, (label, colour)) in enumerate(zip(arms, phases, strict=True)):
                values = results.values(str(arm), group)
                if values.size:
                    dots(one, i + (j - 1) * 0.28, values, colour, "" if i else label)
        names = [
            arm_name(recipe).replace(" → ", "\n→ ").replace(" only", "\nonly") for recipe in RECIPES
        ]
        one.set_xticks(range(len(RECIPES)), names, fontsize=8)
        one.set_title(group, fontsize=10)
        one.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("score: dots are seeds, lines their mean")
    legend_below(figure, axes[0], 3)
    return figure


def _proportion(results: Results) -> Any:
    shares = [share for share in _ALL_SHARES if results.has(f"share_{share}")]
    if not set(SMALL_SHARES) <= set(shares):
        return None
    figure, axes = panels(len(results.groups), (12, 3.8), share_y=True)
    for group, one in zip(results.groups, axes, strict=True):
        curves_SN = np.array(results.paired(group, *(f"share_{share}" for share in shares)))
        colour = _GROUP_COLOURS[group]
        one.plot(shares, curves_SN, color=colour, lw=0.8, alpha=0.5)
        one.plot(shares, curves_SN.mean(axis=1), color=colour, lw=2.5, marker="o", ms=5)
        one.set(xticks=shares, xlabel="share of code, % of tokens", ylim=(-0.03, 1.03))
        one.set_title(group, fontsize=10)
    axes[0].set_ylabel("score")
    return figure


def _quality(results: Results) -> Any:
    code = {
        "a fifth markup": "code_markup",
        "15 % adjacent": "code_adjacent",
        "a tenth synth": "code_synth",
        "synth alone": "synth",
    }
    after = ("balanced_synth_to_text", "balanced_to_text")
    code = {label: arm for label, arm in code.items() if results.has(arm)}
    if "code" not in results.groups or not code or not results.has("share_100", *after):
        return None
    figure, (left, right) = panels(2, (12, 2.8))
    _gaps(left, results, [(label, "code", arm, "share_100") for label, arm in code.items()])
    left.set_title("code alone: exact match of code", fontsize=10)
    left.set_xlabel("points above web code alone", fontsize=9)
    _gaps(right, results, [(group, group, *after) for group in results.groups])
    right.set_title("balanced → text: a tenth of its code verified", fontsize=10)
    right.set_xlabel("points above balanced → text", fontsize=9)
    return figure


def _cooldown(results: Results) -> Any:
    recipe = "balanced_to_text"
    arms = {
        words: arm
        for arm, (of, code) in COOLDOWNS.items()
        for words in [f"{code} code"]
        if of == recipe and results.has(arm)
    }
    if not arms or not results.has(recipe, "share_50"):
        return None
    figure, (left, right) = panels(2, (12, 3.4))
    rows = [
        (f"{group}, {words}", group, arm, recipe)
        for group in results.groups
        for words, arm in arms.items()
    ]
    _gaps(left, results, rows)
    left.set_xlabel("points above balanced → text without a cooldown", fontsize=9)
    before = 0
    for label, arm, colour in (
        ("balanced", "share_50", GREEN),
        ("text with 10 % code", recipe, GREY),
        ("cooldown", next(iter(arms.values())), BLUE),
    ):
        steps, rates = zip(*next(iter(results.find(arm).values()))["learning_rates"], strict=True)
        right.plot(np.add(before, steps), rates, color=colour, lw=2, label=label)
        before += steps[-1]
    right.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    return figure


def _win_rates(results: Results) -> Any:
    base = "text_only"
    arms = [
        arm
        for arm in results.arms
        if any(row.get("judged", {}).get(base) for row in results.find(arm).values())
    ]
    if not arms:
        return None
    figure, (axes,) = panels(1, (9, 0.8 + 0.45 * len(arms)))
    for at, arm in enumerate(arms):
        shares = [row["judged"][base] for row in results.find(arm).values() if row.get("judged")]
        left = 0.0
        for outcome, colour in zip(OUTCOMES, (GREEN, "#DDDDDD", RED), strict=True):
            width = float(np.mean([one[outcome] for one in shares]))
            axes.barh(at, width, 0.7, left, color=colour, label="" if at else outcome)
            if width > 0.04:
                text = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(left + width / 2, at, f"{100 * width:.0f}", **text)
            left += width
    axes.set_yticks(range(len(arms)), [arm_name(arm) for arm in arms], fontsize=9)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set(xlim=(0, 1), xlabel="share of prompts, against text only without a cooldown")
    axes.grid(visible=False)
    legend_below(figure, axes, 3)
    return figure


def _scale(results: Results) -> Any:
    arms = [arm for arm in RECIPES if arm != "text_only"]
    sizes = results.sizes
    if len(sizes) < 2 or not all(results.find(arm, size) for arm in arms for size in sizes):
        return None
    figure, axes = panels(len(results.groups), (10, 4))
    for group, one in zip(results.groups, axes, strict=True):
        for arm in arms:
            means = [float(results.values(arm, group, size).mean()) for size in sizes]
            colour = _RECIPE_COLOURS[arm]
            one.plot(range(len(sizes)), means, color=colour, marker="o", lw=2, label=arm_name(arm))
        one.set_xticks(range(len(sizes)), sizes)
        one.set_xlim(-0.3, len(sizes) - 0.7)
        one.set_title(group, fontsize=10)
    axes[0].set_ylabel("score")
    legend_below(figure, axes[0], len(arms))
    return figure
