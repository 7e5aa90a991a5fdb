"""Aya Expanse at small scale: runs the unfinished parts of the sweep, and reads scores, win rates, pools and searches."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.aya_expanse import small_pool, small_stage, small_sweep
from launch.papers.aya_expanse.arms import REFERENCE
from launch.papers.shared import sweeps

TITLE = "Aya Expanse, 2412.04261"
SEEDS = 5
PARTS = {"small": "words of seven languages"}
_KEYS = ("run", "arm", "seed", "parents", "step", "tokens", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part.

    Args:
      model_dir: parent of the sweep's folder.
      seeds: number of seeds.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    sweep = {part: ("aya_expanse/small_sweep", seeds) for part in parts}
    measured = sweeps.parts(model_dir, sweep, with_results, **options)
    return {part: with_wins(rows) for part, rows in measured.items()}


def with_results(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row, with what its stage wrote or the mean reward of its last updates."""
    out = {key: row.get(key) for key in _KEYS}
    if row["arm"] == "pool":
        out["qualities"] = small_stage.read(directory, small_pool.QUALITIES)
    if row["arm"] == "search":
        out["search"] = search_of(directory)
    lines = [line["reward"] for line in sweeps.metrics(directory) if "reward" in line]
    if lines:
        out["reward"] = float(np.mean(lines[len(lines) // 2 :]))
    return out


def search_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the search of weights in a folder.

    Returns:
      {'trials': [[mean loss, loss of the worst language], ...], 'uniform': the first of them, with equal weights, 'best': the
      chosen one, 'gains': how much lower the mean loss is without each model, of equal weights}.
    """
    lines = (folder / "trials.jsonl").read_text("utf-8").splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    losses = {tuple(row["weights"]): list(row["losses"].values()) for row in rows}
    means = {weights: float(np.mean(some)) for weights, some in losses.items()}
    count = len(small_sweep.SIX)
    gains = []
    for left_out in range(count):
        rest = tuple(0.0 if i == left_out else round(1 / (count - 1), 6) for i in range(count))
        gains.append(means[(round(1 / count, 6),) * count] - means[rest])
    best = small_stage.read(folder, "search.json")["best"]["losses"].values()
    trials = [[means[weights], max(some)] for weights, some in losses.items()]
    return {
        "trials": trials,
        "uniform": trials[0],
        "best": [float(np.mean(list(best))), max(best)],
        "gains": gains,
    }


def with_wins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with win rates by language against the reference of the same seed, in place of a judge's scores."""
    judges = {
        row["seed"]: row["evaluations"]["answers"]["judge"]
        for row in rows
        if row["arm"] == REFERENCE and (row["evaluations"] or {}).get("answers")
    }
    out = []
    for row in rows:
        answers = (row["evaluations"] or {}).get("answers")
        if not answers:
            out.append(dict(row))
            continue
        scores = {key: value for key, value in answers.items() if key != "judge"}
        made = {**row, "evaluations": {**row["evaluations"], "answers": scores}}
        if (reference := judges.get(row["seed"])) is not None and row["arm"] != REFERENCE:
            made["wins"] = {
                code: _outcomes(own, reference[code]) for code, own in answers["judge"].items()
            }
        out.append(made)
    return out


def _outcomes(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Returns the shares of requests that are won, tied and lost; they sum to 1. Equal answers have equal scores."""
    gaps = np.array(own) - np.array(other)
    return {
        "win": float((gaps > 0).mean()),
        "tie": float((gaps == 0).mean()),
        "loss": float((gaps < 0).mean()),
    }
