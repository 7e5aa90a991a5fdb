"""Reproduces a paper's claims at small scale, and writes the report with its plots.

Started again, it goes on where it stopped: what has been trained and measured is kept in --model_dir.
Example; two hours on two idle cores:

  python -m launch.reproduce snapkv --model_dir=runs/snapkv --out=docs/reproductions
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from launch import cli, environment


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    summary, _, example = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.reproduce",
        description=summary,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paper", choices=("snapkv",), help="whose claims")
    parser.add_argument(
        "--model_dir", required=True, metavar="DIR", help="parent of runs and measurements"
    )
    parser.add_argument("--out", default="docs/reproductions", metavar="DIR", help="of the report")
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
    flags = parser.parse_args(argv)

    def call() -> None:
        if argv is None:
            environment.restart_with_huge_pages()
        environment.prepare()
        _reproduce(flags, sys.argv[1:] if argv is None else list(argv))

    return cli.status_of(call)


def _reproduce(flags: argparse.Namespace, arguments: Sequence[str]) -> None:
    import importlib.metadata

    from launch.reproductions.snapkv import experiment, page

    found = experiment.run(
        model_dir=flags.model_dir,
        seeds=flags.seeds,
        prompts=flags.prompts,
        haystacks=flags.haystacks,
        parts=flags.parts,
    )
    names = ("jax", "flax", "numpy")
    facts = {
        "command": " ".join(["python -m launch.reproduce", *arguments]),
        "seeds": flags.seeds,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    out = pathlib.Path(flags.out)
    page.write(found, out, facts)
    print(f"report {out / 'snapkv.md'}")


if __name__ == "__main__":
    raise SystemExit(main())
