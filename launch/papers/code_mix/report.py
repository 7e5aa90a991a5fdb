"""The claims of code_mix on small models and how each is measured, with plots and the page, and a report of any sweep with its arms.

Arms of the same seed share their initialisation, their documents and their problems, so that they are compared in
pairs. What is so by construction is no claim: text alone shows no calls, and code alone neither facts nor words.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.code_mix.experiment import (
    GROUPS,
    PHASES,
    PLACES,
    PLAIN,
    RECIPES,
    SHARES,
    Results,
    arm_name,
    read,
    source_name,
    wins,
)
from espalier.launch.papers.code_mix.judged import SHARES as OUTCOMES
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import compare
from espalier.launch.plots import intervals
from espalier.launch.plots.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    dots,
    legend_below,
    paired,
    panels,
    save,
)

_PROSE = Prose.of(__name__)

SHARE_ERROR = 0.005  # of tokens: the remainder that a batch cannot be divided into
TOKEN_ERROR = 0.005  # of tokens: a batch in each phase
NO_WORSE = LOSS = 0.03  # of exact match
_WITH_CODE = [share for share in SHARES if share]
_STARTS = ("balanced_to_text", "code_to_text")
_COOLDOWN, _WITHOUT_CODE = (f"balanced_to_text_cooldown{x}" for x in ("", "_without_code"))


def mixtures(runs: Results, where: str) -> list[Effect]:
    """Compares the shares of tokens that were read with those that were configured, and the tokens of arms that are compared."""
    errors: dict[int, float] = {}
    for row in runs.rows:
        error = max(abs(row["asked"][s] - row["read"].get(s, 0.0)) for s in row["asked"])
        errors[row["seed"]] = max(errors.get(row["seed"], 0.0), error)
    exact: dict[str, Any] = {"where": where, "digits": 4, "exact": True}
    out = [_exact("largest error of a source's share of tokens", errors, SHARE_ERROR, exact)]
    for arms in PHASES:
        tokens = {arm: runs.find(arm) for arm in arms}
        spread = {
            seed: max(read) / min(read) - 1
            for seed in runs.seeds
            if len(read := [at[seed]["loss_tokens_total"] for at in tokens.values() if seed in at])
            > 1
        }
        what = f"spread of the tokens with a loss that arms have read, {arms[0].replace('_', ' ')} and others"
        out.append(_exact(what, spread, TOKEN_ERROR, exact))
    return [effect for effect in out if effect.by_seed]


def _exact(
    what: str, by_seed: Mapping[int, float], below: float, more: Mapping[str, Any]
) -> Effect:
    return Effect(what=what, by_seed=by_seed, below=below, **more)


def of_shares(
    group: str,
    shares: Sequence[int],
    what: str,
    values: Callable[[np.ndarray], np.ndarray],
) -> Measure:
    """Returns a measure of how a score depends on the share of code; `values` makes a number by seed of [share, seed]."""
    arms = [f"share_{share}" for share in shares]

    def measure(runs: Results, where: str) -> list[Effect]:
        if not runs.has(*arms):
            return []
        scores = [runs.scores(arm, group) for arm in arms]
        seeds = sorted(set.intersection(*(set(one.index) for one in scores)))
        curve_SN = np.array([one[seeds] for one in scores])
        means = zip(shares, curve_SN.mean(axis=1), strict=True)
        return [
            Effect(
                where=where,
                what=what,
                by_seed=dict(zip(map(int, seeds), map(float, values(curve_SN)), strict=True)),
                above=0.0,
                note=f"{group} by share: " + ", ".join(f"{s} % {mean:.3f}" for s, mean in means),
                unmet=runs.unmet(group, *arms),
            )
        ]

    return measure


def _slope(curve_SN: np.ndarray) -> np.ndarray:
    return np.polyfit(np.array(_WITH_CODE) / 100, curve_SN, 1)[0]


def _bend(curve_SN: np.ndarray) -> np.ndarray:
    none, some, most = curve_SN
    return 0.5 * (none - most) - (none - some)


def verified(runs: Results, where: str) -> list[Effect]:
    """Compares verified with web code of as many tokens."""
    effects = runs.gain(where, "code", "synth", "share_100")
    plain = runs.paired(PLAIN, "synth", "share_100")
    if not effects or not plain[0].size:
        return effects
    synth, web = (values.mean() for values in plain)
    note = f"{effects[0].note}; {PLAIN}: synth {synth:.3f}, share 100 {web:.3f}"
    return [dataclasses.replace(effects[0], note=note)]


CLAIMS = (
    _PROSE.claim("C0", {"skills": [mixtures]}, required=True),
    _PROSE.claim(
        "C1a",
        {"skills": [compare("code", *(("balanced_only", other) for other in _STARTS))]},
        required=True,
    ),
    _PROSE.claim(
        "C1b", {"skills": [compare("reasoning", *((start, "text_only") for start in _STARTS))]}
    ),
    _PROSE.claim("C1c", {"skills": [compare("knowledge", _STARTS)]}),
    _PROSE.claim(
        "C2a",
        {
            "skills": [
                of_shares("code", _WITH_CODE, "slope of code in its share, from 0 to 1", _slope)
            ]
        },
        required=True,
    ),
    _PROSE.claim(
        "C2b",
        {
            "skills": [
                compare("knowledge", *((f"share_{s}", "share_75") for s in (0, 25)), above=LOSS)
            ]
        },
        required=True,
    ),
    _PROSE.claim(
        "C2c", {"skills": [compare("reasoning", ("share_25", "share_0"), ("share_50", "share_0"))]}
    ),
    _PROSE.claim(
        "C2d",
        {
            "skills": [
                of_shares(
                    "knowledge",
                    (0, 25, 75),
                    "half of what 75 % code costs knowledge, less what 25 % costs",
                    _bend,
                )
            ]
        },
    ),
    _PROSE.claim("C3a", {"skills": [verified]}, required=True),
    _PROSE.claim(
        "C3b",
        {
            "skills": [
                compare("code", ("code_synth", "share_100")),
                *(
                    compare(group, ("balanced_synth_to_text", "balanced_to_text"))
                    for group in ("code", "reasoning")
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C3c",
        {"skills": [compare("code", ("share_100", "code_markup"), ("share_100", "code_adjacent"))]},
    ),
    _PROSE.claim(
        "C4a",
        {
            "skills": [
                compare(group, (_COOLDOWN, "balanced_to_text"), above=-NO_WORSE) for group in GROUPS
            ]
        },
    ),
    _PROSE.claim(
        "C4b",
        {
            "skills": [
                compare("code", (_COOLDOWN, _WITHOUT_CODE)),
                compare(
                    "code",
                    (_WITHOUT_CODE, "balanced_to_text"),
                    above=-float("inf"),
                    below=NO_WORSE,
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C5a",
        {
            "skills": [
                compare(
                    wins("text_only"), *((arm, "text_only") for arm in ("balanced_only", *_STARTS))
                )
            ]
        },
    ),
    _PROSE.claim(
        "C5b",
        {
            "skills": [
                compare(wins("balanced_to_text"), (_COOLDOWN, "balanced_to_text")),
            ]
        },
    ),
)


_GROUP_COLOURS = dict(zip(GROUPS, (BLUE, ORANGE, GREEN), strict=True))
_RECIPE_COLOURS = dict(zip(RECIPES, (GREY, GREEN, BLUE, RED), strict=True))
_BEGINNINGS = {"text_only": "share_0", "balanced_only": "share_50"}  # half of their own tokens
_ALL_SHARES = (0, 25, 50, 75, 90, 100)


def figures(parts: Mapping[str, Results]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    small = parts.get("skills", Results(()))
    scored = {
        "recipes.png": (
            _recipes,
            _PROSE("recipes_figure"),
        ),
        "phases.png": (_phases, _PROSE("phases_figure")),
        "proportion.png": (_proportion, _PROSE("proportion_figure")),
        "quality.png": (_quality, _PROSE("quality_figure")),
        "cooldown.png": (_cooldown, _PROSE("cooldown_figure")),
        "win_rates.png": (_win_rates, _PROSE("win_rates_figure")),
        "scale.png": (_scale, _PROSE("scale_figure")),
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
    if not results.has(*RECIPES, *_BEGINNINGS.values()):
        return None
    figure, axes = panels(len(results.groups), (12, 4.2), share_y=True)
    phases = (("first half", ORANGE), ("all steps", BLUE), ("and cooldown with code", GREEN))
    for group, one in zip(results.groups, axes, strict=True):
        for i, recipe in enumerate(RECIPES):
            arms = (_BEGINNINGS.get(recipe) or RECIPES[recipe], recipe, f"{recipe}_cooldown")
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
    if not set(SHARES) <= set(shares):
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
    named = {"with code": f"{recipe}_cooldown", "without code": f"{recipe}_cooldown_without_code"}
    arms = {words: arm for words, arm in named.items() if results.has(arm)}
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


def lines_of(rows: Sequence[Mapping[str, Any]], out: pathlib.Path) -> list[str]:
    """Writes the paper's figures, as far as sweeps have its arms; returns lines of Markdown with them, or none.

    Args:
      rows: as `experiment.run` returns them, of sweeps whose arms are named as in experiment.py, scored by one of their evaluations or by held-out bits per byte.
      out: the folder.
    """
    results = Results(rows)
    drawn = save(figures({"skills": results}), out)
    if not drawn:
        return []
    lines = ["# What code in pre-training changes", "", "Means over seeds with 95 % intervals.", ""]
    for name, caption in drawn.items():
        lines += [f"## {caption}", "", f"![{caption}]({name})", ""]
    return lines + _table("Scores of all arms", results, (*results.groups, *results.domains))


def _setup(parts: Mapping[str, Results]) -> list[str]:
    if "skills" not in parts:
        return []
    runs = parts["skills"]
    text = _PROSE("skills", amount=runs.amount())
    return [text]


def _tables(parts: Mapping[str, Results]) -> list[str]:
    if "skills" not in parts:
        return []
    return _table("Generated text and code: all arms", parts["skills"], (*GROUPS, PLAIN))


def _table(title: str, results: Results, scores: Sequence[str]) -> list[str]:
    """Returns the table of scores, shares of tokens read, and times each source was read, earlier phases included."""
    rows = []
    for arm, size in dict.fromkeys((row["arm"], row["size"]) for row in results.rows):
        means = [intervals.over_seeds(results.values(arm, score, size)) for score in scores]
        row = next(iter(results.find(arm, size).values()))
        name = arm_name(arm) + ("" if size in (None, results.main) else f", {size}")
        shares = [f"{source_name(s)} {share:.1%}" for s, share in row["read"].items() if share]
        epochs = [f"{source_name(s)} {n:.2f}" for s, n in row["epochs_total"].items() if n]
        cells = map(intervals.text, means)
        rows.append((name, *cells, ", ".join(shares), ", ".join(epochs)))
    last = ("tokens read in its own steps", "times each source was read in all")
    return page.table(("arm", *scores, *last), rows, title)


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the rows with arms exchanged at random, also where an arm's answers are compared with others'."""
    out = claim.shuffle_arms(measured, rng)
    for rows in out.values():
        names = {(row["seed"], row["run"].partition("/")[0]): row["arm"] for row in rows}
        for row in rows:
            judged = row["judged"].items()
            row["judged"] = {names[row["seed"], other]: shares for other, shares in judged}
    return out


REPORT = page.Report(
    slug="code_mix",
    title="Code in pre-training: the paper's claims on small models",
    source="[To Code, or Not To Code?, arXiv 2408.10914](https://arxiv.org/abs/2408.10914)",
    claims=CLAIMS,
    places=PLACES,
    read=lambda measured: {part: Results(rows) for part, rows in measured.items() if rows},
    figures=figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
    figures_last=True,
)


def sweep_lines(folders: Sequence[str], out: pathlib.Path) -> list[str]:
    """Returns lines of Markdown with the figures and the table of scores; none for sweeps without the paper's arms."""
    from espalier.launch.sweep.folder import read_results

    known = {arm for arms in PHASES for arm in arms}
    ours = [f for f in folders if any(row["arm"] in known for row in read_results(f))]
    rows = [row for folder in ours for row in read(folder, out / "judged")]
    return lines_of(rows, out) if rows else []
