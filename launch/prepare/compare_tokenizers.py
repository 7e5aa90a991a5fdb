"""Compares tokenizers over languages on aligned sentences: tokens per word, bytes per token, parity to English, scripts.

Example, bytes against the tokenizer of a run, on messages of installed packages in 23 languages:

  espalier prepare compare_tokenizers --tokenizer=bytes --tokenizer=own=/runs/aya/vocabulary.model --out=/tmp/tokenizers

A tokenizer is `bytes`, a run, a folder with tokenizer.json or tokenizer.model, or a file .model, with a name in front of it
if the last part of the path is not a good one. `--text` is a folder of FLORES-200 (flores200_dataset), or a file of rows
{"language": "cs", "english": "...", "text": "..."}. --out gets report.json and report.png.

parity        tokens over the tokens of the same sentences in English: what a language pays
tokens/word   per letter in Chinese and Japanese
parts         share of tokens that are only a part of a character
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import files
from espalier.common.ranges import Size
from espalier.launch import cli

REPORT, PLOT = "report.json", "report.png"
_COLUMNS = {
    "fertility": ("tokens/word", 2, 1.0),
    "bytes_per_token": ("bytes/token", 2, 1.0),
    "parity": ("parity", 2, 1.0),
    "byte_fallback": ("parts, %", 1, 100.0),
    "unknown": ("unknown, %", 1, 100.0),
}
_SCRIPTS = 9  # in the plot; the others are one


def compare(
    *,
    tokenizer: Sequence[str],
    out: pathlib.Path,
    text: str = "packages",
    languages: str = "",
    limit: Size = 1000,
) -> dict[str, Any]:
    """Measures tokenizers, prints a table for each, and writes the report.

    Args:
      tokenizer: [NAME=]bytes, [NAME=]FOLDER or [NAME=]FILE; repeatable.
      out: write the results to this folder.
      text: packages, a folder of FLORES, or a file of rows.
      languages: codes such as en,cs,hi (default: all 23).
      limit: number of sentences of each language.

    Returns:
      {'text', 'tokenizers': name -> `data.languages.tokenizer_report.measure`}.

    Raises:
      ValueError: two tokenizers of one name, or an unknown language.
      FileNotFoundError, DataError, CheckpointFileError: files that are missing or damaged.
    """
    from espalier.data.languages import parallel, table, tokenizer_report
    from espalier.launch.inference import row_files
    from espalier.launch.run import run_vocabulary

    row_files.check_folder(str(out))
    paths = _paths(tokenizer)
    wanted = table.codes(languages.split(",")) if languages else tuple(table.LANGUAGES)
    pairs = parallel.read(text, wanted, limit=limit)
    reports = {
        name: {"path": path, **tokenizer_report.measure(run_vocabulary.of(path=path), pairs)}
        for name, path in paths.items()
    }
    document = {"text": text, "tokenizers": reports}
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / REPORT, document, synced=False)  # measured again
    _draw(reports).savefig(out / PLOT, dpi=130)
    _print(reports)
    print(out / REPORT)
    return document


def _paths(texts: Sequence[str]) -> dict[str, str]:
    """Returns the path, or 'bytes', of each tokenizer by name."""
    paths: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = pathlib.Path(text).stem, text
        if name in paths:
            raise ValueError(
                f"--tokenizer: {paths[name]} and {path} both have the name {name!r}. Name them: NAME={path}."
            )
        paths[name] = path
    return paths


def _print(reports: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from espalier.data.languages import table

    console = Console(width=110, markup=False)
    for name, report in reports.items():
        shown = Table(title=f"{name}: {report['size']:,} ids", title_justify="left")
        shown.add_column("language", no_wrap=True)
        for heading, *_ in _COLUMNS.values():
            shown.add_column(heading, justify="right")
        for code, rates in report["languages"].items():
            cells = (
                f"{unit * rates[key]:.{digits}f}" for key, (_, digits, unit) in _COLUMNS.items()
            )
            shown.add_row(f"{code} {table.LANGUAGES[code].name}", *cells)
        console.print(shown)
        console.print(
            f"highest parity: {report['worst']}; highest over lowest parity: {report['parity_spread']:.2f}; mean parity by script: "
            + ", ".join(f"{script} {value:.2f}" for script, value in report["scripts"].items())
        )
        console.print(
            "pieces: "
            + ", ".join(f"{script} {100 * x:.1f} %" for script, x in report["pieces"].items()),
            "",
            sep="\n",
        )


def _draw(reports: Mapping[str, Any]) -> Any:
    """Returns a figure: parity and bytes per token by language, and the scripts of the pieces."""
    from espalier.launch.plots import panels

    codes = sorted(
        next(iter(reports.values()))["languages"],
        key=lambda code: max(report["languages"][code]["parity"] for report in reports.values()),
    )
    figure, axes = panels.panels(3, (13, 1.6 + 0.24 * len(codes)))
    colours = panels.colours(len(reports))
    for one, key, label in (
        (axes[0], "parity", "tokens over those of the same text in English"),
        (axes[1], "bytes_per_token", "bytes per token"),
    ):
        for (name, report), colour in zip(reports.items(), colours, strict=True):
            values = [report["languages"][code][key] for code in codes]
            one.plot(values, range(len(codes)), "o", color=colour, label=name, ms=5)
        one.set_yticks(range(len(codes)), codes)
        one.set_xlabel(label)
        one.grid(axis="x", alpha=0.25)
        one.margins(x=0.08)
    axes[1].set_xlim(left=0)
    axes[0].axvline(1.0, color=panels.GREY, lw=0.8, ls=":")
    _draw_pieces(axes[2], reports)
    panels.legend_below(figure, axes[0], columns=4)
    return figure


def _draw_pieces(axes: Any, reports: Mapping[str, Any]) -> None:
    """Draws the shares of scripts, one below the other, a bar for each tokenizer."""
    from espalier.launch.plots import panels

    largest: dict[str, float] = {}
    for report in reports.values():
        for script, share in report["pieces"].items():
            largest[script] = max(share, largest.get(script, 0.0))
    order = sorted(largest, key=lambda script: -largest[script])
    groups = {script: [script] for script in order[:_SCRIPTS]}
    if others := order[_SCRIPTS:]:
        groups["other scripts"] = others
    height = 0.8 / len(reports)
    for i, (report, colour) in enumerate(
        zip(reports.values(), panels.colours(len(reports)), strict=True)
    ):
        shares = [
            100 * sum(report["pieces"].get(one, 0.0) for one in some) for some in groups.values()
        ]
        places = [at + (i - (len(reports) - 1) / 2) * height for at in range(len(groups))]
        axes.barh(places, shares, height=height, color=colour)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the vocabulary's pieces")
    axes.grid(axis="x", alpha=0.25)


main = cli.command(__doc__, "prepare compare_tokenizers", compare)

if __name__ == "__main__":
    raise SystemExit(main())
