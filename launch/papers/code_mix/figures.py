"""Plots of the sweeps' results; None where there is nothing to plot."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.code_mix.arms import GROUPS, Results, arm_name, source_name
from launch.papers.code_mix.sweep import RECIPES, SHARES
from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, RED, bar, legend_below, line, panels

_GROUP_COLOURS = dict(zip(GROUPS, (BLUE, ORANGE, GREEN), strict=True))
_RECIPE_COLOURS = dict(zip(RECIPES, (GREY, GREEN, BLUE, RED), strict=True))
_SCORES = (0, 1.02)  # intervals of few seeds reach beyond what there can be
_RELATIVE_FROM = 0.05  # below this a mean is too small to divide by


def figures(parts: Mapping[str, Results]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    small, packages = (parts.get(part, Results(())) for part in ("skills", "packages"))
    scored = {
        "recipes.png": (_recipes, "Change against text-only, by group and recipe"),
        "phases.png": (_phases, "Scores after each phase, by recipe; dots are seeds"),
        "proportion.png": (_proportion, "Scores against the share of code"),
        "quality.png": (_quality, "Kinds of code, relative to web code alone"),
        "cooldown.png": (_cooldown, "What a cooldown changes, and its learning rate"),
        "scale.png": (_scale, "Scores against size"),
    }
    drawn = {
        name: (plot(small) if small.groups else None, caption)
        for name, (plot, caption) in scored.items()
    }
    return drawn | {"packages.png": (_packages(packages), "Bits per byte by recipe")}


def _changes(ones: np.ndarray, others: np.ndarray, relative: bool) -> np.ndarray:
    """Returns differences of pairs in percent of the others' mean, or in points of exact match."""
    return 100 * (ones - others) / (others.mean() if relative else 1.0)


def _bars(axes: Any, results: Results, group: str, cases: Mapping[str, str], base: str) -> None:
    """Draws the changes of arms, {label: arm}, against a base."""
    (level,) = results.paired(group, base)
    relative = bool(level.mean() >= _RELATIVE_FROM)
    for i, arm in enumerate(cases.values()):
        changes = _changes(*results.paired(group, arm, base), relative)
        bar(axes, i, changes, 0.7, _RECIPE_COLOURS.get(arm, _GROUP_COLOURS[group]))
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.set_title(f"{group} ({arm_name(base)}: {level.mean():.2f})", fontsize=10)
    unit = "% of its score" if relative else "points"
    axes.set_ylabel(f"change against {arm_name(base)},\n{unit}", fontsize=9)


def _recipes(results: Results) -> Any:
    if not results.has(*RECIPES):
        return None
    figure, axes = panels(len(results.groups), (12, 4))
    cases = {arm_name(r).replace(" → ", "\n→ "): r for r in RECIPES if r != "text_only"}
    for group, one in zip(results.groups, axes, strict=True):
        _bars(one, results, group, cases, "text_only")
    return figure


def _phases(results: Results) -> Any:
    cooled = [f"{recipe}_cooldown" for recipe in RECIPES]
    if not results.has(*RECIPES, *cooled):
        return None
    figure, axes = panels(len(results.groups), (12, 4.2), share_y=True)
    starts = {"text_only": "share_0", "balanced_only": "share_50"}
    width = 0.27
    phases = (("first half", ORANGE), ("all steps", BLUE), ("and cooldown", GREEN))
    for group, one in zip(results.groups, axes, strict=True):
        for i, recipe in enumerate(RECIPES):
            arms = (starts.get(recipe) or RECIPES[recipe], recipe, f"{recipe}_cooldown")
            for j, (arm, (label, colour)) in enumerate(zip(arms, phases, strict=True)):
                values = results.values(arm, group)
                bar(one, i + (j - 1) * width, values, width, colour, "" if i else label)
        names = [
            arm_name(recipe).replace(" → ", "\n→ ").replace(" only", "\nonly") for recipe in RECIPES
        ]
        one.set_xticks(range(len(RECIPES)), names, fontsize=8)
        one.set_title(group, fontsize=10)
        one.set_ylim(*_SCORES)
    axes[0].set_ylabel("score")
    legend_below(figure, axes[0], 3)
    return figure


def _proportion(results: Results) -> Any:
    arms = [f"share_{share}" for share in SHARES]
    if not results.has(*arms):
        return None
    figure, axes = panels(len(results.groups), (12, 3.8))
    for group, one in zip(results.groups, axes, strict=True):
        line(one, SHARES, results.paired(group, *arms), _GROUP_COLOURS[group], group)
        one.set(ylim=_SCORES, xticks=SHARES, xlabel="share of code, % of tokens")
        one.set_title(group, fontsize=10)
    axes[0].set_ylabel("score; band: 95 % over seeds")
    return figure


def _quality(results: Results) -> Any:
    code = {
        "+ markup": "code_markup",
        "+ adjacent": "code_adjacent",
        "+ synth": "code_synth",
        "synth alone": "synth",
    }
    after = ("balanced_synth_to_text", "balanced_to_text")
    if "code" not in results.groups or not results.has("share_100", *code.values(), *after):
        return None
    figure, (left, right) = panels(2, (12, 4))
    _bars(left, results, "code", code, "share_100")
    left.set_title("code alone: score of code", fontsize=10)
    left.set_ylabel("change against web code alone, %", fontsize=9)
    for i, group in enumerate(results.groups):
        ones, others = results.paired(group, *after)
        relative = bool(others.mean() >= _RELATIVE_FROM)
        bar(right, i, _changes(ones, others, relative), 0.7, _GROUP_COLOURS[group])
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks(range(len(results.groups)), results.groups)
    right.set_title("balanced + synth → text against balanced → text", fontsize=10)
    right.set_ylabel("change, % (points where below 0.05)", fontsize=9)
    return figure


def _cooldown(results: Results) -> Any:
    arms = {
        "none": ("balanced_to_text", GREY),
        "without code": ("balanced_to_text_cooldown_without_code", ORANGE),
        "with 20 % code": ("balanced_to_text_cooldown", BLUE),
    }
    if not results.has(*(arm for arm, _ in arms.values())):
        return None
    figure, (left, right) = panels(2, (12, 4))
    width = 0.27
    for j, (label, (arm, colour)) in enumerate(arms.items()):
        for i, group in enumerate(results.groups):
            values = results.values(arm, group)
            bar(left, i + (j - 1) * width, values, width, colour, "" if i else label)
    left.set_xticks(range(len(results.groups)), results.groups)
    left.set(ylabel="score", ylim=_SCORES)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
    left.legend(title="cooldown", frameon=False, fontsize=8, ncols=3, **above)
    before = 0
    phases = {
        "balanced": ("share_50", GREEN),
        "text with 10 % code": arms["none"],
        "cooldown": arms["with 20 % code"],
    }
    for label, (arm, colour) in phases.items():
        steps, rates = zip(*next(iter(results.find(arm).values()))["learning_rates"], strict=True)
        right.plot(np.add(before, steps), rates, color=colour, lw=2, label=label)
        before += steps[-1]
    right.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    return figure


def _scale(results: Results) -> Any:
    arms = ("balanced_only", "balanced_to_text")
    sizes, places = results.sizes, range(len(results.sizes))
    if len(sizes) < 2 or not all(results.find(arm, size) for arm in arms for size in sizes):
        return None
    figure, axes = panels(len(arms), (10, 4), share_y=True)
    for arm, one in zip(arms, axes, strict=True):
        for group in results.groups:
            curves = results.paired(group, *((arm, size) for size in sizes))
            line(one, places, curves, _GROUP_COLOURS[group], group)
        one.set_xticks(places, sizes)
        one.set_ylim(*_SCORES)
        one.set_title(arm_name(arm), fontsize=10)
    axes[0].set_ylabel("score; band: 95 % over seeds")
    legend_below(figure, axes[0], 3)
    return figure


def _packages(results: Results) -> Any:
    domains = results.domains
    if not domains or not results.has(*RECIPES):
        return None
    figure, (axes,) = panels(1, (9, 4.2))
    width = 0.2
    for j, (recipe, colour) in enumerate(_RECIPE_COLOURS.items()):
        for i, domain in enumerate(domains):
            values = results.values(recipe, domain)
            at = i + (j - 1.5) * width
            bar(axes, at, values, width, colour, "" if i else arm_name(recipe))
    axes.set_xticks(range(len(domains)), [source_name(domain) for domain in domains])
    axes.set_ylabel("bits per byte, held out (lower is better)")
    legend_below(figure, axes, 4)
    return figure
