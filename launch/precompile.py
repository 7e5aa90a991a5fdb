"""Compiles a training run for absent TPUs, and reports its memory, FLOPs and traffic per chip.

Example: Llama 2 7B on sixteen v5e chips, one or two minutes on one core (needs the extra `tpu`):

  python -m launch.precompile \\
    --gin_file=t5x_configs/models/llama2_7b.gin --gin_file=t5x_configs/runs/pretrain.gin \\
    --topology=v5e:4x4 --gin.BATCH_SIZE=16 --gin.TASK_FEATURE_LENGTHS='{"targets": 2048}'

Takes the gin arguments of `train`, but reads no data and no directories. Nothing is allocated or run: the
compiler reports memory; FLOPs and collectives are counted in its program.
Exit status: 0 the step fits, 1 it does not fit, 2 the configuration is wrong.
"""

import argparse
from collections.abc import Sequence

from launch import cli
from launch.aot import tpu_topology


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    tpu_topology.prepare_environment()
    return cli.main(
        __doc__,
        entry="launch.train:train",
        command="precompile",
        extra_flags=_add_flags,
        run=_run,
        unused={"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"},
        argv=argv,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compilation")
    group.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="slice to compile for: v5e:4x4, v6e:8x8, v5p:4x4x4, v4:2x2x2, v5e:1x1, ...",
    )
    group.add_argument("--json", metavar="FILE", help="also writes the report here")
    group.add_argument("--hlo", metavar="FILE", help="also writes the compiled program's text here")


def _run(start: cli.Start) -> int:
    from launch.aot import precompile

    flags, recipe = start.flags, start.config.arguments()["recipe"]
    fits = precompile.precompile(recipe, flags.topology, json_file=flags.json, hlo=flags.hlo)
    return 0 if fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
