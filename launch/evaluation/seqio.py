"""SeqIO tasks with metric functions of their own, such as a benchmark's, on a trained model.

Example, where my_tasks.py registers a task "sums" with the features inputs and targets in the vocabulary
of the run, and with metric_fns:

  python -m launch.evaluate seqio --checkpoint=/tmp/espalier_tiny --module=my_tasks --task=sums

Examples, preprocessors, postprocess_fn and metrics are the task's, and SeqIO's Evaluator calls them.
Functions of (targets, predictions) get greedy continuations of "inputs", functions of (targets,
scores) the log-probability of "targets" after "inputs", summed over tokens. The tokens that the run reads
before every text (START_TOKEN, BOS) come before "inputs"; an EOS that the task appends to them is read too,
so that most tasks for such models say add_eos=False of that feature.
"""

import argparse
from collections.abc import Sequence

from launch import cli
from launch.config import setting_flags
from launch.run import load_run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.main(
        __doc__,
        entry="launch.run.load_run:RunConfig",
        command="evaluate seqio",
        extra_flags=_add_flags,
        run=_run,
        default_files=load_run.default_files,
        unused={"VOCABULARY": "None"},
        argv=argv,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    group = parser.add_argument_group("tasks")
    group.add_argument("--task", action="append", required=True, metavar="NAME", help="repeatable")
    group.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="module to import that registers tasks, such as one in this folder; repeatable",
    )
    group.add_argument("--split", default="validation", help="default validation")
    group.add_argument(
        "--num_examples", type=int, metavar="N", help="of each task, its first (default: all)"
    )
    group.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="default 128")
    group.add_argument("--json", metavar="FILE", help="also writes the metrics here")
    group.add_argument(
        "--output", metavar="FILE", help="writes every example and answer here, JSON lines"
    )


def _run(start: cli.Start) -> None:
    from data import cpu_tensorflow
    from data.text import user_data

    cpu_tensorflow.load()
    from launch.evaluation import seqio_tasks

    flags = start.flags
    for module in flags.module:
        user_data.import_mixtures(module=module)
    seqio_tasks.evaluate(
        start(),
        tasks=flags.task,
        json_file=flags.json,
        **setting_flags.given(flags, seqio_tasks.evaluate),
    )


if __name__ == "__main__":
    raise SystemExit(main())
