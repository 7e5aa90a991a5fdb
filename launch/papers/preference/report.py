"""`launch.report --board`: the signs of over-optimisation of preference runs, as plots, a table and sentences.

The page is one file, with the outputs of the policy below its plots, whose points show their values; with --out=board.png all is one image. Runs without indicators show
their losses and the likelihoods of held-out pairs. docs/preference_indicators.md defines each number.
"""

import pathlib
import re
from collections.abc import Sequence

from launch.run import metric_rows

FLAG = "board"
HELP = (
    "run directories of preference methods: draws their likelihoods and indicators (docs/preference_indicators.md) as "
    "one page, or one image where --out ends with .png"
)


_MINUS = re.compile(r"(?<!\S)-(?=\d)")  # before a number


def report(directories: Sequence[str], path: pathlib.Path) -> str:
    """Writes the board of runs to the file `path`; returns the signs of over-optimisation in words.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: there is nothing to draw, or the file is neither .html nor .png.
    """
    from launch.papers.preference import board_figure, board_samples, board_series
    from launch.plots import hover, html_page

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
    plain = [_MINUS.sub("−", sentence) for sentence in sentences]
    path.parent.mkdir(parents=True, exist_ok=True)
    header, *rows = board_series.table(runs)
    if path.suffix == ".png":
        board_figure.write_png(runs, path, table=[header, *rows], sentences=plain)
    else:
        lines = ["# Preference runs", ""]
        lines += [f"- {sentence}" for sentence in plain]
        lines += ["", "![likelihoods and indicators by step](board)", "", board_series.LEGEND, ""]
        lines += html_page.table(header, rows)
        for run, folder in zip(runs, named.values(), strict=True):
            lines += board_samples.lines(run, folder)
        picture = hover.svg(board_figure.draw(runs))
        html_page.write("\n".join(lines), path, {"board": picture})
    return "\n".join([*sentences, f"the board is {path}"])


def _without_common_end(names: Sequence[str]) -> list[str]:
    """Removes the last parts that all names share, such as seed0 of dpo/seed0 and ipo/seed0."""
    parts = [name.split("/") for name in names]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]
