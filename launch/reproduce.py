"""Reproduces a paper's claims at small scale, and writes the report with its plots.

The same command continues where it stopped: runs and measurements stay in --model_dir. Examples:

  espalier reproduce snapkv --model_dir=runs/snapkv --out=docs/reproductions
  espalier reproduce code_mix --model_dir=runs/code_mix --workers=2 --out=docs/reproductions
  espalier reproduce code_mix --again --out=docs/reproductions   # the page again, from results.json

Seeds run in blocks, such as 5, 8 and 12: after each, the claims are judged, and only the arms of those that are still
undecided go on. A page keeps the parts that --parts does not name, if their criteria are the same now: parts of a paper can
run at different times, and on different machines. On two idle cores a paper takes between half an hour and two and a half hours; its page says how long.
espalier reproduce PAPER --help lists the flags of a paper.
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
from collections.abc import Mapping, Sequence
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

    experiment.py has TITLE, PARTS (name -> description), SWEEPS (part -> its sweep as PAPER/FILE:TEXT, in which {seeds} is
    their number), EARLIER (rounds of runs before this one, a sentence each), `run(model_dir, parts, **other flags)` and
    optionally `add_flags(parser)`. If SEEDS, the numbers of seeds at which claims are judged, is not None, its runs are sweeps,
    with the flags --seeds, --workers and --minutes. report.py has REPORT, a `shared.page.Report`.
    """
    reports = (one for path in papers.__path__ for one in pathlib.Path(path).glob("*/report.py"))
    return sorted(one.parent.name for one in reports if one.with_name("experiment.py").exists())


def _module(slug: str, name: str) -> Any:
    return importlib.import_module(f"{papers.__name__}.{slug}.{name}")


def _add_flags(parser: argparse.ArgumentParser, experiment: Any) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_dir", metavar="DIR", help="folder of the runs and measurements")
    again_help = "run nothing: write the page again from results.json in --out"
    source.add_argument("--again", action="store_true", help=again_help)
    parser.add_argument(
        "--out",
        default="docs/reproductions",
        metavar="DIR",
        help="write the page and its figures to this folder (default docs/reproductions)",
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
        looks = ", ".join(map(str, seeds))
        seeds_help = f"at most so many seeds of an arm (default: as needed, of {looks})"
        parser.add_argument(
            "--seeds",
            default=seeds[-1],
            help=seeds_help,
            **number,
        )
        parser.add_argument(
            "--workers", default=1, help="number of runs at the same time (default 1)", **number
        )
        minutes_help = "stop the sweeps after so many minutes; the same command continues them"
        parser.add_argument("--minutes", type=float, metavar="M", help=minutes_help)
    if hasattr(experiment, "add_flags"):
        experiment.add_flags(parser)


def _reproduce(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs the unfinished parts of a reproduction and writes its report; returns 1 if a claim that must hold does not."""
    from espalier.launch.papers.shared import claim, criteria, sweeps

    settings = vars(flags).copy()
    slug, out = settings.pop("paper"), pathlib.Path(settings.pop("out"))
    report, experiment = _module(slug, "report").REPORT, _module(slug, "experiment")
    try:
        if settings.pop("again"):
            for name, default in (
                ("seeds", (experiment.SEEDS or (None,))[-1]),
                ("workers", 1),
                ("minutes", None),
            ):
                if settings.get(name, default) != default:
                    raise ValueError(f"--{name} is of runs, and --again runs nothing: remove it.")
            found, facts = _recorded(out / slug)
            if "criteria" in facts:
                facts["criteria"] = criteria.today(facts["criteria"], experiment)
        else:
            # The page has a command for everyone: where the runs and the page lie on this machine is left out.
            words = re.sub(r"--model_dir[= ]\S+", f"--model_dir=runs/{slug}", " ".join(arguments))
            words = re.sub(r"--out[= ]\S+", "--out=docs/reproductions", words)
            model_dir = pathlib.Path(flags.model_dir)

            def others() -> tuple[dict[str, Any], dict[str, Any]]:
                """Returns the measurements of the page's other parts, and the facts of all."""
                kept, before = _kept(out / slug, report.claims, experiment, flags.parts)
                return kept, _facts(report.claims, experiment, model_dir, words, before)

            if kept := others()[0]:  # criteria are fixed, and errors come, before the runs
                print(f"kept of {out / slug / 'results.json'}: {', '.join(kept)}", flush=True)
            found = measured(experiment, report, settings)
            kept, facts = others()  # other parts may have been written during these runs
            found = kept | found
    except sweeps.StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return cli.INTERRUPTED
    judged = report.write(found, out, facts)
    for one in judged:
        print(f"{one.name:4} {one.verdict:13} {one.statement}")
    print(f"report {out / slug}.md")
    problems = claim.unmet(judged, flags.parts)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def measured(experiment: Any, report: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an experiment measures, with more seeds of the arms of undecided claims at each look."""
    if experiment.SEEDS is None:
        return experiment.run(**settings)
    from espalier.launch.papers.shared import claim, results, sweeps

    settings = dict(settings)
    most, parts = settings.pop("seeds"), settings.pop("parts")
    looks = [look for look in experiment.SEEDS if look <= most] or [most]
    found = experiment.run(seeds=looks[0], parts=parts, **settings)
    for before, look in zip(looks, looks[1:], strict=False):
        judged = claim.judge(report.claims, report.read(found), report.places)
        undecided = [one for one in judged if one.open]
        if not undecided:
            break
        print(
            f"undecided after {before} seeds: {', '.join(one.name for one in undecided)}",
            flush=True,
        )
        with results.reading() as arms:
            claim.judge(undecided, report.read(found), report.places, secondary=False)
        further = sweeps.Further(looks[0], frozenset(arms))
        some = [part for part in parts if part in {one.part for one in undecided}]
        found |= experiment.run(seeds=look, parts=some, further=further, **settings)
    return found


def _kept(
    folder: pathlib.Path, claims: Sequence[Any], experiment: Any, parts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the measurements of those parts of a written page that do not run now, and the page's facts of them.

    Raises:
      ValueError: their criteria are others now, so that they would be lost.
    """
    from espalier.launch.papers.shared import criteria, page

    path = folder / page.RECORD
    if not path.exists() or "headline" not in json.loads(path.read_bytes()):
        return {}, {}
    found, facts = _recorded(folder)
    kept = {part: value for part, value in found.items() if part not in parts}
    if not kept:
        return {}, {}
    try:
        fixed = criteria.kept(facts["criteria"], tuple(kept), claims, experiment)
    except ValueError as error:
        raise ValueError(
            f"{path} has the parts {', '.join(kept)}, and {error}: run them too (--parts), or write to another folder (--out)."
        ) from error
    return kept, {**facts, "criteria": fixed}


def _facts(
    claims: Sequence[Any],
    experiment: Any,
    model_dir: pathlib.Path,
    words: str,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what the numbers of a page depend on; the criteria are fixed by it before the first run."""
    from espalier.launch.papers.shared import criteria

    commands = dict.fromkeys(
        (*before.get("command", "").splitlines(), f"espalier reproduce {words}")
    )
    versions = {}
    for name in ("jax", "flax", "numpy"):
        known = before.get("versions", {}).get(name, "").split(" and ")
        versions[name] = " and ".join(
            filter(None, dict.fromkeys((*known, importlib.metadata.version(name))))
        )
    return {
        "command": "\n".join(commands),
        "versions": versions,
        "criteria": criteria.fix(model_dir, claims, experiment, before.get("criteria")),
    }


def _recorded(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Returns the measurements and the facts of a written page."""
    from espalier.launch.papers.shared import page

    path = folder / page.RECORD
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the reproduction with --model_dir first.")
    record = json.loads(path.read_bytes())
    if "headline" not in record:
        raise ValueError(
            f"{path} is of an earlier version of this experiment, which measured other numbers: run the reproduction with "
            "--model_dir."
        )
    facts = {name: record[name] for name in ("command", "versions", "criteria") if name in record}
    return record["measured"], facts


if __name__ == "__main__":
    raise SystemExit(main())
