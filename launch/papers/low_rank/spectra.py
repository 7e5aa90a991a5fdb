"""`espalier report --spectra`: the singular values of runs' factorised matrices, over training, and at its start and end."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, panels
from espalier.launch.run import metric_rows

FLAG = "spectra"
HELP = (
    "run directories with spectra (t5x_configs/methods/low_rank/spectrum.gin): draws the singular values of their "
    "factorised matrices"
)
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
_POINTS = 100  # of a drawn spectrum


def report(directories: Sequence[str], out: pathlib.Path) -> str:
    """Writes spectra.png, with a line for each run, into the folder `out`.

    Raises:
      FileNotFoundError: a run has no spectra.
      ValueError: more runs than colours that can be distinguished.
    """
    from espalier.trainers.low_rank import spectrum

    runs = metric_rows.named(directories)
    if len(runs) > len(_COLOURS):
        raise ValueError(f"--spectra draws {len(_COLOURS)} runs at most, not {len(runs)}.")
    figure, (ranks, steps, values) = panels(3, (14, 4.4))
    for (name, directory), colour in zip(runs.items(), _COLOURS, strict=False):
        if not pathlib.Path(directory, spectrum.FILE).exists():
            raise FileNotFoundError(
                f"{directory} has no {spectrum.FILE}: train it with t5x_configs/methods/low_rank/spectrum.gin."
            )
        readings = spectrum.read(directory)
        at = [line["step"] for line in readings]
        matrices = [_matrices(line) for line in readings]
        summaries = [
            spectrum.summary(some, line["learning_rate"])
            for some, line in zip(matrices, readings, strict=True)
        ]
        style = {"color": colour, "marker": "."}
        ranks.plot(at, [x["effective_rank"] for x in summaries], label=name, **style)
        # A rate of 0, before the first update of a warm-up, has no place on a logarithmic axis.
        steps.plot(at, [x["effective_step"] or np.nan for x in summaries], **style)
        for some, line_style in ((matrices[0], "--"), (matrices[-1], "-")):
            values.plot(np.linspace(0, 1, _POINTS), _profile(some), line_style, color=colour, lw=2)
    ranks.set(xlabel="updates", ylabel="nuclear over operator norm", title="effective rank")
    steps.set(xlabel="updates", ylabel="rate over mean |W|²", title="effective step", yscale="log")
    values.set(
        xlabel="index over rank",
        ylabel="singular value over the largest",
        title="spectrum: first reading dashed, last solid",
        ylim=(0, 1.02),
    )
    figure.legend(frameon=False, ncols=len(runs), loc="outside lower center")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "spectra.png", dpi=130)
    return f"spectra.png is in {out}"


def _matrices(line: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.asarray(row) for rows in line["layers"].values() for row in rows]


def _profile(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Returns singular values over the largest, a mean over matrices of any rank; zeros for a matrix that is zero."""
    at = np.linspace(0, 1, _POINTS)
    return np.mean(
        [np.interp(at, np.linspace(0, 1, len(row)), row / (row.max() or 1.0)) for row in matrices],
        axis=0,
    )
