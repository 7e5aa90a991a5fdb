"""Compares runs or the arms of sweeps, whatever they train: held-out loss by domain, and all metrics as curves.

Examples, after `make quickstart` and after a sweep (docs/scale/sweeps.md):

  espalier report --runs runs/quickstart/text runs/quickstart/balanced --out /tmp/report
  espalier report --sweep runs/my_sweep --out /tmp/report

print a table and write report.html, one file with all pictures in it, report.png and report.json to --out. The other
flags are of methods, by launch/papers/NAME/:

  espalier report --spectra runs/low_rank runs/low_rank_l2 --out /tmp/report
  espalier report --board runs/dpo runs/dpo_nll --out board.html

--time prints where the time of runs went over all their restarts, also while they train, and needs no --out:

  espalier report --time runs/quickstart/text

--all gathers what was reproduced: every claim with its verdict in docs/evidence/scorecard.md, the main effect of each paper in
docs/evidence/what_we_learned.md, and the totals in README.md.
"""

import argparse
import datetime
import importlib
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import files
from espalier.common.stages import duration
from espalier.common.storage import mirror, paths
from espalier.launch import cli
from espalier.launch.run import metric_rows
from espalier.trainers.telemetry import lifetime
from espalier.trainers.telemetry.goodput import START_PARTS
from espalier.trainers.telemetry.lifetime import Start
from espalier.trainers.telemetry.metric_writers import jsonable

_REPRODUCTIONS, _SCORECARD = "docs/reproductions", "docs/evidence/scorecard.md"
_HEAD = (
    "began (UTC)",
    "steps",
    "lasted",
    "in steps",
    "start-up",
    "lost steps",
    "to next step",
    "ended",
)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", nargs="+", metavar="DIR", help="compare these run directories")
    all_help = "every claim of every paper, of a folder of reproductions (default: %(const)s)"
    which.add_argument("--all", nargs="?", const=_REPRODUCTIONS, metavar="DIR", help=all_help)
    sweep_help = "folders (--out) of sweeps: finished runs by arm, with a dot for each seed"
    which.add_argument("--sweep", nargs="+", metavar="DIR", help=sweep_help)
    time_help = "run directories, or addresses: where their time went, over all their starts"
    which.add_argument("--time", nargs="+", metavar="DIR", help=time_help)
    cli.take_addresses(parser, "time")
    for module in _with_flags():
        which.add_argument(f"--{module.FLAG}", nargs="+", metavar="DIR", help=module.HELP)
    out_help = f"folder or file to write (default with --all: {_SCORECARD})"
    parser.add_argument("--out", metavar="PATH", help=out_help)


def _of_papers(mark: str) -> list[Any]:
    """Returns the modules of launch/papers/NAME/ that add to reports.

    A module has FLAG, HELP and `report(directories, out)`, which writes the report of directories to a path and returns a
    text to print; or `sweep_lines(folders, out)`, which returns what the report of sweeps with the paper's arms has in
    addition, as lines of Markdown with images in `out`, and nothing for other sweeps.
    """
    modules = cli.papers_with(rf"^{mark}")
    return [importlib.import_module(module) for _, module in modules]


def _with_flags() -> list[Any]:
    return _of_papers("FLAG = ")


def _run(flags: argparse.Namespace) -> None:
    if flags.all:
        from espalier.launch.papers.shared import scorecard

        out = pathlib.Path(flags.out or _SCORECARD)
        print(scorecard.write(pathlib.Path(flags.all), out, pathlib.Path("README.md")))
        return
    if flags.time:
        if flags.out is not None:
            raise ValueError("--out has no effect with --time, which prints its tables: remove it.")
        for directory in flags.time:
            print(time_table(directory))
        return
    if flags.out is None:
        raise ValueError("--out is missing: name the folder or file to write.")
    if (flags.runs or flags.sweep) and pathlib.Path(flags.out).suffix in (".html", ".png", ".json"):
        raise ValueError(
            f"--out={flags.out} is the name of a file: name a folder, for report.html, .png and .json."
        )
    if flags.runs:
        report(metric_rows.named(flags.runs), flags.out)
        return
    try:
        if flags.sweep:
            sweep_report(flags.sweep, flags.out)
            return
        (module,) = (module for module in _with_flags() if getattr(flags, module.FLAG))
        print(module.report(getattr(flags, module.FLAG), pathlib.Path(flags.out)))
    except FileNotFoundError as error:  # an error in the input
        raise ValueError(str(error)) from error


def report(directories: Mapping[str, str], out: str | os.PathLike) -> dict[str, Any]:
    """Prints a table that compares runs (name -> directory), and writes report.html, .png and .json to `out`.

    Returns:
      {name: {"step", "domains": {domain: {"loss", "bits_per_byte", ...}}}}.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: a file of metrics is damaged, or no run has been evaluated.
    """
    from espalier.launch.report import page, runs

    read = runs.from_directories(directories)
    results = {name: {"step": run.step, "domains": run.domains} for name, run in read.items()}
    folder = _write_json(out, results)
    page.print_tables(list(read.values()))
    page.write(list(read.values()), folder, title="Runs compared")
    return results


def sweep_report(folders: Sequence[str], out: str | os.PathLike) -> None:
    """Prints tables of the finished runs of sweeps, and writes report.html, .png and .json to `out`.

    Raises:
      FileNotFoundError: a folder holds no sweep.
      ValueError: no run is finished, or a file of metrics is damaged.
    """
    from espalier.launch.report import page, runs

    read = runs.from_sweeps(folders)
    results = [
        {"arm": run.arm, "seed": run.seed, "step": run.step, "domains": run.domains} for run in read
    ]
    folder = _write_json(out, results)
    page.print_tables(read)
    more = [
        line
        for module in _of_papers(r"def sweep_lines\(")
        for line in module.sweep_lines(folders, folder)
    ]
    page.write(read, folder, title=f"Sweep: {len(read)} finished runs", more=more)


def time_table(directory: str | os.PathLike) -> str:
    """Returns the line on the life of a run in a folder or at an address, and a table with a row for each start.

    Raises:
      ValueError: the directory has no record of a run's time, or a damaged one.
      StoreError: the directory is an address, and its store refuses or cannot be reached.
    """
    path = paths.join(directory, lifetime.FILE)
    try:
        starts = lifetime.read(mirror.local(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: name the directory (MODEL_DIR) of a run that this version has trained."
        ) from None
    counted = lifetime.counted(starts)
    waits = dict(zip(map(id, counted), lifetime.waits(counted), strict=True))
    endings = [lifetime.ending(starts, number, time.time()) for number in range(len(starts))]
    each = zip(starts, endings, strict=True)
    rows = [_HEAD, *(_row(start, waits.get(id(start)), ended) for start, ended in each)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    table = ["  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{os.fspath(directory)}: {lifetime.line(starts)}", *map(str.rstrip, table)])


def _row(start: Start, wait: float | None, ended: str) -> Sequence[str]:
    began = datetime.datetime.fromtimestamp(start.began, datetime.UTC)
    steps = "-" if start.from_step is None else f"{start.from_step:,} to {start.step:,}"
    return (
        began.isoformat(" ", "seconds")[:19],
        steps,
        duration(sum(start.seconds.values())),
        duration(start.training),
        duration(sum(start.seconds.get(part, 0.0) for part in START_PARTS)),
        lifetime.lost_steps([start]),
        "-" if wait is None else duration(wait),
        ended,
    )


def _write_json(out: str | os.PathLike, results: Any) -> pathlib.Path:
    """Makes the folder of a report and writes its report.json; returns the folder."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"  # not synced: it is made again from the runs
    files.write_json(path, jsonable(results), synced=False, end="\n", ensure_ascii=True)
    return folder


main = cli.command(__doc__, "report", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
