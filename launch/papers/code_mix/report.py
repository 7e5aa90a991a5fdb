"""The paper's figures in `launch.report --sweep`, for sweeps with its arms."""

import pathlib
from collections.abc import Sequence


def sweep_lines(folders: Sequence[str], out: pathlib.Path) -> list[str]:
    """Returns lines of Markdown with the figures and the table of scores; none for sweeps without the paper's arms."""
    from launch.papers.code_mix import measure, page
    from launch.papers.code_mix.sweep import PHASES
    from launch.sweeping.results import read_results

    known = {arm for arms in PHASES for arm in arms}
    ours = [f for f in folders if any(row["arm"] in known for row in read_results(f))]
    rows = [row for folder in ours for row in measure.read(folder, out / "judged")]
    return page.sweep_lines(rows, out) if rows else []
