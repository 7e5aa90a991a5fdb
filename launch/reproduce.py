"""Reproduces a paper's claims at small scale, and writes the report with its plots.

The same command continues where it stopped: runs and measurements stay in --model_dir. Examples:

  espalier reproduce snapkv --model_dir=runs/snapkv --out=docs/reproductions
  espalier reproduce code_mix --model_dir=runs/code_mix --workers=2 --out=docs/reproductions
  espalier reproduce code_mix --again --out=docs/reproductions   # the page anew, from results.json

On two idle cores snapkv, low_rank, code_mix and influence take about an hour each, bam, mov and preference up to an hour and a half, and
nexus and aya_expanse an hour and a half or more. espalier reproduce PAPER --help lists the
flags of a paper.
The exit status is 1 if a claim that must hold fails or was not measured by one of --parts, and 75 if --minutes or a
signal stopped the command.
"""

import argparse
import importlib
import importlib.metadata
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from espalier.launch import cli, papers


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    program = cli.program_name("espalier.launch.reproduce")
    summary, _, example = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog=program,
        description=summary,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="paper", required=True, metavar="PAPER")
    for slug in slugs():
        experiment = _module(slug, "experiment")
        _add_flags(commands.add_parser(slug, help=experiment.TITLE), experiment)
    flags = parser.parse_args(argv)
    status = 0

    def call() -> None:
        nonlocal status
        with cli.prepared(program, own=argv is None):
            status = _reproduce(flags, sys.argv[1:] if argv is None else list(argv))

    return cli.status_of(call) or status


def slugs() -> list[str]:
    """Returns the papers that can be reproduced: the folders of launch/papers with an experiment.py and a report.py.

    experiment.py has TITLE, PARTS (name -> description), `run(model_dir, parts, **other flags)` and optionally
    `add_flags(parser)`. If SEEDS, the default number of seeds, is not None, its runs are sweeps, with the flags --seeds,
    --workers and --minutes. report.py has REPORT, a `shared.page.Report`.
    """
    reports = (one for path in papers.__path__ for one in pathlib.Path(path).glob("*/report.py"))
    return sorted(one.parent.name for one in reports if one.with_name("experiment.py").exists())


def _module(slug: str, name: str) -> Any:
    return importlib.import_module(f"{papers.__name__}.{slug}.{name}")


def _add_flags(parser: argparse.ArgumentParser, experiment: Any) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_dir", metavar="DIR", help="folder of runs and measurements")
    again_help = "run nothing: write the page again from results.json in --out"
    source.add_argument("--again", action="store_true", help=again_help)
    parser.add_argument(
        "--out", default="docs/reproductions", metavar="DIR", help="folder of the report"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(experiment.PARTS),
        choices=tuple(experiment.PARTS),
        help=f"{', '.join(experiment.PARTS.values())} (default: all)",
    )
    if (seeds := experiment.SEEDS) is not None:
        number = {"type": int, "metavar": "N"}
        seeds_help = f"seeds of each arm (default: {seeds})"
        parser.add_argument("--seeds", default=seeds, help=seeds_help, **number)
        parser.add_argument(
            "--workers", default=1, help="runs at once, as of launch.sweep", **number
        )
        minutes_help = "stop the sweeps after so many minutes; the same command continues them"
        parser.add_argument("--minutes", type=float, metavar="M", help=minutes_help)
    if hasattr(experiment, "add_flags"):
        experiment.add_flags(parser)


def _reproduce(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs the unfinished parts of a reproduction and writes its report; returns 1 if a claim that must hold does not."""
    from espalier.launch.papers.shared import claim, sweeps

    settings = vars(flags).copy()
    slug, out = settings.pop("paper"), pathlib.Path(settings.pop("out"))
    report = _module(slug, "report").REPORT
    try:
        if settings.pop("again"):
            for name, default in (
                ("seeds", _module(slug, "experiment").SEEDS),
                ("workers", 1),
                ("minutes", None),
            ):
                if settings.get(name, default) != default:
                    raise ValueError(f"--{name} is of runs, and --again runs nothing: remove it.")
            measured, facts = _recorded(out / slug)
        else:
            # The page has a command for everyone: where the runs lie on this machine is left out.
            words = re.sub(r"--model_dir[= ]\S+", f"--model_dir=runs/{slug}", " ".join(arguments))
            facts = _facts(report.claims, pathlib.Path(flags.model_dir), words)
            measured = _module(slug, "experiment").run(**settings)
    except sweeps.StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return cli.INTERRUPTED
    judged = report.write(measured, out, facts)
    for one in judged:
        print(f"{one.name:4} {one.verdict:13} {one.statement}")
    print(f"report {out / slug}.md")
    problems = claim.unmet(judged, flags.parts)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def _facts(claims: Sequence[Any], model_dir: pathlib.Path, words: str) -> dict[str, Any]:
    """Returns what the numbers of a page depend on; the criteria are fixed by it before the first run."""
    from espalier.launch.papers.shared import claim

    return {
        "command": f"espalier reproduce {words}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        "criteria": claim.fix_criteria(model_dir, claims),
    }


def _recorded(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Returns the measurements and the facts of a written page."""
    from espalier.launch.papers.shared import page

    path = folder / page.RECORD
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the reproduction with --model_dir first.")
    record = json.loads(path.read_bytes())
    facts = {name: record[name] for name in ("command", "versions", "criteria") if name in record}
    return record["measured"], facts


if __name__ == "__main__":
    raise SystemExit(main())
