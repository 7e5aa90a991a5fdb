"""Low-rank training at small scale: runs the sweeps that are not done, and reads what they found."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.low_rank import timing
from launch.papers.shared import sweeps
from launch.papers.shared.stages import Stages

PARTS = ("lm", "vision", "timing")
_SWEEPS = {"lm": "sweep", "vision": "vision_sweep"}
_SPECTRUM = "spectrum/"


def run(
    *,
    model_dir: str,
    seeds: int,
    workers: int = 1,
    minutes: float | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """The rows of both sweeps and the times of steps, by part; what is there already is read.

    Args:
      model_dir: parent of the sweeps' folders and of what is measured.
      seeds: of each sweep.
      workers: runs at once.
      minutes: after which a sweep stops; the same command goes on.
      parts: of PARTS.

    Raises:
      ValueError: a sweep could not be run.
      sweeps.StoppedError: it was stopped, by a signal or the time.
    """
    folder = pathlib.Path(model_dir)
    found: dict[str, Any] = {}
    for part in parts:
        if part == "timing":  # last, and by itself: it wants the machine idle
            continue
        rows = sweeps.rows(
            folder / part, f"low_rank/{_SWEEPS[part]}", seeds, workers=workers, minutes=minutes
        )
        found[part] = [with_course(row, folder / part / row["directory"]) for row in rows]
    if "timing" in parts:
        stages = Stages(folder / "measured")
        found["timing"] = stages.get("timing", timing.SETTINGS, timing.measure)["result"]
    return found


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """A row of results with what its run's directory says of its course.

    Adds 'parameters'; 'curve', [(step, perplexity)] of its held-out task; 'spectrum', of each reading its
    step and the means of trainers/low_rank/spectrum.py; and 'first_spectra' and 'last_spectra', by layer the
    singular values of each stacked matrix. What a run does not have is empty.
    """
    from trainers.low_rank import spectrum
    from trainers.telemetry.metric_writers import rows_in_force

    metrics = rows_in_force(str(directory / "metrics.jsonl"))
    curve = [
        (line["step"], value)
        for line in metrics
        for name, value in line.items()
        if name.startswith("eval/") and name.endswith("/perplexity")
    ]
    spectra = spectrum.read(directory) if (directory / spectrum.FILE).exists() else []
    read = {line["step"] for line in spectra}
    readings = [
        {"step": line["step"]}
        | {
            name.removeprefix(_SPECTRUM): value
            for name, value in line.items()
            if name.startswith(_SPECTRUM)
        }
        for line in metrics
        if line["step"] in read and any(name.startswith(_SPECTRUM) for name in line)
    ]
    return {
        **row,
        "parameters": json.loads((directory / "run.json").read_text())["parameters"],
        "curve": curve,
        "spectrum": readings,
        "first_spectra": spectra[0]["layers"] if spectra else {},
        "last_spectra": spectra[-1]["layers"] if spectra else {},
    }
