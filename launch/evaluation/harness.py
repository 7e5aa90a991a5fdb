"""A paper's evaluation suite on a checkpoint: every benchmark, means by group, and the missing data sets.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help), `pip install
'espalier-lm[eval]'` and with evaluation sets in /data/eval:

  python -m launch.evaluate harness --checkpoint=/tmp/espalier_tiny --suite=code_mix --data_dir=/data/eval \\
    --code_results=/tmp/humaneval.json --json=/tmp/suite.json

Sets are read from local files as their public repositories have them (launch/evaluation/suites/local_data.py) and
are never downloaded: a benchmark without its set is a row that says how to get it, and so is a benchmark
of code that no --code_results holds, which are the --json files of launch.evaluate code. Prompts, shots
and metrics are the task files of the suite's paper, launch/papers/NAME/harness_tasks, which lm-evaluation-harness runs.
With `--include_path launch/papers/NAME/harness_tasks` and ESPALIER_EVAL_DATA=DIR they are tasks of launch.lm_eval too.
"""

import argparse
from collections.abc import Sequence

from launch import cli
from launch.evaluation.suites import scores
from launch.run import load_run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "evaluate harness", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    group = parser.add_argument_group("evaluation")
    suites = scores.names()
    group.add_argument(
        "--suite",
        choices=suites,
        default=suites[0],
        required=len(suites) > 1,
        help="a paper's, by its name",
    )
    group.add_argument(
        "--data_dir", metavar="DIR", help="of all evaluation sets (default: $ESPALIER_EVAL_DATA)"
    )
    group.add_argument(
        "--code_results",
        action="append",
        default=[],
        metavar="FILE",
        help="a --json file of launch.evaluate code; repeatable",
    )
    group.add_argument(
        "--model_args",
        default="",
        metavar="NAME=VALUE,...",
        help="more arguments of the model, as of launch.lm_eval: batch_tokens=16384,dtype=float32",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="examples of each benchmark (default: all)"
    )
    group.add_argument("--json", metavar="FILE", help="also writes the results here")
    group.add_argument(
        "--samples", metavar="FILE", help="writes every example and answer here, JSONL"
    )


def _run(flags: argparse.Namespace) -> None:
    from launch.evaluation.suites import evaluation

    evaluation.evaluate(flags)


if __name__ == "__main__":
    raise SystemExit(main())
