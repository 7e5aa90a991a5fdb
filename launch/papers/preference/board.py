"""`espalier report --board`: the signs of over-optimisation of preference runs, as plots, a table and sentences.

The page is one file, with the outputs of the policy below its plots, whose points show their values; with --out=board.png all is one
image. Runs without indicators show their losses and the likelihoods of held-out pairs. docs/use/preference_indicators.md defines each number.
"""

import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from espalier.launch.plots import html_page, panels
from espalier.launch.report.figures import number, short
from espalier.launch.run import metric_rows
from espalier.trainers.telemetry.metric_writers import read_jsonl

# Series -> metrics, of which the first that a run has is used. `*` is a task; several are averaged.
METRICS = {
    "llh_chosen": ("indicators/llh_chosen", "eval/*/llh/chosen", "llh/chosen"),
    "llh_rejected": ("indicators/llh_rejected", "eval/*/llh/rejected", "llh/rejected"),
    "llh_gap": ("indicators/llh_gap", "eval/*/llh/gap", "llh/gap"),
    "entropy": ("indicators/entropy",),
    "entropy_chosen": ("indicators/entropy_chosen",),
    "mass": ("indicators/mass",),
    "mass_chosen": ("indicators/mass_chosen",),
    "ead": ("indicators/ead",),
    "p_win": ("indicators/p_win",),
    "reward": ("indicators/reward",),
    "kl": ("indicators/kl",),
    "llh_distance": ("indicators/llh_distance",),
    "length": ("indicators/length",),
    "ended": ("indicators/ended",),
    "loss": ("loss",),
    "loss_held_out": ("eval/*/loss",),
    "accuracy": ("accuracy",),
    "accuracy_held_out": ("eval/*/accuracy",),
}


# Of a reading. With fewer, the entropy of outputs moves by more than the rule's threshold by chance.
FEWEST_OUTPUTS = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on the board.

    Attributes:
      name: unique on the board.
      series: name in METRICS, of those that the run has -> values by step.
      alarm: the step of its alarm; None for none.
      outputs: number of outputs of the policy in a reading; None if it is unknown.
    """

    name: str
    series: Mapping[str, pd.Series]
    alarm: int | None
    outputs: int | None = None

    @property
    def last(self) -> int:
        """The last step of any series."""
        return max(points.index[-1] for points in self.series.values())

    def first(self, name: str) -> float | None:
        """Returns the value at the first step, None for a series that the run lacks."""
        return self.series[name].iloc[0] if name in self.series else None

    def final(self, name: str) -> float | None:
        """Returns the value at the last step."""
        return self.series[name].iloc[-1] if name in self.series else None

    def highest(self, name: str) -> tuple[int, float] | None:
        """Returns (step, value) of the maximum, the earliest of equals."""
        if (points := self.series.get(name)) is None:
            return None
        return int(points.idxmax()), points.max()


def read(name: str, directory: str | os.PathLike) -> Run:
    """Reads the series of a run.

    Raises:
      FileNotFoundError: the directory holds no metrics.
      ValueError: they are not of preferences.
    """
    rows = metric_rows.read_rows(directory) or [{"step": 0}]
    table = pd.DataFrame(rows).set_index("step")
    series = {}
    for kind, choices in METRICS.items():
        points = (_points(table, choice) for choice in choices)
        if (some := next((one for one in points if len(one)), None)) is not None:
            series[kind] = some
    if "llh_chosen" not in series:
        raise ValueError(
            f"{directory} has no likelihoods of chosen completions: give runs of t5x_configs/runs/preference.gin, with at least one "
            "held-out evaluation."
        )
    alarms = _points(table, "indicators/alarm")
    return Run(name, series, min(alarms.index[alarms > 0], default=None), _outputs(directory))


def _outputs(directory: str | os.PathLike) -> int | None:
    """Returns the number of outputs at the last evaluation; None for a run without samples."""
    from espalier.trainers.preference.indicators import samples

    if not (files := samples.paths(directory)):
        return None
    with open(files[max(files)], "rb") as file:
        return sum(1 for _ in file)


def _points(table: pd.DataFrame, metric: str) -> pd.Series:
    """Returns the values of a metric by step, of which `*` is any task; several tasks are averaged."""
    pattern = re.compile(metric.replace("*", "[^/]+"))
    values = table[[name for name in table if pattern.fullmatch(name)]].astype(float).mean(axis=1)
    return values.dropna().groupby(level="step").last()


LEGEND = (
    "LLH is the mean log-likelihood per token of held-out chosen completions, entropy (bits) and mass are of the ten "
    "likeliest tokens where the policy writes, EAD is expectation-adjusted distinct n-grams, KL the mean log-ratio of "
    "policy and reference on what the policy wrote. An arrow goes from the first value to the last, @ names a step."
)
_NONE = "–"


# Heading -> which values of a series are shown, and their decimals.
_COLUMNS = {
    "best P_win": ("best", "p_win", 3),
    "last P_win": ("last", "p_win", 3),
    "best reward": ("best", "reward", 3),
    "last reward": ("last", "reward", 3),
    "LLH": ("change", "llh_chosen", 2),
    "gap": ("change", "llh_gap", 2),
    "highest entropy": ("best", "entropy", 2),
    "last entropy": ("last", "entropy", 2),
    "mass": ("change", "mass", 3),
    "EAD": ("change", "ead", 2),
    "KL": ("last", "kl", 1),
    "length": ("change", "length", 1),
    "accuracy": ("last", "accuracy", 2),
}
_EMPTY = pd.Series(dtype=float)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns rows of cells, the header first, without columns that no run has."""
    columns = {
        "run": [run.name for run in runs],
        "steps": [f"{run.last:,}" for run in runs],
        "alarm": [_NONE if run.alarm is None else f"@ {run.alarm:,}" for run in runs],
        **{name: [_cell(run, *shown) for run in runs] for name, shown in _COLUMNS.items()},
    }
    shown = {
        name: cells for name, cells in columns.items() if name == "alarm" or set(cells) != {_NONE}
    }
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def _cell(run: Run, which: str, name: str, digits: int) -> str:
    if name == "accuracy" and "accuracy_held_out" in run.series:
        name = "accuracy_held_out"
    if (points := run.series.get(name)) is None:
        return _NONE

    if which == "best":
        return f"{number(points.max(), digits)} @ {points.idxmax():,}"
    last = number(points.iloc[-1], digits)
    return last if which == "last" else f"{number(points.iloc[0], digits)} → {last}"


def sentence(run: Run) -> str:
    """Returns the verdict of the signals on a run."""
    first, last = run.first("llh_chosen"), run.final("llh_chosen")
    assert first is not None and last is not None  # see `read`
    moved = f"likelihood of chosen completions {_moved(first, last)} nats per token"
    peak, entropy = run.highest("entropy"), run.final("entropy")
    if peak is None or entropy is None:
        return f"{moved}; it has no indicators (t5x_configs/methods/preference/indicators.gin)."
    best = run.highest("p_win") or run.highest("reward")
    kind = "P_win" if run.highest("p_win") else "reward"
    judged = "" if best is None else f"; best {kind} {best[1]:.3f} at step {best[0]:,}"
    from espalier.trainers.preference.indicators.alarm import StoppingRule

    first_mass, mass = run.first("mass"), run.final("mass")
    assert first_mass is not None and mass is not None  # written with the entropy
    spread = (
        f"entropy was highest at step {peak[0]:,} ({peak[1]:.2f} bits) and is {entropy:.2f} at the end, mass went from "
        f"{first_mass:.3f} to {mass:.3f}"
    )
    if run.alarm is not None:
        verdict = f"signs of over-optimisation at step {run.alarm:,}, where the alarm was raised"
    elif few := _too_few(run):
        verdict = f"too few to judge ({few}), and no alarm"
    elif entropy < (1 - StoppingRule.entropy_drop) * peak[1] and last < first:
        verdict = f"an early warning, for entropy falls since step {peak[0]:,}, and no alarm"
    else:
        verdict = "no sign of over-optimisation"
    cut = "; every output was cut at the limit of tokens" if run.final("ended") == 0 else ""
    return f"{verdict}: {moved}, {spread}{judged}{cut}."


def _too_few(run: Run) -> str:
    """Returns why the readings say nothing about over-optimisation; an empty text if they are enough."""
    from espalier.trainers.preference.indicators.alarm import StoppingRule

    readings = len(run.series["entropy"])
    if readings <= StoppingRule.drops:
        return f"{readings} readings, where a sign needs {StoppingRule.drops + 1}"
    if run.outputs is not None and run.outputs < FEWEST_OUTPUTS:
        return f"readings of {run.outputs} outputs, where noise needs {FEWEST_OUTPUTS}"
    return ""


def _moved(first: float, last: float) -> str:
    """Returns the change, as far as two digits show it."""
    before, after = (f"{value:.2f}".replace("-0.00", "0.00") for value in (first, last))
    if before == after:
        return f"stayed at {after}"
    return f"{'fell' if last < first else 'rose'} from {before} to {after}"


def length_link(runs: Sequence[Run]) -> str | None:
    """Returns the correlation of likelihood with length of output over all evaluations; None for fewer than three."""
    columns = [[run.series.get(name, _EMPTY) for name in ("llh_chosen", "length")] for run in runs]
    points = pd.concat([pd.concat(pair, axis=1, join="inner") for pair in columns])
    r = points.corr().iloc[0, 1]
    if len(points) < 3 or pd.isna(r):
        return None
    return f"length: r = {r:.2f} between likelihood and length of output, over {len(points)} evaluations."


_PROMPTS = 3
_CHARACTERS = 400  # of a shown text
_READINGS = {"LLH": "llh_chosen", "entropy": "entropy", "P_win": "p_win", "reward": "reward"}
_OWN = {"its reward": "reward", "its entropy": "entropy"}


def sample_lines(run: Run, directory: str | os.PathLike) -> list[str]:
    """Returns Markdown with outputs at the first, the best and the last evaluation; none for a run without samples.

    Raises:
      DamagedRowsError: a line of a file of samples is not JSON.
    """
    from espalier.trainers.preference.indicators import samples

    if not (files := samples.paths(directory)):
        return []
    best = (run.highest("p_win") or run.highest("reward") or (None,))[0]
    steps = [step for step in sorted(files) if step in (min(files), best, max(files))]
    rows = {step: read_jsonl(str(files[step])) for step in steps}
    out = [f"## Outputs of {run.name}", ""]
    for at, first in enumerate(rows[steps[0]][:_PROMPTS]):
        outputs = {step: some[at] for step, some in rows.items() if at < len(some)}
        out += [f"Prompt: {_shown(first.get('prompt_text', first.get('prompt')))}", ""]
        out += _table(run, outputs)
    return out


def _table(run: Run, outputs: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Returns a row for each step: the run's readings, the output's own, and the output."""
    readings = {name: run.series[key] for name, key in _READINGS.items() if key in run.series}
    own = {name: key for name, key in _OWN.items() if any(key in row for row in outputs.values())}
    rows = []
    for step, row in outputs.items():
        cells = [number(series[step], 2) if step in series else "" for series in readings.values()]
        cells += [number(row[key], 2) if key in row else "" for key in own.values()]
        cut = " (cut)" if row.get("ended") == "length" else ""
        rows.append([f"{step:,}", *cells, _shown(row.get("text")) + cut])
    return html_page.table(["step", *readings, *own, "output"], rows)


def _shown(text: Any) -> str:
    """Returns a text in one line, in the font of code."""
    line = " ".join(str(text).split())
    if not line:
        return "(empty)"
    line = line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]} …"
    return f"`` {line} ``" if "``" not in line else line


# Title, series as solid line, series as dashed line, unit.
_PANELS = (
    ("LLH\nchosen, rejected dashed", "llh_chosen", "llh_rejected", "nats per token"),
    ("LLH gap", "llh_gap", None, "nats per token"),
    ("P_win against the competitor", "p_win", None, "probability"),
    ("reward", "reward", None, "mean"),
    ("entropy of the likeliest\noutputs, chosen dashed", "entropy", "entropy_chosen", "bits"),
    ("mass of the likeliest\noutputs, chosen dashed", "mass", "mass_chosen", "probability"),
    ("diversity of outputs (EAD)", "ead", None, "relative to uniform draws"),
    ("log-ratio to the reference (KL)", "kl", None, "nats per output"),
    ("length of outputs", "length", None, "tokens"),
    ("outputs that ended", "ended", None, "share"),
    ("loss\ntraining, held out dashed", "loss", "loss_held_out", "per pair"),
    ("accuracy\ntraining, held out dashed", "accuracy", "accuracy_held_out", "share"),
)


def draw(runs: Sequence[Run]) -> Any:
    """Returns a figure with a panel for each quantity; each run has a colour."""
    there = {name for run in runs for name in run.series}
    scattered = "p_win" in there
    # P_win shows the same as the reward, on one scale for all runs.
    there -= {"reward"} if scattered else set()
    shown = [panel for panel in _PANELS if panel[1] in there]
    count = len(shown) + scattered
    columns = panels.columns(count)
    rows = -(-count // columns)
    size = (3.1 * columns + 0.4, 2.7 * rows + 0.5)
    figure, axes = panels.panels(columns, size, rows=rows)
    colours = panels.colours(len(runs))
    for one, (title, solid, dashed, unit) in zip(axes, shown, strict=False):
        # The part of the title after the comma explains the dashed line.
        one.set_title(title if dashed in there else title.partition(",")[0], fontsize=10)
        one.set_ylabel(unit, fontsize=9)
        one.set_xlabel("updates", fontsize=9)
        for run, colour in zip(runs, colours, strict=True):
            _lines(one, run, solid, dashed, colour)
        panels.short_ticks(one.yaxis)
        panels.room(one, "y")
        for run, colour in zip(runs, colours, strict=True):
            _mark_alarm(one, run, solid, colour)
        if solid == "p_win":
            one.axhline(0.5, color="black", lw=0.8, alpha=0.4)
            _around_a_half(one)
        if solid == "ended":
            one.set_ylim(-0.03, 1.03)
    if scattered:
        _against_likelihood(axes[len(shown)], runs, colours)
    for one in axes[count:]:
        one.set_axis_off()
    for one in axes[:count]:
        one.tick_params(labelsize=9)
    handles = [axes[0].plot([], [], color=colour, lw=2)[0] for colour in colours]
    names = [f"{r.name} (alarm at {r.alarm:,}: ▼)" if r.alarm is not None else r.name for r in runs]
    figure.legend(
        handles, names, frameon=False, ncols=min(4, len(runs)), loc="outside upper center"
    )
    return figure


def write_png(
    runs: Sequence[Run],
    path: str | os.PathLike,
    *,
    table: Sequence[Sequence[str]],
    sentences: Sequence[str],
) -> None:
    """Writes the figure as a PNG, with the rows of a table, the header first, and sentences below it."""
    figure = draw(runs)
    _words(figure, table, sentences)
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a PNG with a palette, which is a third of the size and looks the same."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=110, format="png")
    image = Image.open(pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)


def _lines(axes: Any, run: Run, solid: str, dashed: str | None, colour: str) -> None:
    from espalier.launch.report.figures import curve

    for name, style in ((solid, "-"), (dashed, "--")):
        points = run.series.get(name or "", _EMPTY)
        curve(
            axes, f"{run.name}, {(name or '').replace('_', ' ')}", points, colour, ls=style, lw=1.5
        )


def _mark_alarm(axes: Any, run: Run, solid: str, colour: str) -> None:
    points = run.series.get(solid, _EMPTY)
    if run.alarm in points:
        axes.axvline(run.alarm, color=colour, lw=0.8, ls=":")
        mark = {"marker": "v", "ms": 8, "mec": "black", "mew": 0.6}
        axes.plot(run.alarm, points[run.alarm], color=colour, **mark)


def _against_likelihood(axes: Any, runs: Sequence[Run], colours: Sequence[str]) -> None:
    """Draws whether a likelihood between the extremes is best, which is the paper's question."""
    axes.set_title("P_win against LLH of chosen\nstart ○", fontsize=10)
    axes.set_xlabel("LLH, nats per token", fontsize=9)
    axes.set_ylabel("P_win, probability", fontsize=9)
    for run, colour in zip(runs, colours, strict=True):
        wins = run.series.get("p_win", _EMPTY)
        points = pd.concat([run.series["llh_chosen"], wins], axis=1, join="inner")
        if points.empty:
            continue
        x, y = points.to_numpy().T
        axes.plot(x, y, "-", color=colour, lw=0.8, alpha=0.5)
        axes.scatter(x, y, s=14, color=colour)
        axes.plot(x[0], y[0], marker="o", ms=7, mfc="white", mec=colour)
        texts = [
            f"{run.name}, step {step:,}: P_win {short(b)} at LLH {short(a)}"
            for step, a, b in zip(points.index, x, y, strict=True)
        ]
        html_page.points(axes, x, y, texts)
    _around_a_half(axes)


def _around_a_half(axes: Any) -> None:
    """Leaves room around 0.5, so that the noise of a few prompts does not fill a panel of P_win."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.44), max(high, 0.56))


def _words(figure: Any, table: Sequence[Sequence[str]], sentences: Sequence[str]) -> None:
    """Adds table and sentences below the plots; the table has a row for each quantity."""
    import textwrap

    width, height = figure.get_size_inches()
    cells = list(map(list, zip(*table, strict=True)))
    letters = int(13 * width)
    wrapped = [x for s in sentences for x in textwrap.wrap(s, letters, subsequent_indent="   ")]
    of_table, of_words = 0.23 * len(cells), 0.19 * len(wrapped)  # inches
    more = of_table + of_words + 0.5
    figure.set_size_inches(width, height + more)
    share = more / (height + more)
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    low = figure.add_axes((0.01, 0, 0.98, share * 0.97))
    low.set_in_layout(False)
    low.set_axis_off()
    header, *rows = cells
    drawn = low.table(rows, colLabels=header, cellLoc="center", edges="horizontal",
                      bbox=(0, 1 - of_table / more, 1, of_table / more))  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    top = 1 - (of_table + 0.2) / more
    low.text(0, top, "\n".join(wrapped), va="top", fontsize=9)


FLAG = "board"
HELP = (
    "run directories of preference methods: draws their likelihoods and indicators (docs/use/preference_indicators.md) as "
    "one page, or one image where --out ends with .png"
)


_MINUS = re.compile(r"(?<!\S)-(?=\d)")  # before a number


def report(directories: Sequence[str], path: pathlib.Path) -> str:
    """Writes the board of runs to the file `path`; returns the signs of over-optimisation in words.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: there is nothing to draw, or the file is neither .html nor .png.
    """
    from espalier.launch.plots import html_page

    if path.suffix not in (".html", ".png"):
        raise ValueError(f"--out={path}: name a file that ends with .html or .png.")
    named = metric_rows.named(directories)
    runs = [
        read(name, folder)
        for name, folder in zip(_without_common_end(list(named)), named.values(), strict=True)
    ]
    sentences = [f"{run.name}: {sentence(run)}" for run in runs]
    if (link := length_link(runs)) is not None:
        sentences.append(link)
    plain = [_MINUS.sub("−", sentence) for sentence in sentences]
    path.parent.mkdir(parents=True, exist_ok=True)
    header, *rows = table(runs)
    if path.suffix == ".png":
        write_png(runs, path, table=[header, *rows], sentences=plain)
    else:
        lines = ["# Preference runs", ""]
        lines += [f"- {sentence}" for sentence in plain]
        lines += ["", "![likelihoods and indicators by step](board)", "", LEGEND, ""]
        lines += html_page.table(header, rows)
        for run, folder in zip(runs, named.values(), strict=True):
            lines += sample_lines(run, folder)
        picture = html_page.svg(draw(runs))
        html_page.write("\n".join(lines), path, {"board": picture})
    return "\n".join([*sentences, f"the board is {path}"])


def _without_common_end(names: Sequence[str]) -> list[str]:
    """Removes the last parts that all names share, such as seed0 of dpo/seed0 and ipo/seed0."""
    parts = [name.split("/") for name in names]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]
