"""The page of code_mix and its headline, and a report of any sweep with the paper's arms; claims.py has the claims."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.code_mix import figures
from espalier.launch.papers.code_mix.claims import CLAIMS
from espalier.launch.papers.code_mix.experiment import PHASES, read
from espalier.launch.papers.code_mix.scores import (
    ANSWER_LOSSES,
    CODE_LOSS,
    GROUPS,
    PLAIN,
    SORTING,
    Results,
    arm_name,
    copied,
    source_name,
)
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.page import Headline, Prose
from espalier.launch.papers.shared.results import compare
from espalier.launch.plots import intervals
from espalier.launch.plots.panels import save

_PROSE = Prose.of(__name__)

PLACES = {
    "skills": "generated text",
    "narrow": "generated text, a quarter of the parameters",
    "kinds": "generated text with kinds of code",
}
HEADLINE = Headline(
    claim="C1b",
    what="sorting problems in words, text after a balanced start over text alone",
    unit="%",
    paper=8.2,
    measure=compare(SORTING, ("balanced_to_text", "text_only"), relative=True),
    part="skills",
    why=_PROSE("why"),
    mind=_PROSE("mind"),
)


def _figures(parts: Mapping[str, Results]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    small = parts.get("skills", Results(()))
    beside_text = parts.get("kinds", small)
    drawn = {
        "recipes.png": (figures.recipes, _PROSE("recipes_figure")),
        "phases.png": (figures.phases, _PROSE("phases_figure")),
        "proportion.png": (figures.proportion, _PROSE("proportion_figure")),
        "quality.png": (figures.quality, _PROSE("quality_figure")),
        "cooldown.png": (figures.cooldown, _PROSE("cooldown_figure")),
        "win_rates.png": (figures.win_rates, _PROSE("win_rates_figure")),
        "scale.png": (figures.scale, _PROSE("scale_figure")),
    }
    recipes = (parts[part] for part in ("skills", "narrow") if part in parts)
    ours = {runs.parameters: runs for runs in recipes if runs.parameters}
    return {
        **{
            name: (plot(small) if small.groups else None, caption)
            for name, (plot, caption) in drawn.items()
        },
        "kinds.png": (
            figures.kinds(beside_text) if beside_text.groups else None,
            _PROSE("kinds_figure"),
        ),
        "sizes.png": (figures.sizes(ours), _PROSE("sizes_figure")),
    }


def lines_of(rows: Sequence[Mapping[str, Any]], out: pathlib.Path) -> list[str]:
    """Writes the paper's figures, as far as sweeps have its arms; returns lines of Markdown with them, or none.

    Args:
      rows: as `experiment.run` returns them, of sweeps whose arms are named as in experiment.py, scored by one of their evaluations or by held-out bits per byte.
      out: the folder.
    """
    results = Results(rows)
    drawn = save(_figures({"skills": results}), out)
    if not drawn:
        return []
    lines = ["# What code in pre-training changes", "", "Means over seeds with 95 % intervals.", ""]
    for name, caption in drawn.items():
        lines += [f"## {caption}", "", f"![{caption}]({name})", ""]
    return lines + _table("Scores of all arms", results, (*results.groups, *results.domains))


def _setup(parts: Mapping[str, Results]) -> list[str]:
    more = {"skills": {"ceiling": copied()}}
    return [
        _PROSE(part, amount=runs.amount(), parameters=runs.parameters, **more.get(part, {}))
        for part, runs in parts.items()
        if part in PLACES
    ]


def _tables(parts: Mapping[str, Results]) -> list[str]:
    scores = (*GROUPS, SORTING, PLAIN, CODE_LOSS)
    more = {"kinds": (ANSWER_LOSSES["reasoning"],)}
    titles = {
        "skills": "Generated text and code: all arms",
        "narrow": "A quarter of the parameters",
        "kinds": "Kinds of code beside text",
    }
    return [
        line
        for part, title in titles.items()
        if part in parts
        for line in _table(title, parts[part], (*scores, *more.get(part, ())))
    ]


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
        seeds = str(len(results.find(arm, size)))
        rows.append((name, seeds, *cells, ", ".join(shares), ", ".join(epochs)))
    last = ("tokens read in its own steps", "times each source was read in all")
    return page.table(("arm", "seeds", *scores, *last), rows, title)


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
    figures=_figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
    figures_last=True,
    headline=HEADLINE,
)


def sweep_lines(folders: Sequence[str], out: pathlib.Path) -> list[str]:
    """Returns lines of Markdown with the figures and the table of scores; none for sweeps without the paper's arms."""
    from espalier.launch.sweep.folder import read_results

    known = {arm for arms in PHASES for arm in arms}
    ours = [f for f in folders if any(row["arm"] in known for row in read_results(f))]
    rows = [row for folder in ours for row in read(folder, out / "judged")]
    return lines_of(rows, out) if rows else []
