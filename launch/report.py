"""Compares runs: held-out loss and bits per byte by domain, or a sweep's arms by the figures of code_mix.

Example, after `make quickstart`:

  python -m launch.report --runs runs/quickstart/text runs/quickstart/balanced --out /tmp/report

writes report.json and report.png to --out and prints the table. With a sweep of the arms of
launch/papers/code_mix/sweep.py or full_sweep.py,

  python -m launch.report --sweep runs/code_mix/skills --out /tmp/report

draws the change against text-only by recipe, phases, the proportion of code, its quality, cooldowns and
sizes, with intervals over seeds, as PNG and in report.html. With

  python -m launch.report --spectra runs/low_rank runs/low_rank_l2 --out /tmp/report

it draws the singular values of factorised matrices, of runs with t5x_configs/methods/low_rank/spectrum.gin.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from trainers.telemetry.metric_writers import rows_in_force


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    summary, _, example = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.report",
        description=summary,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", nargs="+", metavar="DIR", help="run directories")
    which.add_argument("--sweep", nargs="+", metavar="DIR", help="folders (--out) of sweeps")
    which.add_argument("--spectra", nargs="+", metavar="DIR", help="run directories with spectra")
    parser.add_argument("--out", required=True, metavar="DIR", help="where report.* goes")
    flags = parser.parse_args(argv)
    try:
        if flags.sweep:
            _report_sweeps(flags.sweep, pathlib.Path(flags.out))
        elif flags.spectra:
            _report_spectra(flags.spectra, pathlib.Path(flags.out))
        else:
            report(named(flags.runs), flags.out)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report_sweeps(folders: Sequence[str], out: pathlib.Path) -> None:
    from launch.papers.code_mix import measure, page
    from launch.sweeping.results import read_results

    rows = [
        measure.with_data(row, pathlib.Path(folder, row["directory"]))
        for folder in folders
        for row in read_results(folder)
    ]
    drawn = page.write_sweeps(rows, out)
    print(f"{', '.join(drawn)} and report.html are in {out}")


def _report_spectra(directories: Sequence[str], out: pathlib.Path) -> None:
    from launch.papers.low_rank import spectra_figure

    out.mkdir(parents=True, exist_ok=True)
    spectra_figure.draw(named(directories), out / "spectra.png")
    print(f"spectra.png is in {out}")


def named(directories: Sequence[str]) -> dict[str, str]:
    """Directories by the shortest ends of their paths that tell them apart."""
    parts = [pathlib.Path(directory).resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, directories, strict=True))
    raise ValueError("the same directory is named twice.")


def report(runs: Mapping[str, str], out: str | os.PathLike) -> dict[str, Any]:
    """Prints the table of `runs` (name -> directory), writes report.json and report.png to `out`.

    Returns:
      {arm: {"step", "domains": {domain: {"loss", "bits_per_byte", ...}}}}.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: a run has not been evaluated.
    """
    rows = {name: read_rows(directory) for name, directory in runs.items()}
    results = {name: last_evaluation(name, found) for name, found in rows.items()}
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)
    plot(results, rows, folder / "report.png")
    return results


def read_rows(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without those of steps that a rollback gave up."""
    path = os.path.join(directory, "metrics.jsonl")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: give the directory of a run (MODEL_DIR).")
    return rows_in_force(path)


def last_evaluation(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest held-out metrics by domain."""
    evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if not evaluated:
        raise ValueError(f"run {name!r} has no held-out evaluation yet: let it reach its end.")
    domains: dict[str, dict[str, float]] = {}
    for key, value in evaluated[-1].items():
        if key.startswith("eval/"):
            _, domain, metric = key.split("/", 2)
            domains.setdefault(domain, {})[metric] = value
    return {"step": evaluated[-1]["step"], "domains": domains}


def _domains(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(d for result in results.values() for d in result["domains"]))


def print_table(results: Mapping[str, Any]) -> None:
    """Loss in nats per token and bits per byte, a column per arm; the best of a row is bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held out: nats per token, bits per byte")
    table.add_column("domain")
    for name in results:
        table.add_column(name.replace("_", " "), justify="right")
    for domain in _domains(results):
        found = {name: result["domains"].get(domain) for name, result in results.items()}
        best = min(values["loss"] for values in found.values() if values)
        table.add_row(domain, *(_cell(values, best) for values in found.values()))
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
    """Bits per byte by domain as bars, and the training loss as curves, an arm per colour."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # the right axis label stays clear of the bars
    domains = _domains(results)
    width = 0.8 / len(results)
    for i, (name, result) in enumerate(results.items()):
        label = name.replace("_", " ")
        values = [result["domains"].get(d, {}).get("bits_per_byte", float("nan")) for d in domains]
        at = [x + (i - (len(results) - 1) / 2) * width for x in range(len(domains))]
        drawn = bars.bar(at, values, width * 0.94, label=label)
        bars.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
        trained = [(row["step"], row["loss"]) for row in rows[name] if "loss" in row]
        curves.plot(*zip(*trained, strict=True), label=label, linewidth=1.6)
    bars.set_xticks(range(len(domains)), domains)
    bars.set_ylabel("bits per byte, held out (lower is better)")
    bars.margins(y=0.12)
    curves.set_xlabel("updates")
    curves.set_ylabel("training loss on its own mixture, nats per token")
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    curves.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
