"""The report: what holds and what does not, as a page that people read and as JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.low_rank import claims, figures, image_claims, timing
from launch.papers.low_rank import sweep as lm
from launch.papers.shared import claim
from launch.papers.shared.claim import Claim
from launch.papers.shared.low_rank_results import Results, arm_name
from launch.plots import intervals

_COLUMNS = {
    "lm": ("parameters", "perplexity", "effective_rank", "effective_step"),
    "vision": ("parameters", "accuracy", "effective_rank", "effective_step"),
}
_FORMATS = {"parameters": "{:,.0f}", "effective_step": "{:.2e}"}


def write(found: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]) -> Sequence[Claim]:
    """Writes low_rank.md, low_rank/results.json and the plots into `out`.

    Args:
      found: by `experiment.run`, as far as it is there.
      out: the folder, such as docs/reproductions.
      facts: command, versions and whatever else the numbers depend on.

    Returns:
      The claims.
    """
    folder = out / "low_rank"
    drawn = figures.draw(found, folder)
    judged = claims.claims(found)
    record = {
        **facts,
        "claims": claim.record(judged),
        "runs": [_kept(row) for part in _COLUMNS for row in found.get(part, ())],
        "timing": found.get("timing"),
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "low_rank.md").write_text("\n".join(_page(found, judged, drawn, facts)) + "\n")
    return judged


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page is made of, for whoever wants to count again."""
    keys = ("run", "arm", "seed", "parents", "parameters", "step", "seconds", "held_out")
    return {**{key: row[key] for key in keys}, "end": (row["spectrum"] or [{}])[-1]}


def _page(
    found: Mapping[str, Any],
    judged: Sequence[Claim],
    drawn: Mapping[str, str],
    facts: Mapping[str, Any],
) -> list[str]:
    lines = [
        "# Low-rank training: the paper's claims on small models",
        "",
        "[Exploring Low Rank Training of Deep Neural Networks, arXiv 2209.13569](https://arxiv.org/abs/2209.13569).",
        "This page and its plots are written by",
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
        "",
        "## How it was measured",
        "",
        *_setup(found),
        "",
    ]
    for name, caption in drawn.items():
        lines += [f"![{caption}](low_rank/{name})", "", f"*{caption}.*", ""]
    lines += ["## Measurements", "", *claim.measurements(judged)]
    lines += _table("Characters: all arms", "lm", found)
    lines += _table("Textures: all arms", "vision", found)
    lines += _times(found.get("timing", {}))
    lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".")
    return lines


def _setup(found: Mapping[str, Any]) -> list[str]:
    """What was trained, and what is not there."""
    language, images = (Results(found.get(part, ())) for part in _COLUMNS)
    out = []
    if language.rows:
        out.append(
            f"- *{claims.WHERE}*: decoders of 2 layers (width 64, four heads, MLP of 256, contexts of 32) read Python's "
            "standard library character by character, 1,500 updates of 512 characters (Adam, rate 3e-3, halved where "
            f"said; t5x_configs/experiments/low_rank/cpu). Ranks are {lm.MAIN} of a matrix's smaller side where nothing "
            f"else is said; decay is part of the loss. Perplexity is of held-out modules. {_amount(language)}"
        )
    if images.rows:
        out.append(
            f"- *{image_claims.WHERE}*: small convolutional networks with batch normalisation, trained by SGD on "
            f"generated textures (t5x_configs/experiments/low_rank/cpu). {_amount(images)}"
        )
    if times := found.get("timing"):
        first = next(iter(times["seconds"].values()))
        out.append(
            f"- *steps*: the compiled training steps of the language models, in turns on one machine: {len(first)} "
            f"rounds of {timing.STEPS} steps for each arm; ratios are of one round."
        )
    out.append(
        "- *effective rank*: nuclear over operator norm at the end, mean over factorised matrices; *effective step*: the "
        "learning rate at the end over their mean squared Frobenius norm."
    )
    seeds = sorted({row["seed"] for row in language.rows})
    missing = language.missing(list(lm.get_config().arms), seeds) if seeds else []
    missing += [
        f"all of the part `{part}`" for part in (*_COLUMNS, "timing") if not found.get(part)
    ]
    if missing:
        out.append(f"- Missing, and left out above and below: {', '.join(missing)}.")
    return out


def _amount(results: Results) -> str:
    seeds = sorted({row["seed"] for row in results.rows})
    minutes = sum(row["seconds"] for row in results.rows) / 60
    return f"{len(results.rows)} runs, seeds {', '.join(map(str, seeds))}; {minutes:.0f} minutes of runs."


def _table(title: str, part: str, found: Mapping[str, Any]) -> list[str]:
    results = Results(found.get(part, ()))
    if not results.rows:
        return []
    columns = _COLUMNS[part]
    header = " | ".join(arm_name(column) for column in columns)
    out = [f"## {title}", "", f"| arm | {header} |", "|---|" + "---|" * len(columns)]
    for arm in dict.fromkeys(row["arm"] for row in results.rows):
        cells = [_cell(results.values(arm, column), column) for column in columns]
        out.append(f"| {arm_name(arm)} | {' | '.join(cells)} |")
    return [*out, ""]


def _cell(values: np.ndarray, column: str) -> str:
    if not values.size:
        return ""
    if column in _FORMATS:
        return _FORMATS[column].format(values.mean())
    shown = intervals.over_seeds(values)
    return intervals.text(shown, 3 if column == "accuracy" else 2)


def _times(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    out = [
        "## Time of a training step",
        "",
        "| arm | milliseconds, median round | over dense, mean of rounds |",
        "|---|---|---|",
    ]
    for arm, seconds in found["seconds"].items():
        ratio = intervals.text(intervals.over_seeds(timing.ratios(found, arm)))
        out.append(f"| {arm_name(arm)} | {1e3 * float(np.median(seconds)):.2f} | {ratio} |")
    return [*out, ""]
