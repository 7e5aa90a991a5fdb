"""`launch.report --sweep`: the paper's figures of sweeps with its arms, as far as the sweeps have them."""

import pathlib
from collections.abc import Sequence

FLAG = "sweep"
HELP = (
    "folders (--out) of sweeps with the arms of launch/papers/code_mix: draws the change against text-only by recipe, "
    "phases, the proportion of code, its quality, cooldowns, win rates and sizes"
)


def report(folders: Sequence[str], out: pathlib.Path) -> str:
    """Writes the figures and report.html into the folder `out`."""
    from launch.papers.code_mix import measure, page

    rows = [row for folder in folders for row in measure.read(folder, out / "judged")]
    drawn = page.write_sweeps(rows, out)
    return f"{', '.join(drawn)} and report.html are in {out}"
