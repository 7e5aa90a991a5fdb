"""The report of the reproduction, and a report of any sweep with the paper's arms."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.code_mix import claims, figures
from launch.papers.code_mix.arms import GROUPS, PLACES, Results, arm_name, source_name
from launch.papers.shared import page
from launch.plots import html_page, intervals, panels

_RUNS = {
    "skills": "models of 2 layers (width 64 by default), trained on documents of five "
    "generated sources (`data/code_mix/skill_sources.py`) and scored on 1,392 problems (`data/code_mix/skills.py`): "
    "*reasoning*, problems in words, and *code*, calls, with operands that no training document "
    "shows; *knowledge*, facts that text states. 400 steps of 3,072 tokens a phase",
    "packages": "the quickstart's models of 2.6M parameters on prose, docstrings, Python, C++ and markup of "
    "installed packages, scored by held-out bits per byte",
}
_KEYS = (
    *("run", "arm", "size", "seed", "parents", "tokens", "tokens_total", "epochs_total"),
    *("seconds", "read"),
)


def write_sweeps(rows: Sequence[Mapping[str, Any]], out: pathlib.Path) -> list[str]:
    """Writes report.html and the paper's figures, as far as the sweeps have its arms; returns the figures' names.

    Args:
      rows: as `measure.with_data` returns them, of sweeps whose arms are named as in
        launch/papers/code_mix/sweep.py or full_sweep.py.
      out: the folder.

    Raises:
      ValueError: none of the figures can be drawn.
    """
    results = Results(rows)
    drawn = panels.save(figures.figures({"skills": results, "packages": results}), out)
    if not drawn:
        raise ValueError(
            f"There is nothing to draw: the finished arms are {', '.join(results.arms) or 'none'}, and every figure "
            "compares arms named as in launch/papers/code_mix/sweep.py, scored by one of their evaluations or by "
            "held-out bits per byte."
        )
    seeds = ", ".join(map(str, results.seeds))
    lines = ["# What code in pre-training changes", ""]
    lines += [f"{len(rows)} runs, seeds {seeds}; means over seeds with 95 % intervals.", ""]
    for name, caption in drawn.items():
        lines += [f"## {caption}", "", f"![{caption}]({name})", ""]
    lines += _table("All arms", results, (*results.groups, *results.domains))
    html_page.write("\n".join(lines), out / "report.html")
    return list(drawn)


def _setup(parts: Mapping[str, Results]) -> list[str]:
    return [
        f"- *{PLACES[part]}*: {text}. {parts[part].amount()}, one core each."
        for part, text in _RUNS.items()
        if part in parts
    ]


def _tables(parts: Mapping[str, Results]) -> list[str]:
    scores = {
        "skills": ("Generated text and code: all arms", GROUPS),
        "packages": (
            "Installed packages: all arms, bits per byte",
            claims.TEXT_DOMAINS + claims.CODE_DOMAINS,
        ),
    }
    return [
        line
        for part, (title, names) in scores.items()
        if part in parts
        for line in _table(title, parts[part], names)
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
        rows.append((name, *cells, ", ".join(shares), ", ".join(epochs)))
    last = ("tokens read in its own steps", "times each source was read in all")
    return page.table(("arm", *scores, *last), rows, title)


def _record(parts: Mapping[str, Results]) -> dict[str, Any]:
    runs = []
    for results in parts.values():
        for row in results.rows:
            bits = {task: values.get("bits_per_byte") for task, values in row["held_out"].items()}
            own = {key: row[key] for key in _KEYS}
            runs.append({**own, "bits_per_byte": bits, **row["evaluations"]})
    return {"runs": runs}


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
    record=_record,
    figures_last=True,
)
write = REPORT.write
