"""Low-rank training at small scale: runs the sweeps that are not done, and reads their results."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.low_rank import timing
from launch.papers.shared import sweeps

TITLE = "low-rank training, 2209.13569"
SEEDS = 3
PARTS = {"lm": "characters", "vision": "textures", "timing": "the time of steps"}
_SWEEPS = {"lm": "low_rank/sweep", "vision": "low_rank/vision_sweep"}
_SPECTRUM = "spectrum/"


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
    """Returns a row of results with the course of its run.

    Adds 'parameters'; 'curve', [(step, perplexity)] of its held-out task; 'spectrum', for each reading its step and the
    means of trainers/low_rank/spectrum.py; and 'first_spectra' and 'last_spectra', by layer the singular values of
    each stacked matrix. They are empty for a run that has no such readings.
    """
    from trainers.low_rank import spectrum

    metrics = sweeps.metrics(directory)
    curve = [
        (line["step"], value)
        for line in metrics
        for name, value in line.items()
        if name.startswith("eval/") and name.endswith("/perplexity")
    ]
    spectra = spectrum.read(directory) if (directory / spectrum.FILE).exists() else []
    steps = {line["step"] for line in spectra}
    readings = [
        {
            name.removeprefix(_SPECTRUM): value
            for name, value in line.items()
            if name == "step" or name.startswith(_SPECTRUM)
        }
        for line in metrics
        if line["step"] in steps and any(name.startswith(_SPECTRUM) for name in line)
    ]
    return {
        **row,
        "parameters": json.loads((directory / "run.json").read_text())["parameters"],
        "curve": curve,
        "spectrum": readings,
        "first_spectra": spectra[0]["layers"] if spectra else {},
        "last_spectra": spectra[-1]["layers"] if spectra else {},
    }
