"""Flags of `launch.evaluate code`, and what they mean together."""

import argparse
from collections.abc import Sequence

_SOLUTIONS = "--solutions"


def has_solutions(argv: Sequence[str]) -> bool:
    """Whether given completions are run, so that no model is needed."""
    return any(word == _SOLUTIONS or word.startswith(f"{_SOLUTIONS}=") for word in argv)


def without_model(doc: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line with --solutions."""
    summary, _, rest = doc.strip().partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate code",
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_problems(parser)
    _add_limits(parser.add_argument_group("limits of a program"))
    flags = parser.parse_args(argv)
    flags.checkpoint = None
    return flags


def add(parser: argparse.ArgumentParser) -> None:
    """Adds all flags, those of models first."""
    from launch.run import load_run

    load_run.add_flags(parser)
    _add_problems(parser.add_argument_group("problems"))
    _add_sampling(parser.add_argument_group("what the model writes"))
    _add_limits(parser.add_argument_group("limits of a program"))


def _add_problems(group) -> None:
    group.add_argument(
        "--problems", required=True, metavar="NAME", help="`humaneval`, or a file of JSON lines"
    )
    group.add_argument(
        _SOLUTIONS, metavar="FILE", help="completions to run in place of a model's, in JSON lines"
    )
    group.add_argument(
        "--k", type=int, nargs="+", default=[1], metavar="K", help="of pass@k (default 1)"
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="rows, which are added to those there"
    )
    group.add_argument("--json", metavar="FILE", help="the scores, for other commands")


def _add_sampling(group) -> None:
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="for each problem (default 1)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0 takes the most probable tokens (default: 0 of one sample, 0.8 of several)",
    )
    group.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="draw among the fewest tokens that have probability P together (default 0.95)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument(
        "--max_new_tokens", type=int, default=512, metavar="N", help="at most so many (default 512)"
    )
    group.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="problems at a time (default 8)"
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="ask with the model's chat template, and run the block of code in its reply",
    )


def _add_limits(group) -> None:
    group.add_argument(
        "--cpu_seconds", type=int, default=5, metavar="N", help="of processor time (default 5)"
    )
    group.add_argument(
        "--wall_seconds", type=float, default=10.0, metavar="N", help="in all (default 10)"
    )
    group.add_argument(
        "--memory_mb", type=int, default=512, metavar="N", help="of memory (default 512)"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="programs at a time (default one a processor)"
    )
    group.add_argument(
        "--require",
        nargs="+",
        choices=("network", "files", "processes"),
        default=[],
        help="run nothing unless programs can be kept from these",
    )
