"""Reproduces a paper's claims at small scale, and writes the report with its plots.

Started again, it goes on where it stopped: what has been trained and measured is kept in --model_dir.
Examples:

  python -m launch.reproduce snapkv --model_dir=runs/snapkv --out=docs/reproductions
  python -m launch.reproduce code_mix --model_dir=runs/code_mix --workers=2 --out=docs/reproductions
  python -m launch.reproduce low_rank --model_dir=runs/low_rank --workers=2 --out=docs/reproductions
  python -m launch.reproduce bam --model_dir=runs/bam --workers=2 --out=docs/reproductions
  python -m launch.reproduce nexus --model_dir=runs/nexus --workers=2 --out=docs/reproductions
  python -m launch.reproduce preference --model_dir=runs/preference --workers=2 --out=docs/reproductions

On two idle cores the first takes two hours, code_mix 40 minutes, low_rank and preference an hour, and bam and nexus
about two hours each with both of their parts.
The flags of each are shown by python -m launch.reproduce PAPER --help. The status is 1 where a claim that
must hold does not, or was not measured by a part that was asked for, and 75 where --minutes or a signal has
stopped it.
"""

import argparse
import importlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Mapping, Sequence

from launch import cli, environment

_DOMAINS = {"synthetic": "generated domains", "real": "real ones"}
# Paper -> (title, seeds, parts and what they are), of those whose runs are sweeps'.
_SWEPT = {
    "code_mix": (
        "To Code, or Not To Code?, 2408.10914",
        3,
        {"skills": "generated text and code", "packages": "installed packages"},
    ),
    "low_rank": (
        "low-rank training, 2209.13569",
        3,
        {"lm": "characters", "vision": "textures", "timing": "the time of steps"},
    ),
    "bam": ("BAM, 2408.08274", 3, {**_DOMAINS, "caches": "the bytes of caches"}),
    "nexus": ("Nexus, 2408.15901", 5, _DOMAINS),
    "preference": (
        "likelihood over-optimisation, 2410.11677",
        3,
        {"language": "preferences in a generated language"},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    summary, _, example = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.reproduce",
        description=summary,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    papers = parser.add_subparsers(dest="paper", required=True, metavar="PAPER")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model_dir", required=True, metavar="DIR", help="parent of runs and measurements"
    )
    shared.add_argument("--out", default="docs/reproductions", metavar="DIR", help="of the report")
    _add_snapkv(papers.add_parser("snapkv", parents=[shared], help="SnapKV, 2404.14469"))
    for paper, (title, seeds, parts) in _SWEPT.items():
        _add_swept(papers.add_parser(paper, parents=[shared], help=title), seeds, parts)
    papers.choices["code_mix"].add_argument(
        "--package_seeds",
        type=int,
        default=3,
        metavar="N",
        help="of the arms of packages, which --seeds leaves alone (default: 3)",
    )
    flags = parser.parse_args(argv)
    statuses = [0]

    def call() -> None:
        if argv is None:
            environment.restart_with_huge_pages()
        environment.prepare()
        statuses[0] = flags.reproduce(flags, sys.argv[1:] if argv is None else list(argv))

    return cli.status_of(call) or statuses[0]


def _add_snapkv(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(reproduce=_snapkv)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of trained models")
    parser.add_argument(
        "--prompts", type=int, default=256, help="of each measurement of a trained model"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["retrieval", "needles", "latency"],
        choices=("retrieval", "needles", "latency"),
        help="what to measure (default: all)",
    )
    parser.add_argument(
        "--haystacks",
        type=int,
        nargs="+",
        default=[1024, 2048],
        choices=(1024, 2048),
        help="tokens of the haystacks that needles are looked for in",
    )


def _add_swept(parser: argparse.ArgumentParser, seeds: int, parts: Mapping[str, str]) -> None:
    """Flags of a reproduction whose runs are sweeps': the usual number of seeds, and its parts with what they are."""
    parser.set_defaults(reproduce=_swept)
    parser.add_argument(
        "--seeds", type=int, default=seeds, metavar="N", help=f"of each arm (default: {seeds})"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(parts),
        choices=tuple(parts),
        help=f"{', '.join(parts.values())} (default: all)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="runs at once, as of launch.sweep"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="after these a sweep stops, to go on later"
    )


def _snapkv(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    from launch.papers.snapkv import measure as experiment
    from launch.papers.snapkv import page

    found = experiment.run(
        model_dir=flags.model_dir,
        seeds=flags.seeds,
        prompts=flags.prompts,
        haystacks=flags.haystacks,
        parts=flags.parts,
    )
    out = pathlib.Path(flags.out)
    page.write(found, out, {**_facts(arguments), "seeds": flags.seeds})
    print(f"report {out / 'snapkv.md'}")
    return 0


def _swept(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs what is left of a reproduction and writes its report; the status says whether claims that must hold do."""
    from launch.papers.shared import claim, sweeps

    experiment, page = (
        importlib.import_module(f"launch.papers.{flags.paper}.{name}")
        for name in ("measure", "page")
    )
    own = {"package_seeds": flags.package_seeds} if flags.paper == "code_mix" else {}
    try:
        found = experiment.run(
            model_dir=flags.model_dir,
            seeds=flags.seeds,
            workers=flags.workers,
            minutes=flags.minutes,
            parts=flags.parts,
            **own,
        )
    except sweeps.StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return cli.INTERRUPTED
    out = pathlib.Path(flags.out)
    judged = page.write(found, out, _facts(arguments))
    for one in judged:
        print(f"{one.name:4} {one.verdict:13} {one.statement}")
    print(f"report {out / flags.paper}.md")
    against = claim.unmet(judged, flags.parts)
    for words in against:
        print(words, file=sys.stderr)
    return int(bool(against))


def _facts(arguments: Sequence[str]) -> dict:
    """What the numbers of a report depend on."""
    names = ("jax", "flax", "numpy")
    return {
        "command": " ".join(["python -m launch.reproduce", *arguments]),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    raise SystemExit(main())
