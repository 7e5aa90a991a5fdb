"""The report of any runs as one HTML file, a picture, and a table for the terminal."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from espalier.launch.config import text as config_text
from espalier.launch.input_errors import shortened
from espalier.launch.plots import html_page
from espalier.launch.report import figures
from espalier.launch.report.figures import Curves, Dots
from espalier.launch.report.runs import Run

_FINAL = ("loss", "bits_per_byte", "accuracy")  # held-out metrics whose last values are drawn
_MOST_SCORES = 24
_DERIVED = (
    "loss",
    "bits_per_byte",
)  # drawn by domain, and bits per byte is the loss in another unit
_NOT_DRAWN = ("eval/", "time/", "epochs/", "rollback_to", "skipped_batches")
_NONE = "–"
_HINT = "Hold the pointer on a dot or a curve for its value."
_SEEDS_HINT = "A dot is a run, a stroke the mean over the seeds of an arm; thin lines are runs, thick ones their mean. "
_PLACES = ("MODEL_DIR", "train.model_dir")  # settings that differ between any two runs
_MOST_SETTINGS = 40
_LONGEST = 60  # characters of a setting's value
# Heading, name of the picture, its panels, and the runs whose table is below it.
Section = tuple[str, str, Sequence[Dots | Curves], Sequence[Run]]


def write(
    runs: Sequence[Run], folder: pathlib.Path, *, title: str, more: Sequence[str] = ()
) -> None:
    """Writes report.html and report.png.

    Args:
      runs: at least one.
      folder: exists.
      title: of the page.
      more: further lines of Markdown, whose images are files in the folder.
    """
    arms = figures.colours(list(dict.fromkeys(run.arm for run in runs)))
    hint = (_SEEDS_HINT if _has_seeds(runs) else "") + _HINT
    lines, pictures = [f"# {title}", "", hint, "", *_overview(runs)], {}
    if found := differences(runs):
        header, *rows = found
        lines += ["## What differs between the configurations", "", *html_page.table(header, rows)]
    for heading, name, panels, in_table in _sections(runs):
        pictures[name] = html_page.svg(figures.draw(panels, arms))
        lines += [f"## {heading}", "", f"![{heading}]({name})", ""]
        lines += _table_lines(in_table) if in_table else []
    html_page.write("\n".join([*lines, *more]), folder / "report.html", pictures)
    figures.draw(_summary(runs), arms).savefig(folder / "report.png", dpi=140)


def _has_seeds(runs: Sequence[Run]) -> bool:
    return any(run.seed is not None for run in runs)


def _named(runs: Sequence[Run]) -> str:
    """Returns what the things that are compared are called."""
    return "arm" if _has_seeds(runs) else "run"


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the settings that differ between runs as rows of cells, the header first; none if there is nothing to compare.

    Runs without a configuration that can be read have no column.
    """
    known = [run for run in runs if run.config is not None and config_text.is_readable(run.config)]
    every = config_text.differences([run.config or "" for run in known], _PLACES)
    # What only names a macro says no more than the row of the macro.
    settings = {
        key: values
        for key, values in every.items()
        if not all(value is None or value.startswith("%") for value in values)
    }
    rows = [
        [key, *(_NONE if value is None else shortened(value, _LONGEST) for value in values)]
        for key, values in list(settings.items())[:_MOST_SETTINGS]
    ]
    if more := len(settings) - len(rows):
        rows.append([f"and {more:,} more", *[""] * len(known)])
    return [["setting", *(run.name for run in known)], *rows] if rows else []


def _kinds(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs whose losses can be compared with each other, together."""
    every = dict.fromkeys(run.kind for run in runs)
    return [[run for run in runs if run.kind == kind] for kind in every]


def _sections(runs: Sequence[Run]) -> Iterator[Section]:
    """Yields the sections of the page: those on losses for each kind of runs, then those on other metrics."""
    groups = _kinds(runs)
    for number, group in enumerate(groups):
        name = group[0].kind[0]
        of = f": {name}" if len(groups) > 1 and name else ""
        for metric in _FINAL:
            if panels := _last_values(group, metric):
                title = figures.label(metric, "")[0]
                in_table = group if metric == "loss" else ()
                yield f"Held-out {title}{of}", f"{metric}_{number}", panels, in_table
        if panels := _loss_curves(group):
            yield f"Losses over training{of}", f"losses_{number}", panels, ()
    if panels := _scores(runs):
        yield "Evaluations", "evaluations", panels, ()
    if panels := _other_curves(runs, held_out=True):
        yield "Other held-out metrics, means over domains", "held_out_metrics", panels, ()
    if panels := _other_curves(runs, held_out=False):
        yield "Other metrics of training", "training_metrics", panels, ()


def _domains(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(domain for run in runs for domain in run.domains))


def _last_values(runs: Sequence[Run], metric: str) -> list[Dots]:
    """Returns a panel of a held-out metric for each domain that has it."""
    _, unit = figures.label(metric, runs[0].kind[1])
    unit += " (lower is better)" if metric == "bits_per_byte" else ""
    panels = []
    for domain in _domains(runs):
        values = {
            run.name: (run, run.domains[domain][metric])
            for run in runs
            if metric in run.domains.get(domain, {})
        }
        if values:
            panels.append(Dots(domain, unit, values))
    return panels


def _loss_curves(runs: Sequence[Run]) -> list[Curves]:
    """Returns the panels of training loss and of held-out loss by domain."""
    unit = runs[0].kind[1]
    named = [("training", "loss"), *((f"{x}, held out", f"eval/{x}/loss") for x in _domains(runs))]
    return _curves(runs, [(f"loss: {title}", unit, metric) for title, metric in named])


def _curves(runs: Sequence[Run], panels: Sequence[tuple[str, str, str]]) -> list[Curves]:
    """Returns the panels (title, unit, metric) that have more than one point."""
    drawn = []
    for title, unit, metric in panels:
        series = [(run, run.series[metric]) for run in runs if metric in run.series]
        if any(len(points) > 1 for _, points in series):
            drawn.append(Curves(title, unit, series))
    return drawn


def _scores(runs: Sequence[Run]) -> list[Dots]:
    names = list(dict.fromkeys(name for run in runs for name in run.scores))[:_MOST_SCORES]
    return [
        Dots(name, "", {r.name: (r, r.scores[name]) for r in runs if name in r.scores})
        for name in names
    ]


def _other_curves(runs: Sequence[Run], *, held_out: bool) -> list[Curves]:
    """Returns a panel for each metric that no other panel shows; of held-out ones the mean over domains."""
    series: dict[tuple[str, str], list[tuple[Run, pd.Series]]] = {}
    for run in runs:
        for metric, points in (_held_out(run) if held_out else _trained(run)).items():
            series.setdefault(figures.label(metric, run.kind[1]), []).append((run, points))
    return [
        Curves(title, unit, points)
        for (title, unit), points in sorted(series.items(), key=lambda x: "loss" not in x[0][0])
        if any(len(one) > 1 for _, one in points)
    ]


def _held_out(run: Run) -> dict[str, pd.Series]:
    by_metric: dict[str, list[pd.Series]] = {}
    for name, points in run.series.items():
        _, _, metric = name.partition("/")[2].partition("/")
        if name.startswith("eval/") and metric not in (*_DERIVED, "tokens", "images", "pairs"):
            by_metric.setdefault(metric, []).append(points)
    return {
        m: pd.concat(points, axis=1, join="inner").mean(axis=1) for m, points in by_metric.items()
    }


def _trained(run: Run) -> dict[str, pd.Series]:
    """Returns the metrics of training, without single entries of vectors, and without what is zero throughout."""
    sources = [name for name in run.series if name.startswith("source_loss/")]
    hidden = ["loss", *(sources if len(sources) == 1 else ())]
    return {
        name: points
        for name, points in run.series.items()
        if name not in hidden
        and not name.startswith(_NOT_DRAWN)
        and not name.rpartition("/")[2].isdigit()
        and not (name in ("anomaly", "indicators/alarm") and not points.any())
    }


def _summary(runs: Sequence[Run]) -> list[Dots | Curves]:
    """Returns the panels of report.png: for each kind of runs last values, and the training loss."""
    panels: list[Dots | Curves] = []
    for group in _kinds(runs):
        unit = group[0].kind[1]
        metric = "bits_per_byte" if _has_bits(group) else "loss"
        panels += _last_values(group, metric)
        panels += _curves(group, [("loss: training", unit, "loss")])
    return panels


def _has_bits(runs: Sequence[Run]) -> bool:
    return any("bits_per_byte" in v for run in runs for v in run.domains.values())


def _overview(runs: Sequence[Run]) -> list[str]:
    """Returns the table of arms or runs: objective, updates, and seeds if there are any."""
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        of_arm = [run for run in runs if run.arm == arm]
        seeds = ", ".join(str(run.seed) for run in of_arm if run.seed is not None)
        steps = "–".join(f"{step:,}" for step in sorted({run.step for run in of_arm}))
        name = ", ".join(dict.fromkeys(run.kind[0] or "unknown" for run in of_arm))
        rows.append([arm, name, steps, *([seeds or _NONE] if _has_seeds(runs) else [])])
    more = ["seeds"] if _has_seeds(runs) else []
    return html_page.table([_named(runs), "objective", "updates", *more], rows)


def _table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns rows of cells, the header first: held-out loss and bits per byte of each arm by domain, and their range over seeds."""
    header = ["domain", *dict.fromkeys(run.arm for run in runs)]
    rows = []
    for domain in _domains(runs):
        by_arm = [
            [run.domains[domain] for run in runs if run.arm == arm and domain in run.domains]
            for arm in header[1:]
        ]
        rows.append([domain, *map(_cell, by_arm)])
    return [header, *rows]


def _cell(values: Sequence[Mapping[str, float]]) -> str:
    """Returns the mean loss of an arm with its range over seeds, and its bits per byte."""
    losses = [one["loss"] for one in values if "loss" in one]
    if not losses:
        return "-"
    text = f"{np.mean(losses):.3f}"
    if len(losses) > 1:
        text += f" ({min(losses):.3f} to {max(losses):.3f})"
    bits = [one["bits_per_byte"] for one in values if one.get("bits_per_byte")]
    return f"{text}  {np.mean(bits):.3f}" if bits else text


def _table_lines(runs: Sequence[Run]) -> list[str]:
    """Returns `_table` with its arms below each other, as Markdown with its units."""
    header, *rows = map(list, zip(*_table(runs), strict=True))
    unit = runs[0].kind[1] or "loss"
    bits = ", and bits per byte" if _has_bits(runs) else ""
    spread = "; mean over seeds (lowest to highest)" if _has_seeds(runs) else ""
    table = html_page.table([_named(runs), *header[1:]], rows)
    return [f"Held out: {unit}{bits}{spread}.", "", *table]


def print_tables(runs: Sequence[Run]) -> None:
    """Prints a table of the held-out losses of each kind of runs; the best of a domain is bold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    groups = [group for group in _kinds(runs) if _domains(group)]
    for group in groups:
        header, *rows = _table(group)
        bits = ", bits per byte" if _has_bits(group) else ""
        name, unit = group[0].kind
        of = f", {name}" if name and len(groups) > 1 else ""
        title = f"held out{of}: {unit or 'loss'}{bits}"
        shown = Table(title=escape(title), min_width=len(title) + 2)
        rows = [[row[0], *_bold_best([escape(cell) for cell in row[1:]])] for row in rows]
        if len(header) > max(5, len(rows)):  # many arms are easier to read below each other
            header, *rows = map(list, zip(header, *rows, strict=True))
            header[0] = _named(runs)
        for column in header:
            shown.add_column(escape(column), justify="left" if column == header[0] else "right")
        for row in rows:
            shown.add_row(escape(row[0]), *row[1:])
        Console(width=max(80, 24 * len(header))).print(shown)
    if found := differences(runs):
        header, *rows = found
        title = "what differs between the configurations"
        shown = Table(title=title, min_width=len(title) + 2)
        for column in header:
            shown.add_column(escape(column), overflow="fold")
        for row in rows:
            shown.add_row(*map(escape, row))
        Console(width=max(80, 40 * len(header))).print(shown)


def _bold_best(cells: Sequence[str]) -> list[str]:
    losses = [math.nan if cell == "-" else float(cell.split()[0]) for cell in cells]
    best = min((loss for loss in losses if not math.isnan(loss)), default=math.nan)
    return [
        f"[bold]{c}[/bold]" if loss == best else c for c, loss in zip(cells, losses, strict=True)
    ]
