"""Reproduces a paper's claims at small scale, and writes the report with its plots.

Started again, it goes on where it stopped: what has been trained and measured is kept in --model_dir.
Examples:

  python -m launch.reproduce snapkv --model_dir=runs/snapkv --out=docs/reproductions
  python -m launch.reproduce code_mix --model_dir=runs/code_mix --workers=2 --out=docs/reproductions
  python -m launch.reproduce low_rank --model_dir=runs/low_rank --workers=2 --out=docs/reproductions
  python -m launch.reproduce bam --model_dir=runs/bam --workers=2 --out=docs/reproductions
  python -m launch.reproduce nexus --model_dir=runs/nexus --workers=2 --out=docs/reproductions

The first three take two hours, 40 minutes and an hour on two idle cores, the others longer.
The flags of each are shown by python -m launch.reproduce PAPER --help. The status is 1 where a claim that
must hold does not, and 75 where --minutes or a signal has stopped it.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch import cli, environment

if TYPE_CHECKING:
    from launch.reproductions.claim import Claim


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
    _add_code_mix(
        papers.add_parser("code_mix", parents=[shared], help="To Code, or Not To Code?, 2408.10914")
    )
    _add_low_rank(
        papers.add_parser("low_rank", parents=[shared], help="low-rank training, 2209.13569")
    )
    _add_bam(papers.add_parser("bam", parents=[shared], help="BAM, 2408.08274"))
    _add_nexus(papers.add_parser("nexus", parents=[shared], help="Nexus, 2408.15901"))
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


def _add_code_mix(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(reproduce=_code_mix)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of generated text and code (default: 3)"
    )
    parser.add_argument(
        "--package_seeds",
        type=int,
        default=3,
        metavar="N",
        help="of the text and code of installed packages (default: 3)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["skills", "packages"],
        choices=("skills", "packages"),
        help="generated text and code, installed packages (default: both)",
    )
    _add_sweep_flags(parser)


def _add_low_rank(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(reproduce=_low_rank)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of all arms (default: 3)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["lm", "vision", "timing"],
        choices=("lm", "vision", "timing"),
        help="characters, textures, the time of steps (default: all)",
    )
    _add_sweep_flags(parser)


def _add_bam(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(reproduce=_bam)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of all arms (default: 3)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["synthetic", "real", "caches"],
        choices=("synthetic", "real", "caches"),
        help="generated domains, real ones, the bytes of caches (default: all)",
    )
    _add_sweep_flags(parser)


def _add_nexus(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(reproduce=_nexus)
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="of all arms (default: 5)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["synthetic", "real"],
        choices=("synthetic", "real"),
        help="generated domains, real ones (default: both)",
    )
    _add_sweep_flags(parser)


def _add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="runs at once, as of launch.sweep"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="after these a sweep stops, to go on later"
    )


def _snapkv(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    from launch.reproductions.snapkv import experiment, page

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


def _code_mix(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    from launch.reproductions.code_mix import experiment, page

    return _report_sweeps(
        "code_mix",
        lambda: experiment.run(
            model_dir=flags.model_dir,
            seeds=flags.seeds,
            package_seeds=flags.package_seeds,
            workers=flags.workers,
            minutes=flags.minutes,
            parts=flags.parts,
        ),
        page.write,
        flags,
        arguments,
    )


def _low_rank(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    from launch.reproductions.low_rank import experiment, page

    return _report_sweeps(
        "low_rank",
        lambda: experiment.run(
            model_dir=flags.model_dir,
            seeds=flags.seeds,
            workers=flags.workers,
            minutes=flags.minutes,
            parts=flags.parts,
        ),
        page.write,
        flags,
        arguments,
    )


def _bam(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    from launch.reproductions.bam import experiment, page

    return _report_sweeps(
        "bam",
        lambda: experiment.run(
            model_dir=flags.model_dir,
            seeds=flags.seeds,
            workers=flags.workers,
            minutes=flags.minutes,
            parts=flags.parts,
        ),
        page.write,
        flags,
        arguments,
    )


def _nexus(flags: argparse.Namespace, arguments: Sequence[str]) -> int:
    from launch.reproductions.nexus import experiment, page

    return _report_sweeps(
        "nexus",
        lambda: experiment.run(
            model_dir=flags.model_dir,
            seeds=flags.seeds,
            workers=flags.workers,
            minutes=flags.minutes,
            parts=flags.parts,
        ),
        page.write,
        flags,
        arguments,
    )


def _report_sweeps(
    name: str,
    run: Callable[[], Mapping[str, Any]],
    write: "Callable[[Mapping[str, Any], pathlib.Path, Mapping[str, Any]], Sequence[Claim]]",
    flags: argparse.Namespace,
    arguments: Sequence[str],
) -> int:
    """Runs what is left of a reproduction and writes its report; the status says whether claims that must hold do."""
    from launch.reproductions import sweeps

    try:
        found = run()
    except sweeps.StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return cli.INTERRUPTED
    out = pathlib.Path(flags.out)
    judged = write(found, out, _facts(arguments))
    for claim in judged:
        print(f"{claim.name:4} {claim.verdict:13} {claim.statement}")
    print(f"report {out / name}.md")
    return int(any(c.required and c.verdict in ("fails", "mixed") for c in judged))


def _facts(arguments: Sequence[str]) -> dict:
    """What the numbers of a report depend on."""
    import importlib.metadata

    names = ("jax", "flax", "numpy")
    return {
        "command": " ".join(["python -m launch.reproduce", *arguments]),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    raise SystemExit(main())
