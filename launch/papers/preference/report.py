"""`launch.report --board`: the signs of over-optimisation of preference runs, as plots, a table and sentences.

The page embeds its plots; with --out=board.png all is one image. Runs without indicators show
their losses and the likelihoods of held-out pairs. docs/preference_indicators.md defines each number.
"""

import pathlib
from collections.abc import Sequence

from launch.run import metric_rows

FLAG = "board"
HELP = (
    "run directories of preference methods: draws their likelihoods and indicators (docs/preference_indicators.md) as "
    "one page, or one image where --out ends with .png"
)


def report(directories: Sequence[str], path: pathlib.Path) -> str:
    """Writes the board of runs to the file `path`; returns the signs of over-optimisation in words.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: there is nothing to draw, or the file is neither .html nor .png.
    """
    from launch.papers.preference import board_figure, board_series
    from launch.papers.shared import page
    from launch.plots import html_page

    if path.suffix not in (".html", ".png"):
        raise ValueError(f"--out={path}: name a file that ends with .html or .png.")
    named = metric_rows.named(directories)
    runs = [
        board_series.read(name, folder)
        for name, folder in zip(_without_common_end(list(named)), named.values(), strict=True)
    ]
    sentences = [f"{run.name}: {board_series.sentence(run)}" for run in runs]
    if (link := board_series.length_link(runs)) is not None:
        sentences.append(link)
    path.parent.mkdir(parents=True, exist_ok=True)
    header, *rows = board_series.table(runs)
    if path.suffix == ".png":
        board_figure.draw(runs, path, table=[header, *rows], sentences=sentences)
    else:
        image = path.with_suffix(".png.partial")
        board_figure.draw(runs, image)
        lines = ["# Preference runs", "", *(f"- {sentence}" for sentence in sentences), ""]
        lines += [f"![likelihoods and indicators by step]({image.name})", ""]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines += [*page.table(header, escaped), board_series.LEGEND]
        html_page.write("\n".join(lines), path)
        image.unlink()
    return "\n".join([*sentences, f"the board is {path}"])


def _without_common_end(names: Sequence[str]) -> list[str]:
    """Removes the last parts that all names share, such as seed0 of dpo/seed0 and ipo/seed0."""
    parts = [name.split("/") for name in names]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]
