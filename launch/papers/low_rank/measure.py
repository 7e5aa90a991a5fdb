"""Low-rank training at small scale: runs the sweeps that are not done, and reads their results."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.low_rank import timing
from launch.papers.shared import sweeps

TITLE = "low-rank training, 2209.13569"
SEEDS = 5
PARTS = {"lm": "characters", "vision": "textures", "timing": "the time of steps"}
_SWEEPS = {"lm": "low_rank/sweep", "vision": "low_rank/vision_sweep"}
_SPECTRUM = "spectrum/"
_READINGS = ("step", "effective_rank", "effective_step")
_KEYS = ("run", "arm", "size", "seed", "parents", "step", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of both sweeps and the times of steps, by part.

    Args:
      model_dir: parent of the sweeps' folders and of other measurements.
      seeds: of each sweep.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    files = {part: (name, seeds) for part, name in _SWEEPS.items() if part in parts}
    measured: dict[str, Any] = sweeps.parts(model_dir, files, with_course, **options)
    if "timing" in parts:  # last, and alone: it needs an idle machine
        stages = sweeps.Stages(pathlib.Path(model_dir, "measured"))
        measured["timing"] = stages.get("timing", timing.SETTINGS, timing.measure)["result"]
    return measured


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row of results, with the course of its run.

    Adds 'parameters'; 'curve', [(step, perplexity)] of its held-out task; 'spectrum', for each reading its step and two
    means of trainers/low_rank/spectrum.py; and 'first_profile' and 'last_profile' (see `profile`). They are empty for a
    run that has no such readings.
    """
    from trainers.low_rank import spectrum

    metrics = sweeps.metrics(directory)
    curve = [
        (line["step"], round(value, 4))
        for line in metrics
        for name, value in line.items()
        if name.startswith("eval/") and name.endswith("/perplexity")
    ]
    spectra = spectrum.read(directory) if (directory / spectrum.FILE).exists() else []
    steps = {line["step"] for line in spectra}
    readings = [
        {key: line["step"] if key == "step" else line[_SPECTRUM + key] for key in _READINGS}
        for line in metrics
        if line["step"] in steps and _SPECTRUM + _READINGS[-1] in line
    ]
    held_out = {
        task: {name: values[name] for name in ("perplexity", "accuracy") if name in values}
        for task, values in row["held_out"].items()
    }
    return {
        **{key: row.get(key) for key in _KEYS},
        "held_out": held_out,
        "parameters": json.loads((directory / "run.json").read_text())["parameters"],
        "curve": curve,
        "spectrum": readings,
        "first_profile": profile(spectra[0]["layers"]) if spectra else [],
        "last_profile": profile(spectra[-1]["layers"]) if spectra else [],
    }


def profile(layers: Mapping[str, Sequence[Sequence[float]]]) -> list[float]:
    """Returns singular values over the largest, mean over matrices; zeros for a matrix that is zero.

    It is empty if the matrices have different ranks.

    Args:
      layers: by layer the singular values of each stacked matrix.
    """
    rows = [np.array(values) / (values[0] or 1.0) for stack in layers.values() for values in stack]
    same = len({len(row) for row in rows}) == 1
    return np.mean(rows, axis=0).round(4).tolist() if same else []
