"""Compiles a training run for absent TPUs, and reports its memory, FLOPs, traffic and least time per chip.

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
from typing import Any

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
        help="slice to compile for: v5e:4x4, v6e:8x8, v5p:4x4x4, v4:2x2x2, v5e:1x1; 2xv5e:16x16 for two slices; ...",
    )
    group.add_argument("--json", metavar="FILE", help="also writes the report here")
    group.add_argument("--hlo", metavar="FILE", help="also writes the compiled program's text here")
    group.add_argument(
        "--program",
        default="train",
        choices=("train", "prefill", "decode", "covariances"),
        help="train: an update (default); prefill, decode: BATCH_SIZE prompts of TASK_FEATURE_LENGTHS tokens are read, or "
        "continued by one token; covariances: a batch of documents of EK-FAC's first stage",
    )
    group = parser.add_argument_group("prefill, decode")
    group.add_argument("--max_new_tokens", type=int, default=128, metavar="N")
    group.add_argument("--cache_policy", default="full", metavar="NAME", help="as of `generate`")
    group.add_argument(
        "--cache", action="append", default=[], metavar="NAME=VALUE", help="as of `generate`"
    )
    group.add_argument("--cache_dtype", choices=("int8", "bfloat16", "float16", "float32"))
    group.add_argument("--prefill_chunk", type=int, metavar="N", help="as of `generate`")
    group = parser.add_argument_group("covariances")
    group.add_argument("--modules", default="mlp", metavar="NAMES", help="as of `influence fit`")
    group.add_argument("--blocks", type=int, default=1, metavar="N", help="as of `influence fit`")


def _run(start: cli.Start) -> int:
    from launch.aot import precompile

    flags, recipe = start.flags, start.config.arguments()["recipe"]
    fits = precompile.precompile(
        recipe,
        flags.topology,
        kind=flags.program,
        **_settings(flags),
        json_file=flags.json,
        hlo=flags.hlo,
    )
    return 0 if fits else 1


def _settings(flags: argparse.Namespace) -> dict[str, Any]:
    from launch.aot.programs import Options
    from model.kv_cache.policies import policy_from_text

    pairs = dict(pair.partition("=")[::2] for pair in flags.cache)
    return {
        "policy": policy_from_text(flags.cache_policy, pairs),
        "options": Options(
            max_new_tokens=flags.max_new_tokens,
            cache_dtype=flags.cache_dtype,
            prefill_chunk=flags.prefill_chunk,
            modules=tuple(flags.modules.split(",")),
            blocks=flags.blocks,
        ),
    }


if __name__ == "__main__":
    raise SystemExit(main())
