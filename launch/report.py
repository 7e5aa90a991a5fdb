"""Compares runs: held-out loss and bits per byte by domain, or the report of a paper.

Example, after `make quickstart`:

  python -m launch.report --runs runs/quickstart/text runs/quickstart/balanced --out /tmp/report

writes report.json and report.png to --out and prints the table. Every other flag writes the report of a paper, by
launch/papers/NAME/report.py:

  python -m launch.report --sweep runs/code_mix/skills --out /tmp/report
  python -m launch.report --spectra runs/low_rank runs/low_rank_l2 --out /tmp/report
  python -m launch.report --board runs/dpo runs/dpo_nll --out board.html

--all gathers every claim of every paper that was reproduced, with its verdict, in docs/scorecard.md.
"""

import argparse
import importlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch import cli
from launch.plots import panels
from launch.run import metric_rows
from trainers.telemetry.metric_writers import jsonable

_REPRODUCTIONS, _SCORECARD = "docs/reproductions", "docs/scorecard.md"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "report", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", nargs="+", metavar="DIR", help="run directories")
    all_help = "every claim of every paper, of a folder of reproductions (default: %(const)s)"
    which.add_argument("--all", nargs="?", const=_REPRODUCTIONS, metavar="DIR", help=all_help)
    for module in _of_papers():
        which.add_argument(f"--{module.FLAG}", nargs="+", metavar="DIR", help=module.HELP)
    out_help = f"folder or file to write (default with --all: {_SCORECARD})"
    parser.add_argument("--out", metavar="PATH", help=out_help)


def _of_papers() -> list[Any]:
    """Returns the modules launch/papers/NAME/report.py.

    Each has FLAG, HELP and `report(directories, out)`, which writes the report of directories to a path and returns a
    text to print.
    """
    return [
        importlib.import_module(f"launch.papers.{paper}.report")
        for paper in cli.papers_with("report")
    ]


def _run(flags: argparse.Namespace) -> None:
    if flags.all:
        from launch.papers.shared import scorecard

        out = pathlib.Path(flags.out or _SCORECARD)
        print(scorecard.write(pathlib.Path(flags.all), out, pathlib.Path("README.md")))
        return
    if flags.out is None:
        raise ValueError("--out is missing: name the folder or file to write.")
    if flags.runs:
        report(metric_rows.named(flags.runs), flags.out)
        return
    (module,) = (module for module in _of_papers() if getattr(flags, module.FLAG))
    try:
        print(module.report(getattr(flags, module.FLAG), pathlib.Path(flags.out)))
    except FileNotFoundError as error:  # an error in the input
        raise ValueError(str(error)) from error


def report(runs: Mapping[str, str], out: str | os.PathLike) -> dict[str, Any]:
    """Prints a table that compares `runs` (name -> directory), and writes report.json and report.png to `out`.

    Returns:
      {arm: {"step", "domains": {domain: {"loss", "bits_per_byte", ...}}}}.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: a file of metrics is damaged, or a run has not been evaluated.
    """
    rows = {name: metric_rows.read_rows(directory) for name, directory in runs.items()}
    results = {name: metric_rows.last_evaluation(name, its_rows) for name, its_rows in rows.items()}
    for name, result in results.items():
        for domain, values in result["domains"].items():
            if "loss" not in values:
                raise ValueError(
                    f"{runs[name]}/metrics.jsonl, the row of step {result['step']} has no eval/{domain}/loss to "
                    f"compare: remove the row, or evaluate {domain} again."
                )
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(jsonable(results), indent=1) + "\n")
    print_table(results)
    plot(results, rows, folder / "report.png")
    return results


def _domains(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(d for result in results.values() for d in result["domains"]))


def print_table(results: Mapping[str, Any]) -> None:
    """Prints loss in nats per token and bits per byte, with a column per arm; the best of a row is bold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="held out: nats per token, bits per byte")
    table.add_column("domain")
    for name in results:
        table.add_column(escape(name.replace("_", " ")), justify="right")
    for domain in _domains(results):
        by_arm = {name: result["domains"].get(domain) for name, result in results.items()}
        losses = [values["loss"] for values in by_arm.values() if values]
        best = min((loss for loss in losses if not math.isnan(loss)), default=math.nan)
        table.add_row(escape(domain), *(_cell(values, best) for values in by_arm.values()))
    Console(width=max(80, 24 * (len(results) + 1))).print(table)


def _cell(values: Mapping[str, float] | None, best: float) -> str:
    if values is None:
        return "-"
    bits = values.get("bits_per_byte")
    text = f"{values['loss']:.3f}  {bits:.3f}" if bits else f"{values['loss']:.3f}"
    return f"[bold]{text}[/bold]" if values["loss"] == best else text


def plot(
    results: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path
) -> None:
    """Plots bits per byte by domain as bars, and the training loss as curves, with a colour per arm."""
    figure, (bars, curves) = panels.panels(2, (12, 4.6))
    figure.get_layout_engine().set(wspace=0.06)  # keeps the right axis label away from the bars
    domains = _domains(results)
    width = 0.8 / len(results)
    for i, (name, result) in enumerate(results.items()):
        label = name.replace("_", " ")
        values = [result["domains"].get(d, {}).get("bits_per_byte", float("nan")) for d in domains]
        at = [x + (i - (len(results) - 1) / 2) * width for x in range(len(domains))]
        drawn = bars.bar(at, values, width * 0.94, label=label)
        bars.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
        trained = [row for row in rows[name] if "loss" in row]
        steps, losses = ([row[key] for row in trained] for key in ("step", "loss"))
        curves.plot(steps, losses, label=label, linewidth=1.6)
    bars.set_xticks(range(len(domains)), domains)
    bars.set_ylabel("bits per byte, held out (lower is better)")
    bars.margins(y=0.12)
    curves.set(xlabel="updates", ylabel="training loss on its own mixture, nats per token")
    curves.legend(frameon=False)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    raise SystemExit(main())
