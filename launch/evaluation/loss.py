"""Held-out loss, perplexity and bits per byte of a checkpoint, for each task of its run.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help):

  python -m launch.evaluate loss --checkpoint=/tmp/espalier_tiny --json=/tmp/eval.json

The run's configuration is read from its directory; --gin_file and --gin.NAME=VALUE change it, such
as --gin.MIXTURE_OR_TASK_NAME for other tasks or --gin.MESH for other devices.
"""

import argparse
from collections.abc import Sequence

from launch import cli
from launch.run import load_run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.main(
        __doc__,
        entry="launch.evaluation.held_out:evaluate",
        command="evaluate loss",
        extra_flags=_add_flags,
        run=_run,
        default_files=lambda flags: load_run.files_of(
            flags.checkpoint, flags.gin_file, own="t5x_configs/runs/evaluate.gin"
        ),
        argv=argv,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = load_run.add_flags(parser)
    group.add_argument(
        "--tasks", metavar="NAME,NAME", help="instead of the tasks of MIXTURE_OR_TASK_NAME"
    )
    group.add_argument(
        "--max_batches", type=int, metavar="N", help="per task (default: whole splits)"
    )
    group.add_argument("--json", metavar="FILE", help="also writes the results here")


def _run(start: cli.Start) -> None:
    flags = start.flags
    start(
        checkpoint=flags.checkpoint,
        params=flags.params,
        tasks=tuple(flags.tasks.split(",")) if flags.tasks else None,
        max_batches=flags.max_batches,
        json_file=flags.json,
    )


if __name__ == "__main__":
    raise SystemExit(main())
