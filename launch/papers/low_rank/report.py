"""`launch.report --spectra`: the singular values of runs' factorised matrices."""

import pathlib
from collections.abc import Sequence

from launch.run import metric_rows

FLAG = "spectra"
HELP = (
    "run directories with spectra (t5x_configs/methods/low_rank/spectrum.gin): draws the singular values of their "
    "factorised matrices"
)


def report(directories: Sequence[str], out: pathlib.Path) -> str:
    """Writes spectra.png into the folder `out`."""
    from launch.papers.low_rank import spectra_figure

    out.mkdir(parents=True, exist_ok=True)
    spectra_figure.draw(metric_rows.named(directories), out / "spectra.png")
    return f"spectra.png is in {out}"
