"""The singular values of runs' factorised matrices, drawn: over training, and at its start and end."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, panels
from trainers.low_rank import spectrum

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)


def draw(runs: Mapping[str, str | os.PathLike], path: str | os.PathLike) -> None:
    """Writes a PNG with a line for each run.

    Args:
      runs: name -> directory of a run that read its spectra (methods/low_rank/spectrum.gin).
      path: of the PNG.

    Raises:
      FileNotFoundError: a run has no spectra.
      ValueError: more runs than colours that can be distinguished.
    """
    if len(runs) > len(_COLOURS):
        raise ValueError(f"--spectra draws {len(_COLOURS)} runs at most, not {len(runs)}.")
    figure, (ranks, steps, values) = panels(3, (14, 4.4))
    for (name, directory), colour in zip(runs.items(), _COLOURS, strict=False):
        readings = _readings(directory)
        at = [line["step"] for line in readings]
        summaries = [spectrum.summary(_matrices(line), line["learning_rate"]) for line in readings]
        ranks.plot(
            at, [x["effective_rank"] for x in summaries], color=colour, marker=".", label=name
        )
        # A rate of 0, before the first update of a warm-up, has no place on a logarithmic axis.
        steps.plot(at, [x["effective_step"] or np.nan for x in summaries], color=colour, marker=".")
        for line, style in ((readings[0], "--"), (readings[-1], "-")):
            profile = _profile(_matrices(line))
            values.plot(np.linspace(0, 1, len(profile)), profile, style, color=colour, lw=2)
    ranks.set(xlabel="updates", ylabel="nuclear over operator norm", title="effective rank")
    steps.set(xlabel="updates", ylabel="rate over mean |W|²", title="effective step", yscale="log")
    values.set(
        xlabel="index over rank",
        ylabel="singular value over the largest",
        title="spectrum: first reading dashed, last solid",
        ylim=(0, 1.02),
    )
    figure.legend(frameon=False, ncols=len(runs), loc="outside lower center")
    figure.savefig(path, dpi=130)


def _readings(directory: str | os.PathLike) -> list[dict[str, Any]]:
    if not pathlib.Path(directory, spectrum.FILE).exists():
        raise FileNotFoundError(
            f"{directory} has no {spectrum.FILE}: train it with t5x_configs/methods/low_rank/spectrum.gin."
        )
    return spectrum.read(directory)


def _matrices(line: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.asarray(row) for rows in line["layers"].values() for row in rows]


def _profile(matrices: Sequence[np.ndarray], points: int = 100) -> np.ndarray:
    """Singular values over the largest, a mean over matrices of any rank; one that vanished counts as 0."""
    at = np.linspace(0, 1, points)
    return np.mean(
        [
            np.interp(at, np.linspace(0, 1, len(row)), row / row.max())
            if row.max() > 0
            else np.zeros(points)
            for row in matrices
        ],
        axis=0,
    )
