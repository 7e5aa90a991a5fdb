"""The report: what holds and what does not, as a page that people read and as JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.code_mix import claims, figures
from launch.papers.shared import claim
from launch.papers.shared.claim import Claim
from launch.papers.shared.code_mix_results import GROUPS, Results
from launch.plots import html_page, intervals


def write(found: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]) -> Sequence[Claim]:
    """Writes code_mix.md, code_mix/results.json and the plots into `out`.

    Args:
      found: by `experiment.run`.
      out: the folder, such as docs/reproductions.
      facts: command, versions and whatever else the numbers depend on.

    Returns:
      The claims.
    """
    folder = out / "code_mix"
    drawn = figures.draw(found, folder)
    judged = claims.claims(found)
    record = {
        **facts,
        "claims": claim.record(judged),
        "runs": [_kept(row) for rows in found.values() for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "code_mix.md").write_text("\n".join(_page(found, judged, drawn, facts)) + "\n")
    return judged


def write_sweeps(rows: Sequence[Mapping[str, Any]], out: pathlib.Path) -> list[str]:
    """Writes report.html and the paper's figures, as far as the sweeps have its arms, into `out`.

    Args:
      rows: as `experiment.with_data` returns them, of sweeps whose arms are named as in
        launch/papers/code_mix/sweep.py or full_sweep.py.
      out: the folder.

    Returns:
      The figures' names.

    Raises:
      ValueError: none of the figures can be drawn.
    """
    results = Results(rows)
    drawn = figures.draw({"skills": rows, "packages": rows}, out)
    if not drawn:
        arms = ", ".join(dict.fromkeys(row["arm"] for row in rows))
        raise ValueError(
            f"There is nothing to draw: the finished arms are {arms or 'none'}, and every figure compares "
            "arms named as in launch/papers/code_mix/sweep.py, scored by one of their evaluations or by "
            "held-out bits per byte."
        )
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    lines = ["# What code in pre-training changes", ""]
    lines += [f"{len(rows)} runs, seeds {seeds}; means over seeds with 95 % intervals.", ""]
    for name, caption in drawn.items():
        lines += [f"## {caption}", "", f"![{caption}]({name})", ""]
    lines += _table("All arms", results, (*results.groups, *results.domains))
    html_page.write("\n".join(lines), out / "report.html")
    return list(drawn)


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page is made of, for whoever wants to count again."""
    keys = (
        "run",
        "arm",
        "size",
        "seed",
        "parents",
        "tokens",
        "tokens_total",
        "epochs_total",
        "seconds",
    )
    bits = {task: values.get("bits_per_byte") for task, values in row["held_out"].items()}
    return {
        **{key: row[key] for key in keys},
        "read": row["read"],
        "bits_per_byte": bits,
        **row["evaluations"],
    }


def _page(
    found: Mapping[str, Any],
    judged: Sequence[Claim],
    drawn: Mapping[str, str],
    facts: Mapping[str, Any],
) -> list[str]:
    lines = [
        "# Code in pre-training: the paper's claims on small models",
        "",
        "[To Code, or Not To Code?, arXiv 2408.10914](https://arxiv.org/abs/2408.10914). This page and its",
        "plots are written by",
        "",
        "```",
        str(facts["command"]),
        "```",
        "",
        "and never by hand. Values are means over seeds with 95 % intervals (Student's t). Claims in bold must",
        "hold at this scale too; the others are reported as they come out.",
        "",
        intervals.BETTER,
        "",
        *claim.table(judged),
    ]
    lines += ["", "## How it was measured", "", *_setup(found), "", "## Measurements", ""]
    lines += claim.measurements(judged)
    for name, caption in drawn.items():
        lines += [f"![{caption}](code_mix/{name})", "", f"*{caption}.*", ""]
    for title, part, scores in (
        ("Generated text and code: all arms", "skills", GROUPS),
        (
            "Installed packages: all arms, bits per byte",
            "packages",
            claims.TEXT_DOMAINS + claims.CODE_DOMAINS,
        ),
    ):
        lines += _table(title, Results(found.get(part, ())), scores)
    lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".")
    return lines


def _setup(found: Mapping[str, Any]) -> list[str]:
    out = []
    for part, what in (
        (
            "skills",
            "models of 2 layers (width 64 where nothing else is said), trained on documents of five "
            "generated sources (`data/code_mix/skill_sources.py`) and asked 1,392 problems (`data/code_mix/skills.py`): "
            "*reasoning*, problems in words, and *code*, calls, with operands that no training document "
            "shows; *knowledge*, facts that text states. 400 steps of 3,072 tokens a phase",
        ),
        (
            "packages",
            "the quickstart's models of 2.6M parameters on prose, docstrings, Python, C++ and markup of "
            "installed packages, scored by held-out bits per byte",
        ),
    ):
        if rows := found.get(part):
            seeds = sorted({row["seed"] for row in rows})
            minutes = sum(row["seconds"] for row in rows) / 60
            out.append(
                f"- *{claims.SMALL if part == 'skills' else claims.PACKAGES}*: {what}. {len(rows)} runs, "
                f"seeds {', '.join(map(str, seeds))}; {minutes:.0f} minutes of runs, one core each."
            )
    return out


def _table(title: str, results: Results, scores: Sequence[str]) -> list[str]:
    """Scores, shares of tokens as read, and how often each source was read, phases before included."""
    if not results.rows:
        return []
    header = " | ".join(scores)
    out = [
        f"## {title}",
        "",
        f"| arm | {header} | tokens read in its own steps | times each source was read in all |",
        "|---|" + "---|" * (len(scores) + 2),
    ]
    for arm, size in dict.fromkeys((row["arm"], row["size"]) for row in results.rows):
        cells = []
        for score in scores:
            values = np.array(list(results.scores(arm, score, size).values()))
            cells.append(intervals.text(intervals.over_seeds(values)))
        row = next(iter(results.find(arm, size).values()))
        name = claims.arm_name(arm) + ("" if size in (None, results.main) else f", {size}")
        shares = ", ".join(
            f"{claims.source_name(s)} {share:.1%}" for s, share in row["read"].items() if share
        )
        epochs = ", ".join(
            f"{claims.source_name(s)} {n:.2f}" for s, n in row["epochs_total"].items() if n
        )
        out.append(f"| {name} | {' | '.join(cells)} | {shares} | {epochs} |")
    return [*out, ""]
