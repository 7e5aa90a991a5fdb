"""The policy's outputs on the board: a few prompts, each with its outputs over training beside the readings."""

import os
from collections.abc import Mapping
from typing import Any

from launch.papers.preference.board_series import Run
from launch.plots import html_page
from launch.reporting.labels import number
from trainers.preference.indicators import samples
from trainers.telemetry.metric_writers import read_jsonl

_PROMPTS = 3
_CHARACTERS = 400  # of a shown text
_READINGS = {"LLH": "llh_chosen", "entropy": "entropy", "P_win": "p_win", "reward": "reward"}
_OWN = {"its reward": "reward", "its entropy": "entropy"}


def lines(run: Run, directory: str | os.PathLike) -> list[str]:
    """Returns Markdown with outputs at the first, the best and the last evaluation; none for a run without samples.

    Raises:
      DamagedRowsError: a line of a file of samples is not JSON.
    """
    if not (files := samples.paths(directory)):
        return []
    best = (run.highest("p_win") or run.highest("reward") or (None,))[0]
    steps = [step for step in sorted(files) if step in (min(files), best, max(files))]
    rows = {step: read_jsonl(str(files[step])) for step in steps}
    out = [f"## Outputs of {run.name}", ""]
    for at, first in enumerate(rows[steps[0]][:_PROMPTS]):
        outputs = {step: some[at] for step, some in rows.items() if at < len(some)}
        out += [f"Prompt: {_shown(first.get('prompt_text', first.get('prompt')))}", ""]
        out += _table(run, outputs)
    return out


def _table(run: Run, outputs: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Returns a row for each step: the run's readings, the output's own, and the output."""
    readings = {name: run.series[key] for name, key in _READINGS.items() if key in run.series}
    own = {name: key for name, key in _OWN.items() if any(key in row for row in outputs.values())}
    rows = []
    for step, row in outputs.items():
        cells = [number(series[step], 2) if step in series else "" for series in readings.values()]
        cells += [number(row[key], 2) if key in row else "" for key in own.values()]
        cut = " (cut)" if row.get("ended") == "length" else ""
        rows.append([f"{step:,}", *cells, _shown(row.get("text")) + cut])
    return html_page.table(["step", *readings, *own, "output"], rows)


def _shown(text: Any) -> str:
    """Returns a text in one line, in the font of code."""
    line = " ".join(str(text).split())
    if not line:
        return "(empty)"
    line = line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]} …"
    return f"`` {line} ``" if "``" not in line else line
