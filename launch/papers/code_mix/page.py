"""The report of the reproduction, and a report of any sweep with the paper's arms."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.code_mix import claims, figures
from launch.papers.code_mix.arms import GROUPS, PLACES, PLAIN, Results, arm_name, source_name
from launch.papers.shared import claim, page
from launch.plots import intervals, panels

_SETUP = (
    "models of 2 layers of width 64, trained on documents of five generated sources "
    "(`data/code_mix/skill_sources.py`) and scored on 1,392 problems (`data/code_mix/skills.py`): *reasoning*, problems "
    "in words, and *code*, calls, with operands that no training document shows; *knowledge*, facts that text states. "
    "Of a call its last value counts, so that it may be worked out first, as verified code does. Nine in "
    "ten programs of web code are off by one for operands with a zero, 27 % of the problems: a model that copies them is "
    "right in the other calls alone. "
    "A phase is 2.4 million tokens with a loss in every arm"
)
_LIMITS = (
    "- *judged answers*: 150 problems in words that ask for all steps and 50 facts; of two answers the one with more "
    "right words wins (`launch/papers/code_mix/judged.py`), equal ones are a tie.",
    "- *not measured here*: the paper's sizes, since at this size knowledge is limited by how often a fact is read and "
    "not by the width of the model; recipes on real text and code, which the quickstart shows for one run "
    "(`docs/quickstart.md`); what markup or verified code in place of code does to reasoning, which code alone cannot "
    "show here.",
)


def sweep_lines(rows: Sequence[Mapping[str, Any]], out: pathlib.Path) -> list[str]:
    """Writes the paper's figures, as far as sweeps have its arms; returns lines of Markdown with them, or none.

    Args:
      rows: as `measure.run` returns them, of sweeps whose arms are named as in launch/papers/code_mix/sweep.py or
        full_sweep.py, scored by one of their evaluations or by held-out bits per byte.
      out: the folder.
    """
    results = Results(rows)
    drawn = panels.save(figures.figures({"skills": results}), out)
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
    return [f"- *{PLACES['skills']}*: {_SETUP}. {runs.amount()}, one core each.", *_LIMITS]


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
    claims=claims.CLAIMS,
    places=PLACES,
    read=lambda measured: {part: Results(rows) for part, rows in measured.items() if rows},
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
    figures_last=True,
)
